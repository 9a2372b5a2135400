"""Runs everything that is missing, several runs at a time, and writes each into the results as it ends."""

import os
import time

from scripts.local_server import Failure

from .conditions import command_line, conditions, sha256_of
from .plan import missing_runs, warm_start_rate
from .record import make_record
from .results import final_loss
from .servers import Lane

POLL_S = 1.0
NICENESS = 10


def train(definition, results, arguments):
    """Trains until nothing is missing. May be stopped or killed at any time and called again."""
    text_path = arguments.text
    os.setpriority(os.PRIO_PROCESS, 0, max(NICENESS, os.getpriority(os.PRIO_PROCESS, 0)))
    text_sha256 = sha256_of(text_path)
    results.check(definition, text_sha256)
    if not missing_runs(definition, results.losses()):
        return
    lanes = [Lane(number, arguments.out, arguments.threads) for number in range(1, arguments.parallel + 1)]
    try:
        for lane in lanes:
            lane.start()
            lane.ensure_tokens(text_path, text_sha256, definition.tokenization)
        made_with = conditions(text_path, text_sha256, _same_tokens(lanes), command_line(arguments))
        _take_up(definition, results, lanes)
        _train_missing(definition, results, lanes, made_with)
    except Exception:
        for lane in lanes:
            lane.server.print_log_end()
        raise
    finally:
        _close_all(lanes)


def _take_up(definition, results, lanes):
    """Finds what earlier starts submitted."""
    losses = results.losses()
    wanted = {run: definition.spec(run, warm_start_rate(definition, losses))
              for run in missing_runs(definition, losses)}
    for lane in lanes:
        lane.adopt(wanted, results.job_ids)


def _train_missing(definition, results, lanes, made_with):
    while True:
        losses = results.losses()
        for lane in lanes:
            if lane.run is None and (run := choose(lane, lanes, missing_runs(definition, losses))):
                how = lane.begin(run, definition.spec(run, warm_start_rate(definition, losses)))
                print(f"server {lane.number}: {run.name}: {how} as {lane.job_id}", flush=True)
        if all(lane.run is None for lane in lanes):
            return
        for lane in lanes:
            if lane.run is not None and (job := lane.finished_job()):
                record = make_record(definition, lane, job, made_with)
                results.add(record)
                print(f"server {lane.number}: {lane.run.name}: {_describe(record)}; "
                      f"{len(results.records)} runs done", flush=True)
                lane.end()
        time.sleep(POLL_S)


def choose(lane, lanes, missing):
    """The next run of an idle lane: its own earlier job first, then what no other lane has or had."""
    taken = {other.run for other in lanes} | {run for other in lanes for run in other.earlier_jobs if other is not lane}
    free = [run for run in missing if run not in taken]
    return next((run for run in free if run in lane.earlier_jobs), free[0] if free else None)


def _same_tokens(lanes):
    """The tokenization, which must be the same on every server for the runs to be comparable."""
    for lane in lanes:
        if _files(lane.tokenization) != _files(lanes[0].tokenization):
            raise Failure(f"servers 1 and {lane.number} made other tokens of the same text; remove their folders")
    return lanes[0].tokenization


def _files(tokenization):
    return {file["name"]: file["sha256"] for file in tokenization["files"]}


def _describe(record):
    if record["failure"]:
        return f"{record['outcome']}: {record['failure']['message']}"
    return f"loss {final_loss(record):.4f}, perplexity {record['final']['perplexity']:.2f}, {record['wall_s']:.0f} s"


def _close_all(lanes):
    """Every server is stopped, whatever becomes of another; then the first failure is told."""
    failures = []
    for lane in lanes:
        try:
            lane.close()
        except Failure as failure:
            failures.append(failure)
    if failures:
        raise failures[0]
