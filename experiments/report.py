"""The report in Markdown, computed from the results alone."""

import json
import math

from . import compare
from .plan import tried_rates
from .results import run_of
from .spectra import KINDS, num_above

MARKS = {True: "✓", False: "–"}


def write_report(definition, results, docs):
    """Writes README.md and specs.json."""
    summaries = {row: compare.summarise(definition, results, row) for row in definition.rows}
    sections = [
        introduction(definition, results, summaries),
        methods_table(definition, results, summaries),
        ablation_table(definition, summaries),
        orderings(definition, summaries),
        tuning_table(definition, results, summaries),
        curves(),
        spectra_table(definition, results, summaries),
        cost_table(definition, results, summaries),
        troubles(results),
        conditions(definition, results),
    ]
    (docs / "README.md").write_text("\n\n".join(section for section in sections if section) + "\n")
    specs = row_specs(definition, results, summaries)
    (docs / "specs.json").write_text(json.dumps(specs, indent=2) + "\n")


def introduction(definition, results, summaries):
    spec = definition.document["spec"]
    model, batch, num_steps = spec["model"], spec["batch"], spec["schedule"]["num_steps"]
    num_tokens = num_steps * batch["num_seqs"] * batch["sequence_length"]
    wanted = len(definition.rows) * len(definition.seeds)
    done = sum(len(summary.by_seed) for summary in summaries.values())
    lines = [
        f"# {definition.document['title']}",
        f"Written by `experiments/run --report` from [results.jsonl](results.jsonl): do not edit. "
        f"{done} of the {wanted} runs that count are in it.",
        f"Every row was trained by the service itself on the same {num_tokens / 1e6:.2f} M tokens: {num_steps} updates "
        f"of {batch['num_seqs']} x {batch['sequence_length']} tokens; hidden size {model['hidden_size']}, "
        f"{model['num_hidden_layers']} layers, vocabulary {definition.tokenization['vocab_size']}. The learning rate "
        f"of each method was tuned on seed {definition.tuning['seed']}, which does not count, with the whole budget "
        f"for every rate; the seeds {', '.join(map(str, definition.seeds))} count. All rows of one seed see the same "
        "data in the same order, and all runs are evaluated on the same validation tokens. A warm start is part of the "
        f"budget, and has the tuned rate of `{definition.document['warm_start_rate_of']}`.",
        f"This is {_millions(_model_params(results))} M parameters and {num_tokens / 1e6:.2f} M tokens; the paper's "
        "smallest model has 60 M. What holds here need not hold there, and the reverse.",
    ]
    return "\n\n".join(lines)


def methods_table(definition, results, summaries):
    """The rows of Table 2."""
    paper = definition.document["paper"]["methods"]
    header = ["method", "perplexity", "std", "min..max", "seeds", "trained parameters", "rate"]
    rows = []
    for row in rows_of_table(definition, "methods"):
        summary = summaries[row]
        rows.append([f"{definition.rows[row]['title']} (`{row}`)", *_measured(summary),
                     _trained_params(definition, results, row, summary), _rate(summary.rate),
                     *map(_paper_value, _paper_row(paper, row))])
    table = markdown_table(header + [f"paper {column}" for column in paper["columns"]], rows)
    return (
        "## Methods (Table 2 of the paper)\n\nFinal validation perplexity, mean over the seeds; lower is better. "
        "Trained parameters are those of the low-rank phase.\n\n" + table + notes(definition, "methods")
    )


def ablation_table(definition, summaries):
    """The rows of Table 6; what is switched on is read from the specs."""
    paper = definition.document["paper"]["ablation"]
    header = ["row", "restarts", "optimizer reset", "jagged rate", "warm start", "perplexity", "std", "min..max",
              "seeds", "rate"]
    rows = []
    for row in rows_of_table(definition, "ablation"):
        marks = [MARKS[is_on] for is_on in ingredients(definition.row_spec(row)["method"])]
        rows.append([f"{definition.rows[row]['title']} (`{row}`)", *marks, *_measured(summaries[row]),
                     _rate(summaries[row].rate), *map(_paper_value, _paper_row(paper, row))])
    table = markdown_table(header + [f"paper {column}" for column in paper["columns"]], rows)
    return "## Ablation (Table 6 of the paper)\n\n" + table + notes(definition, "ablation")


def notes(definition, table):
    """What a reader of a table should know."""
    return "".join(f"\n\n{note}" for note in definition.document.get("notes", {}).get(table, []))


def orderings(definition, summaries):
    """Which of the paper's orderings hold."""
    parts = [
        "## Which of the paper's orderings hold at this size",
        "The means are compared. A gap is *beyond the spread* if it exceeds the larger of the two rows' min..max "
        "ranges, and *within* it otherwise: then more seeds could turn it round. A row with a diverged seed has an "
        "infinite mean.",
    ]
    for table, wanted in definition.document["orderings"].items():
        paper = definition.document["paper"][table]
        rows = [ordering_row(summaries, paper, ordering["better"], ordering["worse"]) for ordering in wanted]
        parts.append(markdown_table(["better < worse", "paper", "here", "gap", "spread", "seeds that agree", "verdict"],
                                    rows))
        parts.append(plainly(summaries, wanted))
    return "\n\n".join(parts)


