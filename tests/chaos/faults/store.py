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

FAULT_S = 6.0
#: Steps between two checkpoints of `wide` are a third of the run; the fault outlasts them.
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
    def run(site, runs, random, fault_s=FAULT_S):
        spec = jobs.wide(site)
        undisturbed = jobs.reference(site, spec)
        problems, figures = [], {"harmed": 0, "steps_meanwhile": [], "nodes_after": []}
        for _ in range(runs):
            with site.working() as [worker]:
                problems += disturb(site, spec, undisturbed, worker, fault, fault_s, random, figures)
        detail = (f"{fault_s:.0f} s; {figures['harmed']} requests harmed; steps meanwhile: "
                  f"{min(figures['steps_meanwhile'])} at least; nodes after it: {min(figures['nodes_after'])} at least")
        return judged(fault, runs, problems, detail, **figures)

    run.__name__ = fault
    return run


def disturb(site, spec, undisturbed, worker, fault, fault_s, random, figures):
    job_id = jobs.submit(site, spec)
    jobs.wait_for_states(site, job_id)
    time.sleep(random.uniform(0, 0.5))
    problems = []
    first = jobs.step(site, job_id)
    harm = FAULTS[fault]
    with site.proxy.away() if harm is None else site.proxy.harming(**harm) as harmed:
        ends = time.monotonic() + fault_s
        if fault in STAGES_THROUGH and (pid := worker.trainer_pid()):
            os.kill(pid, signal.SIGKILL)
        while time.monotonic() < ends:
            problems += jobs.damaged_objects(site, job_id)
            time.sleep(0.2)
        made = jobs.step(site, job_id) - first
        last_seq = max(event["seq"] for event in jobs.events(site, job_id))
    problems += jobs.problems_of(site, job_id, undisturbed)
    after = [event for event in jobs.events(site, job_id)
             if event["seq"] > last_seq and event["type"] in ("checkpoint", "restart", "state")]
    attempts = [attempt["outcome"] for attempt in jobs.attempts(site, job_id)]
    figures["harmed"] += sum(harmed.values()) if harmed else 0
    figures["steps_meanwhile"].append(made)
    figures["nodes_after"].append(len(after))
    if made <= 0:
        problems.append(f"{job_id} made no step meanwhile")
    if not after:
        problems.append(f"{job_id} stored nothing after the fault")
    if fault not in STAGES_THROUGH and attempts != ["succeeded"]:
        problems.append(f"{job_id} had the attempts {attempts}")
    if harm is not None and not harmed and "delay_s" not in harm:
        problems.append("no request was harmed")
    return problems
