"""Many jobs at once, and workers whose trainers are processes that do nothing; some trainers and some workers die.

Every job finishes exactly once, and the claims spread over the workers. How long a claim takes is computed from the
database alone, which remembers when each transaction was committed (`track_commit_timestamp`):

- A claim is made when the transaction of the job's `claimed` event is committed.
- A job waits from the commit of its `submitted` event, or of a `requeued` event and the delay that it names, until its
  claim.
- A slot is free from the moment when its worker is in `workers`, and from the commit of the event that ended its
  attempt (`succeeded`, `failed` or `requeued`, of that lease epoch), until its next claim. A worker that was killed has
  none from then on: that one moment is the harness's, on the same machine's clock.
- All slots fit all jobs, so of the jobs that wait, in the queue's order (priority, age), the first so many could be
  claimed as slots are free. The latency of a claim is the time since when its job was without a break one of them.
"""

import bisect
import concurrent.futures
import re
import time

from .. import jobs
from ..processes import until
from ..rows import judged

NUM_JOBS, NUM_WORKERS = 500, 20
DYING_TRAINERS_FRAC = 0.1
DYING_WORKERS_FRAC = 0.1
MOST_P99_S = 0.2
#: Of what every worker would have if claims were spread evenly.
LEAST_SHARE_FRAC = 0.3

# Once per attempt, so it is a program that starts at once. The first attempt of a job that is named so kills itself.
TRAINER = """#!/bin/sh
case $1 in --probe)
    echo '{"device": "cpu", "num_gpus": 0, "memory_bytes": null, "bf16_speedup": null, "gpu_problem": null,\
 "numerics": {"device": "none", "cpu_capability": "none", "num_threads": 1, "libtorch": "none", "trainer": "none"}}'
    exit ;;
esac
echo '{"event": "ready", "format_version": 4, "device": "cpu", "step": 0, "num_params": 1,\
 "fingerprint": {"device": "none", "cpu_capability": "none", "num_threads": 1, "libtorch": "none", "trainer": "none",\
 "micro_batch_seqs": 1},\
 "choices": {"micro_batch_seqs": 1, "merged_weights": "resident"}}'
while read -r line; do
    case $line in *'"name": "dies once"'*) case $5 in *-1/out) kill -9 $$ ;; esac ;; esac
done <"$1"
echo '{"event": "done", "step": 1}'
"""


