"""The store is away, slow, or answers nonsense, for longer than there is between two checkpoints.

Training goes on meanwhile, later nodes arrive, and at no time is a node visible whose files are not in the store as the
node says. Where an answer can be cut or lost, the trainer is killed once, so that the next attempt stages its files
through the fault as well.
"""

import dataclasses
import os
import signal
import time

from .. import jobs
from ..rows import judged

#: At least; then until there were as many steps as between two checkpoints, for so long at most.
FAULT_S, MOST_FAULT_S = 6.0, 60.0
FAULTS = {
    "store_down": None,
    "store_slow": {"delay_s": 0.3, "bytes_per_s": 4e6},
    "store_errors": {"error_frac": 0.5},
    "store_resets": {"reset_frac": 0.3},
    "store_truncated": {"truncated_frac": 0.3},
    "store_complete_error": {"complete_error_frac": 1.0},
}
STAGES_THROUGH = ("store_errors", "store_resets", "store_truncated")


def row(fault):
    """The function of one row: a job for every run."""
    def run(site, runs, random):
        spec = jobs.long_enough(site, jobs.wide(site), 3 * FAULT_S)
        undisturbed = jobs.reference(site, spec)
        problems, seen = [], Seen()
        for _ in range(runs):
            with site.working() as [worker]:
                job_id = jobs.submit(site, spec)
                jobs.wait_for_states(site, job_id)
                time.sleep(random.uniform(0, 0.5))
                problems += disturb(site, job_id, worker, fault, FAULT_S, spec["checkpoints"]["every_steps"], seen)
                problems += nodes_after(site, job_id, seen) + jobs.problems_of(site, job_id, undisturbed)
                attempts = [attempt["outcome"] for attempt in jobs.attempts(site, job_id)]
                if fault not in STAGES_THROUGH and attempts != ["succeeded"]:
                    problems.append(f"{job_id} had the attempts {attempts}")
        detail = (f"{FAULT_S:.0f} s at least; {seen.harmed} requests harmed; steps meanwhile: {min(seen.steps)} "
                  f"at least; nodes after it: {min(seen.nodes_after)} at least")
        return judged(fault, runs, problems, detail, **dataclasses.asdict(seen))

    return run


def run_short(site, runs, random, fault_s=0.5):
    """One fault after another, on as few jobs as that takes."""
    spec = jobs.wide(site)
    undisturbed = jobs.reference(site, spec)
    problems, seen, job_ids = [], Seen(), []
    for _ in range(runs):
        with site.working() as [worker]:
            for fault in FAULTS:
                if not job_ids or jobs.step(site, job_ids[-1]) > spec["schedule"]["num_steps"] // 2:
                    job_ids.append(jobs.submit(site, spec))
                jobs.wait_for_states(site, job_ids[-1])
                found = disturb(site, job_ids[-1], worker, fault, fault_s, 1, seen)
                problems += [f"{fault}: {problem}" for problem in found]
            for job_id in job_ids:
                problems += jobs.problems_of(site, job_id, undisturbed)
    detail = f"{', '.join(FAULTS)}, {fault_s} s each at least; {seen.harmed} requests harmed; {len(job_ids)} jobs"
    return judged("store", runs * len(FAULTS), problems, detail, **dataclasses.asdict(seen))


@dataclasses.dataclass
class Seen:
    harmed: int = 0
    #: During each fault, and nodes after it.
    steps: list = dataclasses.field(default_factory=list)
    nodes_after: list = dataclasses.field(default_factory=list)


def disturb(site, job_id, worker, fault, fault_s, least_steps, seen):
    """Does it until it has lasted long enough, and the job has gone on meanwhile."""
    problems, known = [], set()
    first, made, harm = jobs.step(site, job_id), 0, FAULTS[fault]
    counts = harm is not None and "delay_s" not in harm
    with site.proxy.away() if harm is None else site.proxy.harming(**harm) as harmed:
        began = time.monotonic()
        if fault in STAGES_THROUGH and (pid := worker.trainer_pid()):
            os.kill(pid, signal.SIGKILL)
        while (passed_s := time.monotonic() - began) < fault_s or (
            (made < least_steps or counts and not harmed) and passed_s < MOST_FAULT_S
        ):
            problems += jobs.damaged_objects(site, job_id, known)
            time.sleep(fault_s / 4)
            made = jobs.step(site, job_id) - first
    seen.harmed += sum(harmed.values()) if harmed else 0
    seen.steps.append(made)
    if made < least_steps:
        problems.append(f"{job_id} did {made} steps within {passed_s:.0f} s, and {least_steps} are wanted")
    if counts and not harmed:
        problems.append("no request was harmed")
    return problems


def nodes_after(site, job_id, seen):
    """What is stored once the fault is over. There must be something: that is what the fault kept from going on."""
    last_seq = max(event["seq"] for event in jobs.events(site, job_id))
    jobs.wait_for_end(site, job_id)
    after = [event for event in jobs.events(site, job_id)
             if event["seq"] > last_seq and event["type"] in ("checkpoint", "restart", "state")]
    seen.nodes_after.append(len(after))
    return [] if after else [f"{job_id} stored nothing after the fault"]
