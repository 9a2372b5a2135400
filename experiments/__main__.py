"""The command line of experiments/run."""

import argparse
import fcntl
import pathlib
import shutil
import sys

from scripts.local_server import ROOT, Failure, raise_on_signals

from . import definition as definitions
from .plots import write_plots
from .report import write_report
from .results import Results
from .training import train

RESULTS = "results.jsonl"


def parse_arguments():
    parser = argparse.ArgumentParser(prog="experiments/run", description="""Trains every row of a definition at tuned
        rates and several seeds, through servers of its own. It may be stopped or killed at any time: started again,
        it goes on. With --report it trains nothing and writes tables and plots from the results file.""")
    parser.add_argument("--text", type=pathlib.Path,
                        help="text to train on: a file, or JSON lines with a \"text\" each")
    parser.add_argument("--config", type=pathlib.Path, default=ROOT / "experiments" / "table2.json",
                        help="what is trained; by default experiments/table2.json")
    parser.add_argument("--out", type=pathlib.Path, help="folder of servers and results; by default below target/")
    parser.add_argument("--parallel", type=int, default=2, help="runs at a time, each on a server; by default 2")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of each run; by default 1")
    parser.add_argument("--retry-failed", action="store_true", help="repeat what failed, but not what diverged")
    parser.add_argument("--report", action="store_true", help="only write the report")
    parser.add_argument("--results", type=pathlib.Path, help="for --report: a results file; by default that of --out, "
                        "or else the one beside the report")
    parser.add_argument("--docs", type=pathlib.Path, help="folder of the report; by default docs/experiments with "
                        "--report, else the folder report in --out")
    arguments = parser.parse_args()
    if not arguments.report and not arguments.text:
        parser.error("--text is needed, or --report")
    if arguments.parallel < 1 or arguments.threads < 1:
        parser.error("--parallel and --threads must be at least 1")
    arguments.out = arguments.out or ROOT / "target" / "experiments" / arguments.config.stem
    return arguments


def report(definition, results_path, docs):
    """Writes the report with a copy of the results, from which it can be made again."""
    if not results_path.exists():
        raise Failure(f"there is no results file {results_path}: train first, or name one with --results")
    docs.mkdir(parents=True, exist_ok=True)
    results = Results(results_path)
    write_plots(definition, results, docs)
    write_report(definition, results, docs)
    copy = docs / RESULTS
    if not (copy.exists() and copy.samefile(results_path)):
        shutil.copyfile(results_path, copy)
    print(f"wrote {docs / 'README.md'}")


def only_report(arguments, definition):
    docs = arguments.docs or ROOT / "docs" / "experiments"
    results_path = arguments.results or arguments.out / RESULTS
    if arguments.results is None and not results_path.exists():
        results_path = docs / RESULTS
    report(definition, results_path, docs)


def train_and_report(arguments, definition):
    arguments.out.mkdir(parents=True, exist_ok=True)
    with open(arguments.out / "lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise Failure(f"another experiments/run works in {arguments.out}") from None
        results = Results(arguments.out / RESULTS)
        if arguments.retry_failed:
            results.forget_failed()
        train(definition, results, arguments)
    report(definition, results.path, arguments.docs or arguments.out / "report")
    if failed := results.failed():
        names = ", ".join(f"{record['row']} rate {record['rate']:g} seed {record['seed']}" for record in failed)
        raise Failure(f"{len(failed)} runs failed, which says nothing of the method: {names}; "
                      "--retry-failed repeats them")


def main():
    raise_on_signals()
    arguments = parse_arguments()
    definition = definitions.read(arguments.config)
    if arguments.report:
        only_report(arguments, definition)
    else:
        train_and_report(arguments, definition)


if __name__ == "__main__":
    try:
        main()
    except (Failure, OSError) as failure:
        sys.exit(f"experiments/run: {failure}")
    except KeyboardInterrupt:
        print("\nexperiments/run: stopped; the same command goes on", file=sys.stderr)
        sys.exit(130)
