"""Runs everything that is missing, several runs at a time, and writes each into the results as it ends."""

import hashlib
import os
import time

from scripts.local_server import Failure

from .plan import missing_runs, warm_start_rate
from .record import make_record
from .results import final_loss
from .servers import Lane

POLL_S = 1.0
NICENESS = 10


def train(definition, results, text_path, out, parallel, num_threads):
    """Trains until nothing is missing. May be stopped or killed at any time and called again."""
    os.setpriority(os.PRIO_PROCESS, 0, max(NICENESS, os.getpriority(os.PRIO_PROCESS, 0)))
    text_sha256 = sha256_of(text_path)
    results.check(definition, text_sha256)
    if not missing_runs(definition, results.losses()):
        return
    lanes = [Lane(number, out, num_threads) for number in range(1, parallel + 1)]
    try:
        for lane in lanes:
            lane.start()
            lane.ensure_tokens(text_path, text_sha256, definition.tokenization)
        text = _describe_text(text_path, text_sha256, lanes)
        _take_up(definition, results, lanes)
        _train_missing(definition, results, lanes, text)
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


def _train_missing(definition, results, lanes, text):
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
                record = make_record(definition, lane.run, lane.spec, lane.server, job, text)
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


def sha256_of(path):
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise Failure(f"the text cannot be read: {error}") from error


def _describe_text(path, sha256, lanes):
    """The text and its tokens, which must be the same on every server for the runs to be comparable."""
    first = lanes[0].tokenization
    for lane in lanes:
        if _files(lane.tokenization) != _files(first):
            raise Failure(f"servers 1 and {lane.number} made other tokens of the same text; remove their folders")
    return {"name": path.name, "sha256": sha256, "train_tokens": first["train_tokens"],
            "valid_tokens": first["valid_tokens"]}


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
