"""Training jobs that are small enough to be disturbed a hundred times, and what must be true of one afterwards."""

import hashlib
import re
import time
import urllib.error
from datetime import datetime

from local_server import Failure

FINAL = ("succeeded", "failed", "cancelled")
KINDS = {"base": "bases", "restart": "restarts", "checkpoint": "checkpoints"}
NUM_SEQS, SEQUENCE_LENGTH = 8, 64
STATE_EVERY_S = 1


def tiny(site, num_steps=480, **changes):
    """A warm start and three cycles, with a state every second. An update takes some milliseconds."""
    return {
        "dataset": site.tokenization["dataset"],
        "tokenization": site.tokenization["id"],
        "model": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2},
        "method": {
            "type": "relora", "rank": 8, "warm_start_steps": num_steps // 4, "restart_every_steps": num_steps // 4,
            "rank_threshold": 0.001,
        },
        "schedule": {"num_steps": num_steps},
        "batch": {"num_seqs": NUM_SEQS, "sequence_length": SEQUENCE_LENGTH},
        "eval": {"every_steps": num_steps // 3, "max_tokens": 2000},
        "checkpoints": {"every_steps": num_steps // 3},
        "state_every_s": STATE_EVERY_S,
    } | changes


def wide(site, num_steps=120):
    """Weights of more than one part (8 MiB) of an upload, from updates that are nearly as quick."""
    return tiny(site, num_steps) | {
        "model": {"hidden_size": 448, "intermediate_size": 1200, "num_hidden_layers": 1, "num_attention_heads": 4},
        "batch": {"num_seqs": 2, "sequence_length": 32},
    }


def submit(site, spec):
    return site.server.post("/v1/jobs", spec)["id"]


def look(site, job_id):
    """The job, or None while the server is away."""
    try:
        return site.server.get(f"/v1/jobs/{job_id}")
    except (OSError, urllib.error.URLError, ValueError):
        return None


def wait(site, job_id, condition, what, timeout_s=120):
    """Returns the job as soon as the condition holds for it; a job that has ended is not waited for."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        job = look(site, job_id)
        if job is not None and condition(job):
            return job
        if job is not None and job["state"] in FINAL:
            break
        time.sleep(0.05)
    raise Failure(f"{what}: it never came to that; {job_id} is {told(job)}")


def wait_for_end(site, job_id, timeout_s=180):
    return wait(site, job_id, lambda job: job["state"] in FINAL, "the job ends", timeout_s)


def wait_for_states(site, job_id, count=1, timeout_s=60):
    """Until so many states were stored."""
    def stored(_):
        return len(events(site, job_id, "state")) >= count

    return wait(site, job_id, stored, f"{count} states are stored", timeout_s)


def wait_for_steps(site, job_id, count=1, timeout_s=60):
    """Until so many more updates were reported than now."""
    first = step(site, job_id)
    return wait(site, job_id, lambda _: step(site, job_id) >= first + count, f"{count} more steps", timeout_s)


def told(job):
    if job is None:
        return "not to be asked for: the server does not answer"
    failure = job["failure"]
    return job["state"] + (f" ({failure['kind']}: {failure['message']})" if failure else "")


def events(site, job_id, kind=None):
    where = f"and type = '{kind}'" if kind else ""
    return site.postgres.query(f"select seq, at, type, lease_epoch, message, data from job_events "
                               f"where job_id = '{job_id}' {where} order by seq")


def step(site, job_id):
    """The last step reported."""
    return site.postgres.value(f"select coalesce(max(step), 0) from job_progress where job_id = '{job_id}'")


def lease_epoch(site, job_id):
    return site.postgres.value(f"select w.lease_epoch from work_items w join jobs j on j.work_item_id = w.id "
                               f"where j.id = '{job_id}'")


def attempts(site, job_id):
    return site.postgres.query(f"select a.* from attempts a join jobs j on j.work_item_id = a.work_item_id "
                               f"where j.id = '{job_id}' order by a.lease_epoch")


def nodes(site, job_id):
    """The bases, restarts and checkpoints of a job, as a user sees them."""
    found = [node for kind in KINDS.values() for node in site.server.pages(f"/v1/{kind}", job=job_id, limit=500)]
    return sorted(found, key=lambda node: (node["kind"], node["step"]))


def weights(site, job_id):
    """SHA-256 of every weight file of the lineage."""
    return {
        (node["kind"], node["step"]): file["sha256"]
        for node in nodes(site, job_id) for file in node["files"] if file["name"].endswith(".safetensors")
    }


def final_weights(site, job_id):
    """SHA-256 of the last checkpoint's model.safetensors."""
    last = max(step for kind, step in weights(site, job_id) if kind == "checkpoint")
    return weights(site, job_id)["checkpoint", last]


class Reference:
    """A run that nobody disturbed."""

    def __init__(self, site, spec):
        with site.working():
            self.job_id = submit(site, spec)
            job = wait_for_end(site, self.job_id)
        if job["state"] != "succeeded":
            raise Failure(f"the undisturbed run: {told(job)}")
        self.weights = weights(site, self.job_id)
        at = {event["type"]: moment(event["at"]) for event in events(site, self.job_id)}
        self.run_s = at["succeeded"] - at["started"]
        self.states = events(site, self.job_id, "state")
        self.upload_s = self._longest_upload_s(site)

    def _longest_upload_s(self, site):
        """From the moment when a state lay on the trainer's disk to its commit, the longest of all states."""
        with site.server.request(f"/v1/jobs/{self.job_id}/logs") as answer:
            log = answer.read().decode()
        written = {int(match[2]): moment(match[1])
                   for match in re.finditer(r'(?m)^(\S+).*node written node.kind="states" node.step=(\d+)', log)}
        return max(moment(state["at"]) - written[state["data"]["step"]] for state in self.states)


def reference(site, spec):
    """The undisturbed run of a spec on this site; made once."""
    key = repr(spec)
    if key not in site.references:
        site.references[key] = Reference(site, spec)
    return site.references[key]


def long_enough(site, spec, least_s):
    """The spec with so many steps that the undisturbed run takes so long here; checkpoints come as often as before."""
    while (run_s := reference(site, spec).run_s) < least_s:
        num_steps = int(spec["schedule"]["num_steps"] * (0.1 + least_s / run_s))
        longer = tiny(site, num_steps - num_steps % 12)
        spec = spec | {"method": longer["method"], "schedule": longer["schedule"]}
    return spec


def moment(text):
    """Seconds since 1970."""
    return datetime.fromisoformat(text.replace("Z", "+00:00")).timestamp()


def problems_of(site, job_id, undisturbed):
    """What is wrong with a job that has gone through something: it must have succeeded, once, with the weights of a run
    that nobody disturbed, and every step must have been reported."""
    job = wait_for_end(site, job_id)
    if job["state"] != "succeeded":
        return [f"{job_id} is {told(job)}"]
    problems = []
    found = weights(site, job_id)
    if found != undisturbed.weights:
        differing = sorted(key for key in found | undisturbed.weights if found.get(key) != undisturbed.weights.get(key))
        problems.append(f"{job_id}: the weights differ from the undisturbed run's at {differing}")
    ends = [attempt for attempt in attempts(site, job_id) if attempt["outcome"] == "succeeded"]
    if len(ends) != 1 or len(events(site, job_id, "succeeded")) != 1:
        problems.append(f"{job_id} succeeded {len(ends)} times")
    num_steps = job["spec"]["schedule"]["num_steps"]
    reported = site.postgres.value(f"select count(distinct step) from job_metrics "
                                   f"where job_id = '{job_id}' and name = 'loss' and step between 1 and {num_steps}")
    if reported != num_steps:
        problems.append(f"{job_id}: {reported} of {num_steps} steps have a loss")
    numbers = [event["seq"] for event in events(site, job_id)]
    if numbers != list(range(1, len(numbers) + 1)):
        problems.append(f"{job_id}: its events have gaps")
    return problems + damaged_files(site, job_id)


def damaged_files(site, job_id):
    """Everything of a visible node is downloaded and must be what is promised; of states, which nobody downloads, the
    objects in the store are read."""
    problems = []
    for node in nodes(site, job_id):
        for file in node["files"]:
            with site.server.request(file["url"]) as answer:
                content = answer.read()
            if len(content) != file["size_bytes"] or hashlib.sha256(content).hexdigest() != file["sha256"]:
                problems.append(f"{node['kind']} after step {node['step']}: {file['name']} is not what it should be")
    return problems + damaged_objects(site, job_id)


def damaged_objects(site, job_id, known=None):
    """Objects that a node names and that are not in the store as it says, whether anybody can reach the store or not.
    Those in `known` are known to be right, and the others that are get in there."""
    files = f"""
        select f.node_id, f.object_key, f.size_bytes, f.sha256
        from node_files f join nodes n on n.id = f.node_id where n.job_id = '{job_id}' order by 1, 2"""
    problems, known = [], set() if known is None else known
    for file in site.postgres.query(files):
        expected = file["object_key"], file["sha256"]
        if expected in known:
            continue
        try:
            is_right = hashlib.sha256((site.objects / file["object_key"]).read_bytes()).hexdigest() == file["sha256"]
            known.add(expected)
        except FileNotFoundError:
            # An old state may have gone since the question.
            is_right = site.postgres.value(f"select count(*) from nodes where id = '{file['node_id']}'") == 0
        if not is_right:
            problems.append(f"{file['object_key']} is missing or damaged, and a node names it")
    return problems
