"""Training speed and memory of our trainer beside PyTorch's, in one call. Prints figures, judges none."""

import argparse
import itertools
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

from scripts.local_server import raise_on_signals

from .cases import MODELS, Case
from .rows import Measurements, row_of, table_head, table_line
from .sides import ROOT, SideFailed, measure_torch
from .trainer_side import measure_trainer, write_tokens

TARGET = Path(os.environ.get("CARGO_TARGET_DIR", ROOT / "target")).resolve()
TRAINER = Path(os.environ.get("RELORA_TRAINER", TARGET / "release" / "relora-trainer"))
OUT = TARGET / "bench"

# Timed updates of one measurement.
NUM_STEPS = {"cpu": 5, "cuda": 50}

SIDES = ["ours", "eager_fused", "eager_unfused", "compiled", "library", "products"]
DEFAULT_SIDES = [side for side in SIDES if side != "library"]
MEMORY_ROWS = [
    {"recompute": recompute, "frozen_weights": frozen_weights, "merged_weights": merged_weights}
    for recompute, frozen_weights, merged_weights in [
        ("none", "full", "resident"),
        ("none", "full", "scratch"),
        ("cheap", "full", "auto"),
        ("layers", "full", "auto"),
        ("cheap", "int8", "auto"),
        ("cheap", "nf4", "auto"),
        ("layers", "int8", "scratch"),
        ("layers", "nf4", "scratch"),
    ]
]


def parse_arguments():
    parser = argparse.ArgumentParser(prog="benches/run", description="""Trains models with our trainer and with PyTorch
        in turns, prints a table, and writes its rows to target/bench/train.json, after every row anew.""")
    parser.add_argument("--models", type=names(MODELS), default=["60m", "130m", "350m"],
                        help="of 60m, 130m, 350m and 1b; all but the last, which is for a GPU")
    parser.add_argument("--dtypes", type=names(["fp32", "bf16"]), default=["fp32", "bf16"], help="fp32, bf16; both")
    parser.add_argument("--methods", type=names(["full", "relora"]), default=["full", "relora"],
                        help="full, relora; both")
    parser.add_argument("--dropouts", type=fractions, default=[0.0, 0.1], help="of the low-rank branch; 0,0.1")
    parser.add_argument("--device", choices=["cpu", "cuda"], help="by default the GPU if the trainer finds one")
    parser.add_argument("--seqs", type=positive, default=8, help="sequences per update; 8")
    parser.add_argument("--sequence-length", type=positive, default=256, help="tokens of each; 256")
    parser.add_argument("--micro-batch-seqs", type=positive, help="sequences at once; by default those of the update")
    parser.add_argument("--steps", type=positive, help="timed updates of a measurement; 5, or 50 on a GPU")
    parser.add_argument("--runs", type=positive, default=3, help="measurements of every side, in turns; 3")
    parser.add_argument("--threads", type=positive, default=len(os.sched_getaffinity(0)), help="by default all cores")
    parser.add_argument("--sides", type=names(SIDES), default=DEFAULT_SIDES,
                        help=f"of {', '.join(SIDES)}; all but library")
    parser.add_argument("--memory-rows", action=argparse.BooleanOptionalAction, default=True,
                        help="after each low-rank row without dropout, our trainer alone by settings of the spec's "
                             "memory section; yes")
    arguments = parser.parse_args()
    arguments.device = arguments.device or found_device()
    arguments.steps = arguments.steps or NUM_STEPS[arguments.device]
    arguments.micro_batch_seqs = arguments.micro_batch_seqs or arguments.seqs
    if arguments.sequence_length < 2 or arguments.micro_batch_seqs > arguments.seqs:
        parser.error("--sequence-length must be at least 2, --micro-batch-seqs at most --seqs")
    return arguments


def names(known):
    """Parses a list separated by commas."""
    def parse(text):
        if unknown := [name for name in text.split(",") if name not in known]:
            raise argparse.ArgumentTypeError(f"{unknown[0]!r} is none of {', '.join(known)}")
        return text.split(",")
    return parse


def fractions(text):
    return [float(part) for part in text.split(",")]


def positive(text):
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return value


def found_device():
    probe = subprocess.run([TRAINER, "--probe"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, check=True)
    return json.loads(probe.stdout)["device"]


def cases_of(arguments):
    """Every case and its sides, small models first; dropout belongs to the low-rank branch alone.

    Our trainer is measured alone with settings of its memory section, and on a GPU with deterministic algorithms.
    """
    for model, dtype, method in itertools.product(arguments.models, arguments.dtypes, arguments.methods):
        for dropout in arguments.dropouts if method == "relora" else [0.0]:
            case = Case(model, dtype, method, dropout, arguments.device, arguments.seqs, arguments.sequence_length,
                        arguments.micro_batch_seqs, arguments.steps, arguments.threads)
            yield case, arguments.sides
            if "ours" not in arguments.sides:
                continue
            if case.device == "cuda":
                yield replace(case, deterministic=True), ["ours"]
            if arguments.memory_rows and case.is_low_rank and not case.dropout:
                yield from ((replace(case, memory=memory), ["ours"]) for memory in MEMORY_ROWS)


def measure(case, sides, num_runs):
    """All sides in turns, so that a moment in which the machine is slow slows all of them."""
    measurements = Measurements(case, sides)
    for run, side in itertools.product(range(num_runs), sides):
        if side in measurements.errors:
            continue
        try:
            result = measure_once(side, case)
            measurements.results[side].append(result)
            figures = {name: value for name, value in result.items() if isinstance(value, float | int)}
            progress = ", ".join(f"{name} {value:.4g}" for name, value in figures.items())
        except SideFailed as failure:
            measurements.errors[side] = progress = str(failure)
        print(f"{case}, run {run + 1}, {side}: {progress}", file=sys.stderr, flush=True)
    return measurements


def measure_once(side, case):
    with tempfile.TemporaryDirectory(prefix="work-", dir=OUT) as folder:
        folder = Path(folder)
        data = write_tokens(folder / "data", case)
        if side == "ours":
            return measure_trainer(case, TRAINER, data, folder)
        return measure_torch(side, case, data, folder)


def main():
    raise_on_signals()
    if not TRAINER.exists():
        sys.exit(f"benches/run: {TRAINER} is missing; `make build` makes it")
    arguments = parse_arguments()
    OUT.mkdir(parents=True, exist_ok=True)
    rows, lines = [], [table_head()]
    try:
        for case, sides in cases_of(arguments):
            rows.append(row_of(measure(case, sides, arguments.runs), arguments.runs))
            lines.append(table_line(str(case), rows[-1]))
            (OUT / "train.json").write_text(json.dumps(rows, indent=1) + "\n")
    finally:
        print("\n".join(lines))


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        print("\nbenches/run: stopped; target/bench/train.json has the rows above", file=sys.stderr)
        sys.exit(130)
