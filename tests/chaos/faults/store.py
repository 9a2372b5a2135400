"""The store is away, slow, or answers nonsense, for longer than there is between two checkpoints.

Training goes on meanwhile, later nodes arrive, and at no time is a node visible whose files are not in the store as the
node says. Where an answer can be cut or lost, the trainer is killed once, so that the next attempt stages its files
through the fault as well.
"""

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
    """The function of one row."""
    def run(site, runs, random):
        return run_all(site, runs, random, (fault,), FAULT_S, fault)

    return run


def run_all(site, runs, random, faults=tuple(FAULTS), fault_s=1.0, name="store"):
    """Jobs that go through one fault after another."""
    spec = jobs.wide(site, num_steps=120 if len(faults) == 1 else 240)
    undisturbed = jobs.reference(site, spec)
    problems, seen = [], {"harmed": 0, "steps_meanwhile": [], "nodes_after": []}
    for _ in range(runs):
        with site.working() as [worker]:
            job_id = jobs.submit(site, spec)
            jobs.wait_for_states(site, job_id)
            for fault in faults:
                time.sleep(random.uniform(0, 0.5))
                problems += [f"{fault}: {problem}" for problem in disturb(site, job_id, worker, fault, fault_s, seen)]
            last_seq = max(event["seq"] for event in jobs.events(site, job_id))
            problems += jobs.problems_of(site, job_id, undisturbed)
            after = [event for event in jobs.events(site, job_id)
                     if event["seq"] > last_seq and event["type"] in ("checkpoint", "restart", "state")]
            seen["nodes_after"].append(len(after))
            if not after:
                problems.append(f"{job_id} stored nothing after the fault")
            attempts = [attempt["outcome"] for attempt in jobs.attempts(site, job_id)]
            if not set(faults) & set(STAGES_THROUGH) and attempts != ["succeeded"]:
                problems.append(f"{job_id} had the attempts {attempts}")
    detail = (f"{fault_s:.0f} s at least; {seen['harmed']} requests harmed; steps meanwhile: "
              f"{min(seen['steps_meanwhile'])} at least; nodes after it: {min(seen['nodes_after'])} at least")
    return judged(name, runs * len(faults), problems, detail, **seen)


def disturb(site, job_id, worker, fault, fault_s, seen):
    problems, known = [], set()
    job = site.server.get(f"/v1/jobs/{job_id}")
    interval = job["spec"]["checkpoints"]["every_steps"] if fault_s == FAULT_S else 1
    first, made, harm = jobs.step(site, job_id), 0, FAULTS[fault]
    with site.proxy.away() if harm is None else site.proxy.harming(**harm) as harmed:
        began = time.monotonic()
        if fault in STAGES_THROUGH and (pid := worker.trainer_pid()):
            os.kill(pid, signal.SIGKILL)
        while (passed_s := time.monotonic() - began) < fault_s or (made < interval and passed_s < MOST_FAULT_S):
            problems += jobs.damaged_objects(site, job_id, known)
            time.sleep(0.5)
            made = jobs.step(site, job_id) - first
    seen["harmed"] += sum(harmed.values()) if harmed else 0
    seen["steps_meanwhile"].append(made)
    if made < interval:
        problems.append(f"{made} steps within {passed_s:.0f} s, and {interval} are wanted")
    if harm is not None and not harmed and "delay_s" not in harm:
        problems.append("no request was harmed")
    return problems
