"""A worker that is stopped past its lease and continued when another has finished its job.

The zombie must change nothing: the rows of the job are compared, and the objects that nodes name. Objects below the
prefix of its own lease epoch may be there that nobody names.

It is stopped between two writes, in the middle of an upload, or in the middle of the transaction that makes a node
visible.
"""

import hashlib
import os
import signal
import time

from local_server import Failure

from .. import jobs
from ..processes import until
from ..rows import judged

MOMENTS = ("step", "upload", "commit")
TABLES = {
    "jobs": "id = '{job}'", "job_events": "job_id = '{job}'", "job_metrics": "job_id = '{job}'",
    "job_progress": "job_id = '{job}'", "nodes": "job_id = '{job}'",
    "node_files": "node_id in (select id from nodes where job_id = '{job}')",
    "work_items": "id = '{item}'", "leases": "work_item_id = '{item}'", "attempts": "work_item_id = '{item}'",
}
#: What a zombie gets to show itself. It has its heartbeat after a tenth of a lease.
HAUNTING_S = 2.0


def run(site, runs, random):
    spec = jobs.tiny(site)
    undisturbed = jobs.reference(site, spec)
    problems, seconds, orphans = [], [], 0
    for i in range(runs):
        moment = MOMENTS[i % len(MOMENTS)]
        try:
            with site.working(2) as workers:
                found = haunt(site, spec, undisturbed, workers, moment, random)
        except Failure as failure:
            problems.append(f"stopped in {moment}: {failure}")
            continue
        problems += [f"stopped in {moment}: {problem}" for problem in found["problems"]]
        orphans += found["orphans"]
        seconds.append(found["takeover_s"])
    detail = (f"{', '.join(MOMENTS[:runs])}; taken over after {max(seconds, default=0):.1f} s at most, "
              f"lease {site.lease_s} s; {orphans} orphans under the zombies' own epochs")
    return judged("sigstop", runs, problems, detail, takeover_s=[round(s, 2) for s in seconds], orphans=orphans)


def haunt(site, spec, undisturbed, workers, moment, random):
    job_id = jobs.submit(site, spec)
    jobs.wait_for_states(site, job_id)
    zombie = next(worker for worker in workers if worker.trainer_pid())
    epoch = jobs.lease_epoch(site, job_id)
    time.sleep(random.uniform(0, 0.5))
    stopped = stop(site, job_id, zombie, moment, with_trainer=random.random() < 0.5)
    try:
        started = time.monotonic()
        try:
            until(lambda: jobs.lease_epoch(site, job_id) > epoch, 4 * site.lease_s, "another worker claims the job")
        finally:
            takeover_s = time.monotonic() - started
        jobs.wait_for_end(site, job_id)
        rows, objects = dump(site, job_id), stored(site)
    finally:
        for pid in stopped:
            cont(pid)
    time.sleep(HAUNTING_S)
    until(lambda: zombie.trainer_pid() is None, 10, "the zombie's trainer is killed")
    problems = jobs.problems_of(site, job_id, undisturbed)
    after = dump(site, job_id)
    problems += [f"{table} changed" for table in TABLES if after[table] != rows[table]]
    now = stored(site)
    named = {row["object_key"] for row in rows["node_files"]}
    own = f"j/{job_id}/{epoch}/"
    problems += [f"object {key} changed" for key in named if now.get(key) != objects.get(key)]
    strangers = [key for key in now.keys() - objects.keys() if not key.startswith(own)]
    problems += [f"object {key} appeared" for key in strangers]
    if not zombie.is_alive():
        problems.append("the zombie ended")
    orphans = [key for key in now if key.startswith(own) and key not in named and not key.endswith("trainer.log")]
    return {"problems": problems, "orphans": len(orphans), "takeover_s": takeover_s}


def stop(site, job_id, zombie, moment, with_trainer):
    """Stops the worker at the moment, its trainer with it or not; returns what is stopped."""
    pids = [zombie.pid] + ([zombie.trainer_pid()] if with_trainer else [])

    def stop_all():
        for pid in pids:
            os.kill(pid, signal.SIGSTOP)

    match moment:
        case "step":
            stop_all()
        case "upload":
            hold = site.proxy.hold_next(lambda request: request.is_write and request.key.startswith(f"j/{job_id}/"))
            try:
                until(hold.caught.is_set, 20, "a node is uploaded")
                stop_all()
            finally:
                hold.release()
                site.proxy.hold = None
        case "commit":
            with site.postgres.gate("commit") as gate:
                until(gate.is_waited_at, 20, "a node is committed")
                stop_all()
    return pids


def cont(pid):
    try:
        os.kill(pid, signal.SIGCONT)
    except ProcessLookupError:
        pass


def dump(site, job_id):
    """The rows of a job in all tables that a worker writes to."""
    item = site.postgres.value(f"select work_item_id from jobs where id = '{job_id}'")
    queries = {table: f"select * from {table} as r where {where.format(job=job_id, item=item)} order by r::text"
               for table, where in TABLES.items()}
    return {table: site.postgres.query(query) for table, query in queries.items()}


def stored(site):
    """SHA-256 of all objects, by key."""
    return {str(path.relative_to(site.objects)): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in site.objects.rglob("*") if path.is_file()}
