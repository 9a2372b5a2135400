"""PostgreSQL restarts, crashes, loses its connections, or is down for long.

`postgres_restart` does it three times to one job: when a worker is in the middle of its claim, of a heartbeat, and of
the commit of a node, which wait at gates. The job must end once. Each outage is shorter than the lease, so that nothing
may interrupt the run once it is claimed: one attempt, the same lease epoch.

`postgres_down` stops PostgreSQL for three leases while jobs run: all go on, and none is restarted.
"""

import re
import signal
import time

from .. import jobs
from ..processes import until
from ..rows import judged

MOMENTS = ("claim", "heartbeat", "commit")
FAULTS = ("restart", "crash", "terminate")


def run_restart(site, runs, random):
    spec = jobs.tiny(site)
    undisturbed = jobs.reference(site, spec)
    first = random.randrange(len(FAULTS))
    problems, outages_s = [], []
    for i in range(runs):
        fault = FAULTS[(first + i) % len(FAULTS)]
        with site.working():
            job_id = None
            for moment in MOMENTS:
                if moment != "claim":
                    jobs.wait_for_steps(site, job_id)
                    time.sleep(random.uniform(0, 0.5))
                with site.postgres.gate(moment) as gate:
                    job_id = job_id or jobs.submit(site, spec)
                    until(gate.is_waited_at, 20, f"a worker is in a {moment}")
                    outages_s.append(hurt(site.postgres, fault))
                if moment == "claim":
                    lost = lost_claims(site, job_id)
            found = jobs.problems_of(site, job_id, undisturbed) + interrupted(site, job_id, lost)
            problems += [f"{fault}: {problem}" for problem in found]
            if lost > 1:
                problems.append(f"{fault}: one broken claim left {lost} attempts")
    if max(outages_s) >= site.lease_s:
        problems.append("an outage was longer than the lease, and proves nothing")
    faults = ", ".join(FAULTS[(first + i) % len(FAULTS)] for i in range(min(runs, len(FAULTS))))
    detail = (f"{faults} in each of {', '.join(MOMENTS)}; away for {max(outages_s):.1f} s at most, "
              f"lease {site.lease_s} s")
    return judged("postgres_restart", runs * len(MOMENTS), problems, detail, outages_s=[round(s, 2) for s in outages_s])


def hurt(postgres, fault):
    """Does it, and returns for how long nobody could connect."""
    started = time.monotonic()
    match fault:
        case "terminate":
            postgres.terminate_connections()
        case "restart":
            with postgres.away(signal.SIGINT):
                pass
        case "crash":
            with postgres.away(signal.SIGQUIT):
                pass
    return time.monotonic() - started


def lost_claims(site, job_id):
    """A claim that is broken off is made again. If it was committed after all, and only the answer was lost, its lease
    has to run out before."""
    jobs.wait_for_steps(site, job_id)
    return len(jobs.attempts(site, job_id)) - 1


def interrupted(site, job_id, num_lost_claims=0):
    """What is wrong with a job that should have had one attempt after the claims that were lost."""
    outcomes = [attempt["outcome"] for attempt in jobs.attempts(site, job_id)]
    expected = ["lease_expired"] * num_lost_claims + ["succeeded"]
    is_right = outcomes == expected and jobs.lease_epoch(site, job_id) == len(expected)
    return [] if is_right else [f"{job_id} had the attempts {outcomes}"]


def run_down(site, runs, random, num_jobs=2, num_steps=1200):
    spec = jobs.tiny(site, num_steps)
    undisturbed = jobs.reference(site, spec)
    problems, progress = [], []
    for _ in range(runs):
        with site.working(num_jobs) as workers:
            job_ids = [jobs.submit(site, spec) for _ in range(num_jobs)]
            for job_id in job_ids:
                jobs.wait_for_steps(site, job_id)
            time.sleep(random.uniform(0, 1))
            with site.postgres.away(random.choice([signal.SIGINT, signal.SIGQUIT])):
                first = [trained_steps(workers, job_id) for job_id in job_ids]
                time.sleep(3 * site.lease_s)
                made = [trained_steps(workers, job_id) - start for job_id, start in zip(job_ids, first)]
            progress += made
            problems += [f"{job_id} stood still meanwhile" for job_id, steps in zip(job_ids, made) if steps == 0]
            for job_id in job_ids:
                problems += jobs.problems_of(site, job_id, undisturbed) + interrupted(site, job_id)
    detail = (f"{num_jobs} jobs, down for {3 * site.lease_s} s with a lease of {site.lease_s} s; "
              f"steps meanwhile: {min(progress)} at least")
    return judged("postgres_down", runs, problems, detail, steps_meanwhile=progress)


def trained_steps(workers, job_id):
    """How far the trainer is, by the nodes that it wrote: what it reports is on its way."""
    folder = next(filter(None, (worker.attempt_folder(job_id, 1) for worker in workers)))
    steps = re.findall(r"node written .*node\.step=(\d+)", (folder / "trainer.log").read_text())
    return max(map(int, steps), default=0)
