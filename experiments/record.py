"""What is kept of a finished run: read from the API, thinned to what tables and plots need."""

import datetime
import math
import statistics

from scripts.local_server import Failure

from .params import num_trained_params
from .results import DIVERGED, FAILED, SUCCEEDED
from .spectra import spectra

LOSS_EVERY_STEPS = 20
RATE_EVERY_STEPS = 5
WEIGHTS = "model.safetensors"


def make_record(definition, lane, job, conditions):
    """The line of the results file for a job that has come to its end; `conditions` are added as they are."""
    run, server = lane.run, lane.server
    metrics = _metrics(server, job["id"])
    events = server.events(job["id"])
    evals = metrics.get("eval_loss", [])
    outcome, failure = judge(job, evals)
    record = {
        "row": run.row, "rate": run.rate, "seed": run.seed, "outcome": outcome, "failure": failure,
        "final": _final(events),
        "eval_loss": evals,
        "loss": mean_over_windows(metrics.get("loss", []), LOSS_EVERY_STEPS),
        "learning_rate": [point for point in metrics.get("learning_rate", []) if point[0] % RATE_EVERY_STEPS == 1],
        "restart_steps": sorted({event["data"]["step"] for event in events if event["type"] == "restart"}),
        "num_trained_params": num_trained_params(job["spec"]),
        "num_tokens": job["progress"]["num_tokens"],
        "wall_s": _seconds_between(job["started_at"], job["finished_at"]),
        "num_attempts": job["lease_epoch"],
        "tokens_per_s": _median(metrics.get("tokens_per_s", [])),
        "spec": lane.spec,
        "normalised_spec": {key: job["spec"][key] for key in job["spec"] if key not in ("dataset", "tokenization")},
        "job_id": job["id"],
        "trainer": next((event["data"]["fingerprint"] for event in events if event["type"] == "started"), None),
        "finished_at": job["finished_at"],
    } | conditions
    if outcome == SUCCEEDED and definition.needs_spectra(run):
        record["spectra"] = _spectra(server, job["id"], definition.spectra["start_step"])
        record["ranks"] = [event["data"] for event in events if event["type"] == "ranks"]
    return record


def judge(job, evals):
    """How a run ended, and why if not well. One that ends worse than it began has diverged, too."""
    if job["state"] == "succeeded":
        final, first = evals[-1][1], evals[0][1]
        if final is not None and final <= first:
            return SUCCEEDED, None
        return DIVERGED, {"kind": "diverged", "message": f"validation loss {final} after {first} at the start"}
    failure = job["failure"] or {"kind": job["state"], "message": f"the job was {job['state']}"}
    failure = {"kind": failure["kind"], "message": failure["message"]}
    return (DIVERGED if failure["kind"] == "diverged" else FAILED), failure


def mean_over_windows(points, num_steps):
    """Means over windows of steps, each at its window's last step."""
    windows = {}
    for step, value in points:
        if value is None:
            continue
        windows.setdefault(math.ceil(step / num_steps) * num_steps, []).append(value)
    return [[step, round(statistics.fmean(values), 5)] for step, values in sorted(windows.items())]


def _metrics(server, job_id):
    """Every value of a job by name, as [step, value] in order; the value is None where it was not finite."""
    metrics = {}
    for metric in server.pages(f"/v1/jobs/{job_id}/metrics", limit=10_000):
        value = metric["value"]
        metrics.setdefault(metric["name"], []).append([metric["step"], value and float(f"{value:.6g}")])
    return metrics


def _final(events):
    """The last evaluation, in full precision."""
    evals = [event["data"] for event in events if event["type"] == "eval"]
    return max(evals, key=lambda data: data["step"], default=None)


def _spectra(server, job_id, start_step):
    """Singular values of the change between the full weights at a step and the last ones."""
    nodes = [(node["step"], f"/v1/{kind}/{node['id']}/files/{WEIGHTS}")
             for kind in ("bases", "checkpoints")
             for node in server.pages(f"/v1/{kind}", job=job_id, limit=500)]
    starts = [path for step, path in nodes if step == start_step]
    if not starts:
        raise Failure(f"{job_id} has no full weights after step {start_step}; let checkpoints.every_steps divide it")
    _, end = max(nodes)
    return spectra(*(server.request(path).read() for path in (starts[0], end)))


def _seconds_between(begin, end):
    if begin is None or end is None:
        return None
    begin, end = (datetime.datetime.fromisoformat(at.replace("Z", "+00:00")) for at in (begin, end))
    return round((end - begin).total_seconds(), 1)


def _median(points):
    values = [value for _, value in points if value is not None]
    return round(statistics.median(values), 1) if values else None
