"""The pure parts of experiments/: what is trained, in which order, and what is said of it."""

import json
import math
import pathlib
import sys
import types

import numpy as np
import pytest
from safetensors.numpy import save

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
from experiments import compare, plan, record, report, spectra  # noqa: E402
from experiments import definition as definitions  # noqa: E402
from experiments.definition import Run, merge_patch, spec_sha256  # noqa: E402
from experiments.params import num_trained_params  # noqa: E402
from experiments.results import Results  # noqa: E402
from experiments.training import choose  # noqa: E402
from scripts.local_server import Failure  # noqa: E402

TABLE2 = ROOT / "experiments" / "table2.json"
TEXT = {"name": "text.jsonl", "sha256": "aa", "train_tokens": 1000, "valid_tokens": 100}
MODEL = {"hidden_size": 192, "intermediate_size": 512, "num_hidden_layers": 4, "num_attention_heads": 6,
         "num_key_value_heads": 6, "vocab_size": 1024, "tie_word_embeddings": False}


@pytest.fixture
def table2():
    """The definition as it is, but for the rates, which may be chosen anew at any time."""
    rates = {row: {"rates": [5e-4, 1e-3, 2e-3]} for row in ("full", "control")}
    rates |= {row: {"rates": [1e-3, 2e-3, 4e-3]} for row in ("factorized", "lora_warm", "relora", "lora")}
    document = merge_patch(definitions.read(TABLE2).document, {"rows": rates})
    return definitions.Definition("table2.json", document)


def line(definition, run, loss, warm_start_rate=2e-3, **changes):
    """A line of the results file; a loss of infinity is a run that diverged."""
    diverged = math.isinf(loss)
    return {
        "row": run.row, "rate": run.rate, "seed": run.seed, "outcome": "diverged" if diverged else "succeeded",
        "failure": {"kind": "diverged", "message": "the loss is NaN"} if diverged else None,
        "final": None if diverged else {"step": 1000, "loss": loss, "perplexity": math.exp(loss), "num_tokens": 100},
        "eval_loss": [[0, 7.0], [1000, loss]], "restart_steps": [], "num_trained_params": 2_000_000,
        "num_tokens": 1_024_000, "wall_s": 100.0, "num_attempts": 1, "tokens_per_s": 9000.0,
        "spec": definition.spec(run, warm_start_rate), "normalised_spec": {}, "job_id": f"job_{run.name}",
        "text": TEXT, "command": "experiments/run", "machine": {"cpu": "a processor", "num_cpus": 2}, "trainer": None,
        "commit": None, "finished_at": "2026-11-24T00:00:00Z",
    } | changes


def finish_everything(definition, results, loss_of):
    """Plays the runs in the order of the plan; returns that order."""
    done = []
    while missing := plan.missing_runs(definition, results.losses()):
        run = missing[0]
        results.add(line(definition, run, loss_of(run), plan.warm_start_rate(definition, results.losses())))
        done.append(run)
    return done


def smooth_loss(run):
    """Best at the middle of every grid."""
    middle = 1e-3 if run.row in ("full", "control") else 2e-3
    return 4.0 + abs(math.log2(run.rate / middle)) + 0.01 * run.seed


# What is trained.


def test_every_row_is_the_base_with_its_parts(table2):
    relora = table2.spec(Run("relora", 4e-3, 2), warm_start_rate=1e-3)
    assert relora["seed"] == 2
    assert relora["optimizer"] == {"learning_rate": 4e-3, "warm_start_learning_rate": 1e-3}
    assert relora["model"] == table2.document["spec"]["model"]
    assert relora["method"] == {
        "type": "relora", "rank": 16, "scale": 1.0, "dropout": 0.0, "warm_start_steps": 250, "relora_warmup_steps": 20,
        "restart_every_steps": 150, "restart_warmup_steps": 10, "restart_schedule": "jagged",
        "restart_lr": "one_over_w", "optimizer_reset": {"type": "zero", "reset_step_count": True},
    }


def test_the_warm_start_rate_is_said_only_where_there_is_a_warm_start(table2):
    warm = {row for row in table2.rows
            if "warm_start_learning_rate" in table2.spec(Run(row, 1e-3, 1), 2e-3)["optimizer"]}
    assert warm == {"lora_warm", "relora"}