def run(site, runs, random, num_workers=NUM_WORKERS, most_p99_s=MOST_P99_S):
    """`runs` is the number of jobs."""
    trainer = site.folder / "idle-trainer"
    trainer.write_text(TRAINER)
    trainer.chmod(0o755)
    spec = jobs.tiny(site) | {"method": {"type": "full"}, "schedule": {"num_steps": 1, "warmup_steps": 0}}
    dying = [random.random() < DYING_TRAINERS_FRAC for _ in range(runs)]
    specs = [spec | {"name": "dies once" if dies else "does nothing"} for dies in dying]
    began = site.postgres.value("select extract(epoch from clock_timestamp())")
    settings = {"direct": True, "RELORA_TRAINER": str(trainer)}
    with site.working(num_workers, **settings) as workers:
        ready = f"select count(*) from workers where extract(epoch from started_at) > {began}"
        until(lambda: site.postgres.value(ready) == num_workers, 60, "the workers are there")
        time.sleep(0.5)  # each has looked for work once
        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            submitting = [pool.submit(jobs.submit, site, spec) for spec in specs]
            killed = kill_some(site, workers, random, submitting, settings)
            job_ids = [submitted.result() for submitted in submitting]
        until(lambda: unfinished(site, job_ids) == 0, 300, "all jobs end", pause_s=0.2)
        alive = [worker.name for worker in workers]
    problems = once(site, job_ids)
    claims = claims_by_worker(site, job_ids)
    share = len(job_ids) / num_workers
    problems += [f"{name} has {claims.get(name, 0)} of {len(job_ids)} claims" for name in alive
                 if claims.get(name, 0) < LEAST_SHARE_FRAC * share]
    latencies = sorted(claim_latencies(site, job_ids, killed))
    p99 = latencies[min(len(latencies) - 1, int(0.99 * len(latencies)))]
    if p99 > most_p99_s:
        problems.append(f"p99 of a claim is {p99 * 1000:.0f} ms, and {most_p99_s * 1000:.0f} are allowed")
    counts = sorted(claims.values())
    figures = {"claims": len(latencies), "p50_ms": round(latencies[len(latencies) // 2] * 1000, 1),
               "p99_ms": round(p99 * 1000, 1), "max_ms": round(latencies[-1] * 1000, 1), "claims_by_worker": counts,
               "trainers_died": sum(dying), "workers_died": len(killed)}
    detail = (f"{len(job_ids)} jobs, {num_workers} workers; {sum(dying)} trainers and {len(killed)} workers died; "
              f"claim p50 {figures['p50_ms']} ms, p99 {figures['p99_ms']} ms, max {figures['max_ms']} ms; "
              f"claims by worker {counts[0]} to {counts[-1]}")
    return judged("queue", len(job_ids), problems, detail, **figures)


def kill_some(site, workers, random, submitting, settings):
    """Kills some of the workers while they work, and starts others in their place. Returns when, by name."""
    killed = {}
    for _ in range(max(1, int(DYING_WORKERS_FRAC * len(workers)))):
        until(lambda: submitting[len(submitting) // 4].done(), 60, "a quarter of the jobs is submitted")
        time.sleep(random.uniform(0.05, 0.5))
        worker = workers.pop(random.randrange(len(workers)))
        killed[worker.name] = time.time()
        worker.kill()
        site.worker(**settings)
    return killed


def unfinished(site, job_ids):
    return site.postgres.value(f"select count(*) from jobs where finished_at is null and id in ({listed(job_ids)})")


def once(site, job_ids):
    """The jobs that did not end exactly once, and well."""
    rows = site.postgres.query(f"""
        select j.id, j.state,
            (
                select count(*) from attempts a where a.work_item_id = j.work_item_id and a.outcome = 'succeeded'
            ) as attempts,
            (select count(*) from job_events e where e.job_id = j.id and e.type = 'succeeded') as events
        from jobs j where j.id in ({listed(job_ids)})""")
    if len(rows) != len(set(job_ids)):
        return [f"{len(rows)} of {len(job_ids)} jobs are there"]
    return [f"{row['id']} is {row['state']} and succeeded {row['attempts']} times" for row in rows
            if (row["state"], row["attempts"], row["events"]) != ("succeeded", 1, 1)]


def claims_by_worker(site, job_ids):
    rows = site.postgres.query(f"""
        select w.name, count(*) from attempts a join jobs j on j.work_item_id = a.work_item_id
        join workers w on w.id = a.worker_id where j.id in ({listed(job_ids)}) group by 1""")
    return {row["name"]: row["count"] for row in rows}


def claim_latencies(site, job_ids, killed):
    """Seconds from when a job could be claimed until it was, of every claim."""
    rows = site.postgres.query(f"""
        select j.id as job, j.created_at, e.type, e.lease_epoch, e.message, w.name as worker,
            extract(epoch from pg_xact_commit_timestamp(e.xmin)) as at
        from job_events e join jobs j on j.id = e.job_id
        left join attempts a on a.work_item_id = j.work_item_id and a.lease_epoch = e.lease_epoch
        left join workers w on w.id = a.worker_id
        where j.id in ({listed(job_ids)}) and e.type in ('submitted', 'claimed', 'requeued', 'succeeded', 'failed')""")
    started = site.postgres.query("select name, extract(epoch from started_at) as at from workers")
    used = {row["worker"] for row in rows if row["worker"]}
    changes = [(row["at"], "free", row["name"], None) for row in started if row["name"] in used]
    changes += [(at, "gone", name, None) for name, at in killed.items()]
    for row in rows:
        job = row["created_at"], row["job"]
        match row["type"]:
            case "submitted":
                changes.append((row["at"], "waits", None, job))
            case "claimed":
                changes.append((row["at"], "claimed", row["worker"], job))
            case ended:
                changes.append((row["at"], "free", row["worker"], None))
                if ended == "requeued":
                    delay = re.search(r"another attempt in (\S+) s$", row["message"])
                    changes.append((row["at"] + float(delay[1] if delay else 0), "waits", None, job))
    order = ("gone", "free", "waits", "claimed")
    return list(latencies(sorted(changes, key=lambda change: (change[0], order.index(change[1])))))


def latencies(changes):
    """Follows what happened: who was free, which jobs waited in which order, and since when each could be claimed."""
    free, gone, waiting, since = set(), set(), [], {}
    for at, what, worker, job in changes:
        match what:
            case "gone":
                gone.add(worker)
                free.discard(worker)
            case "free" if worker not in gone:
                free.add(worker)
            case "waits":
                bisect.insort(waiting, job)
            case "claimed":
                # A commit may be seen a moment before that of the change that allowed it is finished.
                yield max(0.0, at - since.get(job, at))
                free.discard(worker)
                if job in waiting:
                    waiting.remove(job)
                since.pop(job, None)
        claimable = waiting[:len(free)]
        since = {job: since.get(job, at) for job in claimable}


def listed(ids):
    return ", ".join(f"'{name}'" for name in ids)