def ordering_row(summaries, paper, better, worse):
    found = compare.compare(summaries[better], summaries[worse])
    known = found.gap is not None
    return [
        f"`{better}` < `{worse}`", paper_pair(paper, better, worse),
        f"{_perplexity(summaries[better].mean)} < {_perplexity(summaries[worse].mean)}" if found.holds else
        f"{_perplexity(summaries[better].mean)}, {_perplexity(summaries[worse].mean)}",
        _perplexity(found.gap) if known else "", _perplexity(found.spread) if known else "",
        f"{found.num_seeds_agree} of {found.num_seeds}", found.verdict,
    ]


def plainly(summaries, wanted):
    """The verdicts in a few sentences."""
    said = {}
    for ordering in wanted:
        found = compare.compare(summaries[ordering["better"]], summaries[ordering["worse"]])
        said.setdefault(found.verdict, []).append(f"`{ordering['better']}` < `{ordering['worse']}`")
    return "\n".join(f"- {verdict[0].upper()}{verdict[1:]}: {', '.join(which)}." for verdict, which in said.items())


def paper_pair(paper, better, worse):
    """The two perplexities of the paper at the size of its ablation, or else the largest that has both."""
    by_column = zip(paper["columns"], _paper_row(paper, better), _paper_row(paper, worse))
    pairs = {column: pair for column, *pair in by_column if None not in pair}
    if not pairs:
        return "–"
    column = "130M" if "130M" in pairs else list(pairs)[-1]
    return f"{_paper_value(pairs[column][0])} < {_paper_value(pairs[column][1])} ({column})"


def tuning_table(definition, results, summaries):
    """Every rate that was tried, with the chosen one in bold."""
    rows = []
    for row, described in definition.rows.items():
        if "rates" not in described:
            continue
        tried = tried_rates(definition, row, results.losses())
        cells = [f"{rate:g}: {_perplexity(math.exp(loss))}" for rate, loss in tried]
        chosen = [f"**{cell}**" if rate == summaries[row].rate else cell for cell, (rate, _) in zip(cells, tried)]
        is_at_end = bool(tried) and summaries[row].rate in (tried[0][0], tried[-1][0])
        rows.append([f"`{row}`", ", ".join(chosen) or compare.NOT_RUN, "yes" if is_at_end else ""])
    borrowed = [f"`{row}` has the rate of `{described['rate_of']}`"
                for row, described in definition.rows.items() if "rate_of" in described]
    return (
        f"## Learning rates\n\nPerplexity of seed {definition.tuning['seed']} by peak rate; the chosen one in bold. A "
        "best rate at an end of the grid had the next one tried as well, up to "
        f"{definition.tuning['max_extensions']} times.\n\n"
        + markdown_table(["row", "rate: perplexity", "chosen at an end of what was tried"], rows)
        + "\n\n" + "; ".join(borrowed) + "."
    )


def curves():
    return (
        "## Curves\n\n![validation loss](validation-loss.png)\n\nMean over the seeds, with the range from the lowest "
        "to the highest; a triangle is a restart.\n\n![learning rate](learning-rate.png)"
    )


def spectra_table(definition, results, summaries):
    """How many directions the low-rank phase moved, by the weights, and by the service's own count."""
    found = spectra_by_row(definition, results, summaries)
    if not found:
        return ""
    threshold = definition.spectra["threshold"]
    seed, step = definition.spectra["seed"], definition.spectra["start_step"]
    columns = {f"`{row}`": [num_above(record["spectra"][kind], threshold) for kind in KINDS]
               for row, record in found.items()}
    for row, record in found.items():
        if record["ranks"]:
            counts = record["ranks"][-1]["kinds"]
            columns[f"`{row}`, the service's count"] = [
                (counts[kind]["num_above"], counts[kind]["num_values"]) for kind in KINDS]
    rows = [[kind, *(f"{above} of {total}" for above, total in figures)]
            for kind, *figures in zip(KINDS, *columns.values())]
    return (
        f"## Singular values of what training changed\n\nOf W_end − W_{step}, seed {seed}: how many exceed {threshold}, "
        "all layers together, computed from the downloaded weights. The service counts the same where `rank_threshold` "
        "asks for it.\n\n" + markdown_table(["matrix", *columns], rows) + "\n\n![singular values](spectra.png)"
    )


def spectra_by_row(definition, results, summaries):
    """The counted runs whose singular values were recorded."""
    records = {row: results.of_row(row, [definition.spectra["seed"]], summaries[row].rate)
               for row in definition.spectra["rows"]}
    return {row: found[0] for row, found in records.items() if found and "spectra" in found[0]}