def test_all_rows_train_on_the_same_tokens_and_in_whole_cycles(table2):
    for row in table2.rows:
        spec, base = table2.row_spec(row), table2.document["spec"]
        assert (spec["schedule"], spec["batch"], spec["eval"]) == (base["schedule"], base["batch"], base["eval"])
        method = spec["method"]
        low_rank_steps = spec["schedule"]["num_steps"] - method.get("warm_start_steps", 0)
        if every_steps := method.get("restart_every_steps"):
            assert (low_rank_steps % every_steps, low_rank_steps // every_steps) == (0, 5), row


def test_the_ablation_switches_what_the_papers_table_switches(table2):
    on = {row: report.ingredients(table2.row_spec(row)["method"]) for row in report.rows_of_table(table2, "ablation")}
    assert on == {  # restarts, optimizer reset, jagged rate, warm start
        "full": (False, False, False, False),
        "factorized": (False, False, False, False),
        "lora_warm": (False, False, False, True),
        "relora": (True, True, True, True),
        "lora": (False, False, False, False),
        "restarts": (True, False, False, False),
        "restarts_reset": (True, True, False, False),
        "restarts_jagged": (True, False, True, False),
        "restarts_reset_jagged": (True, True, True, False),
    }


def test_what_the_definition_names_exists(table2):
    rows = set(table2.rows)
    for described in table2.rows.values():
        assert ("rates" in described) != ("rate_of" in described)
        assert described.get("rate_of", "full") in rows and set(described["tables"]) <= table2.document["paper"].keys()
    for wanted in table2.document["orderings"].values():
        assert {row for ordering in wanted for row in ordering.values()} <= rows
    assert set(table2.spectra["rows"]) <= rows and table2.spectra["seed"] in table2.seeds
    assert table2.tuning["seed"] not in table2.seeds and len(table2.seeds) >= 3


def test_patches_merge_objects_and_null_removes():
    assert merge_patch({"a": {"b": 1, "c": 2}, "d": [1]}, {"a": {"b": None, "e": 3}, "d": [2]}) == {
        "a": {"c": 2, "e": 3}, "d": [2]}


def test_a_definition_may_extend_another(tmp_path):
    (tmp_path / "gpu.json").write_text(json.dumps({
        "extends": str(TABLE2), "spec": {"resources": {"device": "cuda"}, "schedule": {"num_steps": 2000}}}))
    extended = definitions.read(tmp_path / "gpu.json")
    spec = extended.row_spec("full")
    assert (spec["resources"]["device"], spec["schedule"]) == ("cuda", {"num_steps": 2000, "warmup_steps": 50})
    assert spec["model"]["hidden_size"] == 192
    with pytest.raises(Failure, match="missing.json"):
        definitions.read(tmp_path / "missing.json")


def test_equal_specs_have_equal_hashes():
    assert spec_sha256({"a": 1, "b": 2}) == spec_sha256({"b": 2, "a": 1}) != spec_sha256({"a": 1, "b": 3})


@pytest.mark.parametrize("method, want", [
    # 2 x 1024 x 192 of embeddings and head, 9 x 192 of norms, 4 x (4 x 192 x 192 + 3 x 192 x 512) of matrices.
    ({"type": "full"}, 393_216 + 1_728 + 1_769_472),
    # 16 x (4 x 384 + 3 x 704) a layer instead of the matrices.
    ({"type": "relora", "rank": 16}, 393_216 + 1_728 + 4 * 58_368),
    ({"type": "factorized", "rank": 16, "train_head": False}, 196_608 + 1_728 + 4 * 58_368),
    # Six of the seven matrices stay as they are.
    ({"type": "lora", "rank": 16, "target_modules": ["q_proj"]}, 393_216 + 1_728 + 1_769_472 + 4 * (6_144 - 36_864)),
    ({"type": "control", "hidden_size": 96, "intermediate_size": 256}, 196_608 + 864 + 442_368),
])
def test_trained_parameters_are_counted(method, want):
    assert num_trained_params({"method": method, "model": MODEL}) == want


# In which order.


def tune(table2, losses):
    return plan.tune(table2, "full", {Run("full", rate, 0): loss for rate, loss in losses.items()})


def test_tuning_tries_the_grid_and_takes_the_best_inside_it(table2):
    assert tune(table2, {1e-3: 4.0}) == ([5e-4, 2e-3], None)
    assert tune(table2, {5e-4: 4.2, 1e-3: 4.0, 2e-3: 4.1}) == ([], 1e-3)


def test_a_best_rate_at_an_end_asks_for_the_next_one_at_most_twice(table2):
    losses = {5e-4: 4.2, 1e-3: 4.1, 2e-3: 4.0}
    assert tune(table2, losses) == ([4e-3], None)
    assert tune(table2, losses | {4e-3: 4.05}) == ([], 2e-3)
    assert tune(table2, losses | {4e-3: 3.9}) == ([8e-3], None)
    assert tune(table2, losses | {4e-3: 3.9, 8e-3: 3.8}) == ([], 8e-3)
    assert tune(table2, {5e-4: 4.0, 1e-3: 4.1, 2e-3: 4.2}) == ([2.5e-4], None)


def test_a_rate_that_diverged_is_never_preferred(table2):
    assert tune(table2, {2.5e-4: 4.1, 5e-4: 4.0, 1e-3: math.inf, 2e-3: math.inf}) == ([], 5e-4)
    assert tune(table2, {5e-4: math.inf, 1e-3: math.inf, 2e-3: math.inf}) == ([2.5e-4], None)


def test_tuning_comes_first_and_then_the_seeds_go_round_the_rows(table2, tmp_path):
    order = finish_everything(table2, Results(tmp_path / "results.jsonl"), smooth_loss)
    methods = ["full", "control", "factorized", "lora_warm", "relora", "lora"]
    assert [run.row for run in order[:18]] == [row for row in methods for _ in range(3)]
    assert {run.seed for run in order[:18]} == {0}
    assert [(run.seed, run.row) for run in order[18:]] == [(seed, row) for seed in (1, 2, 3) for row in table2.rows]
    assert {run.rate for run in order[18:] if run.row in ("full", "control")} == {1e-3}
    assert {run.rate for run in order[18:] if run.row not in ("full", "control")} == {2e-3}
    assert len(set(order)) == len(order)


def test_a_warm_start_waits_until_its_rate_is_known(table2):
    assert {run.row for run in plan.missing_runs(table2, {})} == {"full", "control", "factorized", "lora"}
    tuned = {Run("full", rate, 0): loss for rate, loss in ((5e-4, 4.2), (1e-3, 4.0), (2e-3, 4.1))}
    wanted = plan.missing_runs(table2, tuned)
    assert {"lora_warm", "relora"} <= {run.row for run in wanted}
    assert [run.seed for run in wanted if run.row == "full"] == [1, 2, 3]


def test_an_idle_server_takes_its_own_earlier_job_first_and_never_anothers():
    first, second, third = (Run("full", 1e-3, seed) for seed in (1, 2, 3))
    mine = types.SimpleNamespace(run=None, earlier_jobs={third: "job_3"})
    other = types.SimpleNamespace(run=None, earlier_jobs={first: "job_1"})
    assert choose(mine, [mine, other], [first, second, third]) == third
    mine.earlier_jobs = {}
    assert choose(mine, [mine, other], [first, second, third]) == second
    other.run = second
    assert choose(mine, [mine, other], [first, second]) is None


# Going on from a results file.


def test_what_is_in_the_file_is_not_run_again(table2, tmp_path):
    path = tmp_path / "results.jsonl"
    order = finish_everything(table2, Results(path), smooth_loss)
    lines = path.read_text().splitlines(keepends=True)
    for num_kept in (0, 7, 20, len(order)):
        path.write_text("".join(lines[:num_kept]))
        assert finish_everything(table2, Results(path), smooth_loss) == order[num_kept:]


def test_a_line_that_a_kill_cut_off_is_removed_and_run_again(table2, tmp_path):
    path = tmp_path / "results.jsonl"
    order = finish_everything(table2, Results(path), smooth_loss)
    whole = path.read_bytes()
    path.write_bytes(whole[:-10])
    results = Results(path)
    assert plan.missing_runs(table2, results.losses()) == order[-1:]
    results.add(line(table2, order[-1], smooth_loss(order[-1])))
    assert path.read_bytes() == whole


def test_a_damaged_file_is_refused(tmp_path):
    path = tmp_path / "results.jsonl"
    path.write_text("{\n{}\n")
    with pytest.raises(Failure, match="not a file of results"):
        Results(path)


def test_diverged_runs_are_results_and_failed_ones_can_be_repeated(table2, tmp_path):
    results = Results(tmp_path / "results.jsonl")
    diverged, failed = Run("full", 1e-3, 0), Run("full", 2e-3, 0)
    results.add(line(table2, diverged, math.inf))
    results.add(line(table2, failed, math.inf, outcome="failed"))
    assert not {diverged, failed} & set(plan.missing_runs(table2, results.losses()))
    results.forget_failed()
    missing = plan.missing_runs(table2, results.losses())
    assert failed in missing and diverged not in missing
    # The job that failed is not taken for the repetition.
    assert f"job_{failed.name}" in results.job_ids


def test_runs_of_another_text_or_definition_are_refused(table2, tmp_path):
    results = Results(tmp_path / "results.jsonl")
    finish_everything(table2, results, smooth_loss)
    results.check(table2, TEXT["sha256"])
    with pytest.raises(Failure, match="another text"):
        results.check(table2, "bb")
    other_rank = merge_patch(table2.document, {"parts": {"low_rank": {"method": {"rank": 8}}}})
    with pytest.raises(Failure, match="defined otherwise"):
        results.check(definitions.Definition("other-rank", other_rank), TEXT["sha256"])
    more_seeds = definitions.Definition("more-seeds", merge_patch(table2.document, {"seeds": [1, 2, 3, 4]}))
    results.check(more_seeds, TEXT["sha256"])
    assert {run.seed for run in plan.missing_runs(more_seeds, results.losses())} == {4}


def test_a_job_is_judged_by_its_failure_and_by_its_last_evaluation():
    done = {"state": "succeeded", "failure": None}
    assert record.judge(done, [[0, 7.0], [100, 4.0]]) == ("succeeded", None)
    assert record.judge(done, [[0, 7.0], [100, 7.5]])[0] == "diverged"
    assert record.judge(done, [[0, 7.0], [100, None]])[0] == "diverged"
    for kind, outcome in (("diverged", "diverged"), ("storage", "failed")):
        job = {"state": "failed", "failure": {"kind": kind, "message": "why", "log_tail": "much"}}
        assert record.judge(job, []) == (outcome, {"kind": kind, "message": "why"})


def test_losses_are_thinned_to_means_of_windows():
    points = [[step, float(step)] for step in range(1, 46)]
    assert record.mean_over_windows(points, 20) == [[20, 10.5], [40, 30.5], [60, 43.0]]
    assert record.mean_over_windows([[1, None], [2, 4.0]], 20) == [[20, 4.0]]


# What is said of it.


def summary(*perplexities):
    return compare.Summary(1e-3, dict(enumerate(perplexities, start=1)))


@pytest.mark.parametrize("better, worse, verdict, num_agree", [
    (summary(20.0, 20.2, 20.4), summary(25.0, 25.1, 25.2), "holds, beyond the spread", 3),
    (summary(20.0, 21.0, 22.0), summary(21.5, 21.0, 22.1), "holds, within the spread", 2),
    (summary(25.0, 25.1, 25.2), summary(20.0, 20.2, 20.4), "does not hold, beyond the spread", 0),
    (summary(21.5, 21.0, 22.1), summary(20.0, 21.0, 22.0), "does not hold, within the spread", 0),
    (summary(20.0, 20.2, 20.4), summary(19.0, math.inf, 19.0), "holds, beyond the spread", 1),
    (summary(math.inf, 20.0), summary(19.0, 21.0), "does not hold, beyond the spread", 1),
    (summary(math.inf, math.inf), summary(math.inf, math.inf), "undecided: both diverged", 0),
    (summary(20.0), summary(21.0), "holds; one seed has no spread to compare with", 1),
    (summary(), summary(21.0), "not run yet", 0),
])
def test_an_ordering_is_stated_from_means_and_spread(better, worse, verdict, num_agree):
    found = compare.compare(better, worse)
    assert (found.verdict, found.num_seeds_agree) == (verdict, num_agree)


def test_the_gap_is_set_against_the_larger_spread():
    found = compare.compare(summary(20.0, 20.5), summary(21.0, 23.0))
    assert (found.gap, found.spread) == (1.75, 2.0)


def test_the_papers_pair_is_the_one_of_the_ablations_size(table2):
    paper = table2.document["paper"]["methods"]
    assert report.paper_pair(paper, "relora", "lora_warm") == "25.04 < 25.46 (130M)"
    assert report.paper_pair(paper, "relora", "control") == "17.27 < 21.73 (1.3B)"
    assert report.paper_pair(paper, "relora", "lora") == "–"
    ablation = table2.document["paper"]["ablation"]
    assert report.paper_pair(ablation, "restarts_jagged", "restarts_reset") == "34.29 < diverged (130M)"


def test_the_report_is_made_of_the_results_alone(table2, tmp_path):
    results = Results(tmp_path / "results.jsonl")
    better_first = list(table2.rows)

    def loss(run):
        if run.row == "restarts_reset" and run.seed == 2:
            return math.inf
        return smooth_loss(run) + 0.1 * better_first.index(run.row)

    finish_everything(table2, results, loss)
    report.write_report(table2, Results(results.path), tmp_path)
    text = (tmp_path / "README.md").read_text()
    assert "30 of the 30 runs that count are in it" in text
    assert "| `full` < `relora` | 23.65 < 25.04 (130M) |" in text
    assert "- Does not hold, beyond the spread: `relora` < `lora_warm`" in text
    assert "3, 1 diverged" in text and "| restarts_reset rate 0.002 seed 2 | diverged | the loss is NaN |" in text
    assert "0.0005: " in text and "**0.001: " in text and " | yes |" not in text
    assert set(json.loads((tmp_path / "specs.json").read_text())) == set(table2.rows)


def test_a_report_can_be_made_before_anything_has_run(table2, tmp_path):
    report.write_report(table2, Results(tmp_path / "results.jsonl"), tmp_path)
    text = (tmp_path / "README.md").read_text()
    assert "0 of the 30 runs" in text and "- Not run yet: `full` < `relora`" in text


def test_singular_values_show_the_rank_of_the_change():
    draws = np.random.default_rng(0)
    name = "model.layers.{}.self_attn.q_proj.weight"
    start = {name.format(layer): draws.standard_normal((16, 16)).astype(np.float32) for layer in range(11)}
    start["lm_head.weight"] = np.zeros((4, 16), np.float32)
    end = dict(start)
    for layer in range(11):
        # Layer n changes by a matrix of rank n + 1.
        factors = draws.standard_normal((2, 16, layer + 1))
        end[name.format(layer)] = (start[name.format(layer)] + factors[0] @ factors[1].T).astype(np.float32)
    found = spectra.spectra(save(start), save(end))
    assert [spectra.num_above([values], 1e-4)[0] for values in found["q_proj"]] == list(range(1, 12))
    assert spectra.num_above(found["q_proj"], 1e-4) == (66, 176)
    assert found["up_proj"] == []
    with pytest.raises(ValueError, match="same tensors"):
        spectra.spectra(save(start), save({"other": start["lm_head.weight"]}))


def test_the_services_count_of_singular_values_stands_beside_ours(table2, tmp_path):
    results = Results(tmp_path / "results.jsonl")
    finish_everything(table2, results, smooth_loss)
    run = Run("relora", 2e-3, 1)
    assert table2.spec(run, 1e-3)["method"]["rank_threshold"] == 0.1
    assert "rank_threshold" not in table2.spec(Run("relora", 2e-3, 2), 1e-3)["method"]
    counts = {kind: {"num_above": 7, "num_values": 8} for kind in spectra.KINDS}
    results.add(results.records[run] | {
        "spectra": {kind: [[3.0, 0.2, 0.1, 0.0], [0.5, 0.4, 0.3, 0.0]] for kind in spectra.KINDS},
        "ranks": [{"step": 400, "kinds": {}}, {"step": 1000, "kinds": counts}],
    })
    report.write_report(table2, Results(results.path), tmp_path)
    text = (tmp_path / "README.md").read_text()
    assert "| matrix | `relora` | `relora`, the service's count |" in text
    assert "| q_proj | 5 of 8 | 7 of 8 |" in text


def test_a_rate_that_was_chosen_at_an_end_is_marked(table2, tmp_path):
    results = Results(tmp_path / "results.jsonl")
    finish_everything(table2, results, lambda run: 4.0 - math.log2(run.rate))
    report.write_report(table2, results, tmp_path)
    marked = [line for line in (tmp_path / "README.md").read_text().splitlines() if line.endswith(" | yes |")]
    assert [line.split("`")[1] for line in marked] == ["full", "control", "factorized", "lora_warm", "relora", "lora"]
    assert all("**0.008: " in line or "**0.016: " in line for line in marked)
