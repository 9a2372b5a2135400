"""How long the training stands still for a checkpoint, beside a plain copy of the same bytes."""

import statistics
import time

from .. import jobs
from ..rows import judged

COPIES = 20


def run(site, runs, random):
    spec = jobs.wide(site)
    stalls, ratios, num_nodes = [], [], 0
    for _ in range(runs):
        with site.working():
            job_id = jobs.submit(site, spec)
            job = jobs.wait_for_end(site, job_id)
        if job["state"] != "succeeded":
            return judged("stall", runs, [f"{job_id} is {jobs.told(job)}"], "")
        for node in stalled(site, job_id):
            num_nodes += 1
            stalls.append(node["stall_ms"])
            ratios.append(node["stall_ms"] / copy_ms(node["size_bytes"]))
    problems = [] if stalls else ["no node says how long it stalled the training"]
    figures = {"median_ms": statistics.median(stalls), "max_ms": max(stalls), "nodes": num_nodes,
               "median_over_copy": round(statistics.median(ratios), 2), "max_over_copy": round(max(ratios), 2)}
    detail = (f"{num_nodes} nodes: median {figures['median_ms']:.0f} ms, max {figures['max_ms']:.0f} ms; over a plain copy of "
              f"the same bytes: median {figures['median_over_copy']}, max {figures['max_over_copy']}")
    return judged("stall", runs, problems, detail, **figures)


def stalled(site, job_id):
    """The stall of every node, and the bytes of a node of its kind: of a state without the frozen weights, which are
    copied once in a cycle."""
    return site.postgres.query(f"""
        select (e.data ->> 'stall_ms')::double precision as stall_ms, sizes.size_bytes
        from job_events e join (
            select n.kind, max(n.size_bytes) as size_bytes from (
                select n.kind, n.id, sum(f.size_bytes)::bigint as size_bytes
                from nodes n join node_files f on f.node_id = n.id
                where n.job_id = '{job_id}' and f.name not in ('frozen.safetensors', 'start.safetensors')
                group by 1, 2) n
            group by 1) sizes on sizes.kind = e.type
        where e.job_id = '{job_id}'""")


def copy_ms(num_bytes):
    """The time of a copy in memory, into pages that are new each time as a checkpoint's are."""
    source = b"\1" * num_bytes
    times = []
    for _ in range(COPIES):
        started = time.perf_counter()
        bytearray(source)
        times.append(time.perf_counter() - started)
    return max(0.001, 1000 * statistics.median(times))