def cost_table(definition, results, summaries):
    """What the runs took; interrupted ones are left out of the times."""
    rows = []
    for row in definition.rows:
        records = results.of_row(row, definition.seeds, summaries[row].rate)
        whole = [record for record in records if record["num_attempts"] == 1 and record["wall_s"]]
        if not whole:
            continue
        rows.append([f"`{row}`", f"{max(record['num_tokens'] for record in whole) / 1e6:.3f} M",
                     f"{_mean(record['wall_s'] for record in whole):.0f}",
                     f"{_mean(record['tokens_per_s'] for record in whole):.0f}"])
    return (
        "## Cost\n\nMeans over the runs that were not interrupted: tokens read, seconds from start to end with "
        "evaluations, and the median tokens/s of an update.\n\n"
        + markdown_table(["row", "tokens", "seconds", "tokens/s"], rows)
    )


def troubles(results):
    """Every run that did not end well."""
    bad = [record for record in results.records.values() if record["failure"]]
    if not bad:
        return ""
    rows = [[run_of(record).name, record["outcome"], record["failure"]["message"].replace("|", "/")] for record in bad]
    return "## Runs that did not end well\n\n" + markdown_table(["run", "outcome", "why"], rows)


def conditions(definition, results):
    """What was used, so that it can be done again."""
    records = list(results.records.values())
    if not records:
        return ""
    dates = sorted(record["finished_at"][:10] for record in records)
    tokens = records[0]["text"]
    trainers = [record["trainer"] for record in records if record["trainer"]]
    lines = [
        f"- text: `{tokens['name']}`, SHA-256 `{tokens['sha256']}`; {tokens['train_tokens']} tokens to train on, "
        f"{tokens['valid_tokens']} held out",
        "- command: " + _distinct(f"`{record['command']}`" for record in records)
        + f"; {len(records)} runs from {dates[0]} to {dates[-1]}",
        "- processor: " + _distinct(f"{record['machine']['cpu']} ({record['machine']['num_cpus']} CPUs)"
                                    for record in records),
        "- trainer: " + _distinct(f"{trainer['trainer']}, libtorch {trainer['libtorch']}, device {trainer['device']} "
                                  f"({trainer['cpu_capability']}), {trainer['num_threads']} threads"
                                  for trainer in trainers),
        "- source: " + _distinct(f"commit {record['commit']}" for record in records),
        f"- definition of the rows: `{definition.name}`; the spec of every row, as posted and as the service completed "
        "it: [specs.json](specs.json)",
        "- this report again, without training: `experiments/run --report --results docs/experiments/results.jsonl`",
    ]
    return "## Conditions\n\n" + "\n".join(lines)


def row_specs(definition, results, summaries):
    """For every row the spec of its first counted run, as posted and as completed."""
    specs = {}
    for row in definition.rows:
        records = results.of_row(row, definition.seeds, summaries[row].rate)
        if records:
            specs[row] = {"posted": records[0]["spec"], "completed": records[0]["normalised_spec"]}
    return specs


def rows_of_table(definition, table):
    return [row for row, described in definition.rows.items() if table in described["tables"]]


def ingredients(method):
    """Whether a method has restarts, resets the optimizer, has a jagged rate, and a warm start."""
    has_restarts = method["type"] == "relora"
    return (
        has_restarts,
        has_restarts and method.get("optimizer_reset", {}).get("type", "zero") != "none",
        has_restarts and method.get("restart_schedule", "jagged") == "jagged",
        method.get("warm_start_steps", 0) > 0,
    )


def markdown_table(header, rows):
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def _measured(summary):
    """Mean, std, range and number of seeds; the figures of diverged seeds are left out, and their number is told."""
    if not summary.by_seed:
        return [compare.NOT_RUN, "", "", f"0, {summary.num_failed} failed" if summary.num_failed else "0"]
    notes = [f"{number} {what}" for number, what in
             ((summary.num_diverged, "diverged"), (summary.num_failed, "failed")) if number]
    seeds = ", ".join([str(len(summary.by_seed)), *notes])
    if not summary.finite:
        return ["diverged", "", "", seeds]
    std = "" if summary.std is None else f"{summary.std:.2f}"
    return [_perplexity(_mean(summary.finite)), std, f"{min(summary.finite):.2f}..{max(summary.finite):.2f}", seeds]


def _trained_params(definition, results, row, summary):
    records = results.of_row(row, definition.seeds, summary.rate)
    return f"{_millions(records[0]['num_trained_params'])} M" if records else ""


def _model_params(results):
    """Parameters of the reference model, as `full` trains them; None before it has run."""
    return next((record["num_trained_params"] for record in results.records.values() if record["row"] == "full"), None)


def _millions(number):
    return "?" if number is None else f"{number / 1e6:.2f}"


def _mean(values):
    values = list(values)
    return sum(values) / len(values)


def _rate(rate):
    return "" if rate is None else f"{rate:g}"


def _perplexity(value):
    if math.isnan(value):
        return "?"
    return f"{value:.2f}" if math.isfinite(value) else "diverged"


def _paper_row(paper, row):
    return paper.get(row, [None] * len(paper["columns"]))


def _paper_value(value):
    return "–" if value is None else value if isinstance(value, str) else f"{value:.2f}"


def _distinct(texts):
    return "; ".join(sorted(set(texts)))
