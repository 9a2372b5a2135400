"""PostgreSQL restarts, crashes, loses its connections, or is down for long.

`postgres_restart` waits until a worker is in the middle of a claim, a heartbeat or the commit of a node (its transaction
waits at a gate), does the fault then, and wants the job to end once. A fault during heartbeat or commit is shorter than the
lease and must not interrupt the run: one attempt, the same lease epoch.

`postgres_down` stops PostgreSQL for three leases while two jobs run: both go on and neither is restarted.
"""

import re
import signal
import time

from .. import jobs
from ..processes import LEASE_S, until
from ..rows import judged

MOMENTS = ("claim", "heartbeat", "commit")
FAULTS = ("restart", "crash", "terminate")


def run_restart(site, runs, random):
    spec = jobs.tiny(site)
    undisturbed = jobs.reference(site, spec)
    cases = [(moment, fault) for fault in FAULTS for moment in MOMENTS]
    first = random.randrange(len(FAULTS))
    problems, done, outages = [], [], []
    with site.working():
        for i in range(runs):
            moment, fault = cases[(i + first * len(MOMENTS)) % len(cases)]
            done.append(f"{fault} in {moment}")
            job_id = jobs.submit(site, spec) if moment != "claim" else None
            if job_id:
                jobs.wait_for_steps(site, job_id)
                time.sleep(random.uniform(0, 1))
            with site.postgres.gate(moment) as gate:
                job_id = job_id or jobs.submit(site, spec)
                until(gate.is_waited_at, 20, f"a worker is in a {moment}")
                outages.append(hurt(site.postgres, fault))
            problems += [f"{done[-1]}: {problem}" for problem in
                         jobs.problems_of(site, job_id, undisturbed) + repeated(site, job_id, moment)]
    kinds = ", ".join(sorted(set(done)))
    return judged("postgres_restart", runs, problems, f"{kinds}; away for {max(outages):.1f} s at most, lease {LEASE_S} s",
                  cases=done, outages_s=[round(outage, 2) for outage in outages])


def hurt(postgres, fault):
    """Does it, and returns for how long nobody could connect."""
    started = time.monotonic()
    match fault:
        case "terminate":
            postgres.terminate_connections()
        case "restart":
            postgres.stop()
            postgres.start()
        case "crash":
            postgres.stop(signal.SIGQUIT)
            postgres.start()
    return time.monotonic() - started


def repeated(site, job_id, moment):
    """A claim that was broken off may leave nothing, or a lease that runs out; a run must not notice."""
    made = jobs.attempts(site, job_id)
    outcomes = [attempt["outcome"] for attempt in made]
    if moment == "claim" and outcomes in (["succeeded"], ["lease_expired", "succeeded"]):
        return []
    if moment != "claim" and outcomes == ["succeeded"] and jobs.lease_epoch(site, job_id) == 1:
        return []
    return [f"{job_id} had the attempts {outcomes}"]


def run_down(site, runs, random):
    spec = jobs.tiny(site, num_steps=1200)
    undisturbed = jobs.reference(site, spec)
    problems, progress = [], []
    for _ in range(runs):
        with site.working(2) as workers:
            job_ids = [jobs.submit(site, spec) for _ in range(2)]
            for job_id in job_ids:
                jobs.wait_for_steps(site, job_id)
            time.sleep(random.uniform(0, 1))
            site.postgres.stop(random.choice([signal.SIGINT, signal.SIGQUIT]))
            first = [trained_steps(workers, job_id) for job_id in job_ids]
            time.sleep(3 * LEASE_S)
            made = [trained_steps(workers, job_id) - start for job_id, start in zip(job_ids, first)]
            progress += made
            site.postgres.start()
            problems += [f"{job_id} trained {steps} steps meanwhile" for job_id, steps in zip(job_ids, made) if steps == 0]
            for job_id in job_ids:
                problems += jobs.problems_of(site, job_id, undisturbed) + repeated(site, job_id, "down")
    detail = f"2 jobs, down for {3 * LEASE_S} s with a lease of {LEASE_S} s; steps meanwhile: {min(progress)} at least"
    return judged("postgres_down", runs, problems, detail, steps_meanwhile=progress)


def trained_steps(workers, job_id):
    """How far the trainer is, by the nodes that it wrote: what it reports is on its way."""
    folder = next(filter(None, (worker.attempt_folder(job_id, 1) for worker in workers)))
    steps = re.findall(r"node written .*node\.step=(\d+)", (folder / "trainer.log").read_text())
    return max(map(int, steps), default=0)
