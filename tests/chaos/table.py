"""The table: which faults there are, how often each is done, and what came of it."""

import argparse
import dataclasses
import datetime
import json
import os
import pathlib
import platform
import random
import secrets
import sys
import textwrap
import time
import traceback
from collections.abc import Callable

from local_server import RELORA, ROOT, Failure, raise_on_signals

from .faults import big_checkpoint, kill9, postgres, queue, sigstop, stall, store, worker
from .site import Site
from .rows import Row

OUT = ROOT / "target" / "chaos.json"
LOGS = ROOT / "target" / "chaos"


@dataclasses.dataclass(frozen=True)
class Fault:
    run: Callable
    runs: int
    #: What `make test` does of it.
    short_runs: int = 1
    short: dict = dataclasses.field(default_factory=dict)


FAULTS = {
    "kill9": Fault(kill9.run, 100, short_runs=len(kill9.PHASES), short={"min_states": 2, "slack_s": 1.0}),
    "sigstop": Fault(sigstop.run, 9),
    "postgres_restart": Fault(postgres.run_restart, 6),
    "postgres_down": Fault(postgres.run_down, 3, short={"num_jobs": 1, "num_steps": 480}),
    **{name: Fault(store.row(name), 3) for name in store.FAULTS},
    "worker_disk_full": Fault(worker.run_disk_full, 3),
    "worker_oom": Fault(worker.run_oom, 3),
    "worker_abort": Fault(worker.run_abort, 3),
    "queue": Fault(queue.run, queue.NUM_JOBS, short_runs=40, short={"num_workers": 4, "most_p99_s": 1.0}),
    "big_checkpoint": Fault(big_checkpoint.run, 1, short={"upload_bytes": 64 << 20}),
    "stall": Fault(stall.run, 3),
}


def main():
    options = arguments()
    for program in (RELORA, RELORA.with_name("relora-trainer")):
        if not program.exists():
            print(f"{program} is not there: run `make build` first, or name its folder with --bin-dir", file=sys.stderr)
            return 2
    raise_on_signals()
    seed = options.seed if options.seed is not None else secrets.randbits(32)
    print(f"seed {seed}: --seed {seed} repeats which phases are met and which delays are drawn", flush=True)
    rows = []
    for name in options.only:
        runs = options.runs or FAULTS[name].runs
        print(f"{name}: {runs} ...", flush=True)
        started = time.monotonic()
        row = tried(name, runs, seed)
        row.seconds = round(time.monotonic() - started, 1)
        rows.append(row)
        show(row)
        write(seed, rows)
    open_rows = [row.fault for row in rows if not row.held]
    print(f"{len(rows) - len(open_rows)} of {len(rows)} rows hold; {OUT.relative_to(ROOT)} has them", flush=True)
    return 1 if open_rows else 0


def tried(name, runs, seed):
    """A row from a service of its own. What goes wrong in it is a row that does not hold."""
    try:
        with Site(LOGS / name) as site:
            return FAULTS[name].run(site, runs, random.Random(f"{seed} {name}"))
    except Exception as failure:  # the other rows are to be seen as well
        if not isinstance(failure, Failure):
            traceback.print_exc()
        return Row(name, runs, False, f"{type(failure).__name__}: {failure}")


def show(row):
    held = {True: "held", False: "DID NOT HOLD", None: "NOT TRIED"}[row.held]
    lines = textwrap.wrap(row.detail, 96) or [""]
    print(f"{row.fault:<22}{row.runs:>5} {row.seconds:>6.0f} s  {held:<14}{lines[0]}")
    for line in lines[1:]:
        print(f"{'':<52}{line}")
    sys.stdout.flush()


def write(seed, rows):
    """All rows so far, so that a run that is cut short leaves them."""
    document = {
        "seed": seed,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "machine": machine(),
        "rows": [dataclasses.asdict(row) for row in rows],
    }
    unfinished = OUT.with_suffix(".new")
    unfinished.write_text(json.dumps(document, indent=1) + "\n")
    unfinished.rename(OUT)


def machine():
    def line(path, begin):
        text = pathlib.Path(path).read_text()
        return next((line.partition(":")[2].strip() for line in text.splitlines() if line.startswith(begin)), "")

    return {"cpu": line("/proc/cpuinfo", "model name"), "cores": os.cpu_count(),
            "memory": line("/proc/meminfo", "MemTotal"), "kernel": platform.release()}


def arguments():
    parser = argparse.ArgumentParser(prog="tests/chaos/run", description="Proves that the service survives.")
    parser.add_argument("--only", type=chosen, default=[*FAULTS], metavar="ROW,ROW",
                        help="these rows alone; store stands for all that begin with store_: " + ", ".join(FAULTS))
    parser.add_argument("--runs", type=int, help="how often each fault is done; of queue, how many jobs")
    parser.add_argument("--seed", type=int, help="repeats a run")
    parser.add_argument("--bin-dir", help="where relora and relora-trainer are; RELORA_BIN_DIR, else target/release")
    return parser.parse_args()


def chosen(text):
    wanted = text.split(",")
    names = [name for name in FAULTS if any(name == word or name.startswith(f"{word}_") for word in wanted)]
    unknown = [word for word in wanted if not any(name == word or name.startswith(f"{word}_") for name in FAULTS)]
    if unknown:
        raise argparse.ArgumentTypeError(f"there is no row {', '.join(unknown)}; there are {', '.join(FAULTS)}")
    return names
