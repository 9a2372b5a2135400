"""How long the training stands still for a checkpoint, beside a plain copy of the same bytes."""

import statistics
import time

from .. import jobs
from ..rows import judged

COPIES = 20
FROZEN, START = "frozen.safetensors", "start.safetensors"


def run(site, runs, random):
    spec = jobs.wide(site)
    stalls, ratios = [], []
    for i in range(runs):
        # The first is a run that may be there already.
        job_id = (jobs.reference(site, spec) if i == 0 else jobs.Reference(site, spec)).job_id
        for kind, stall_ms, num_bytes in stalled(site, job_id, spec["method"]["warm_start_steps"]):
            stalls.append((stall_ms, kind))
            ratios.append(stall_ms / copy_ms(num_bytes))
    if not stalls:
        return judged("stall", runs, ["no node says how long it stalled the training"], "")
    longest_ms, kind = max(stalls)
    median_ms = statistics.median(stall_ms for stall_ms, _ in stalls)
    detail = (f"{len(stalls)} nodes: median {median_ms:.0f} ms, max {longest_ms:.0f} ms (a {kind}); over a plain copy "
              f"of the same bytes: median {statistics.median(ratios):.1f}, max {max(ratios):.1f}")
    return judged("stall", runs, [], detail, stalls_ms=stalls, over_copy=[round(ratio, 2) for ratio in ratios])


def stalled(site, job_id, wrapped):
    """(kind, stall in ms, bytes copied) of every node. The bytes are those of the last node of the kind; a state has
    the frozen weights copied along where it is the first of its cycle."""
    files = site.postgres.query(f"""
        select n.kind, n.step, f.name, f.size_bytes from nodes n join node_files f on f.node_id = n.id
        where n.job_id = '{job_id}' order by n.step""")
    frozen = next((file["size_bytes"] for file in files if file["name"] == FROZEN), 0)
    last = {file["kind"]: file["step"] for file in files}
    size = {kind: sum(file["size_bytes"] for file in files if (file["kind"], file["step"]) == (kind, step)
                      and file["name"] not in (FROZEN, START)) for kind, step in last.items()}
    cycles = set()
    for event in jobs.events(site, job_id):
        kind, data = event["type"], event["data"]
        if kind not in size:
            continue
        begins_cycle = kind == "state" and data["step"] >= wrapped and data["restart"] not in cycles
        if begins_cycle:
            cycles.add(data["restart"])
        yield kind, data["stall_ms"], size[kind] + (frozen if begins_cycle else 0)


def copy_ms(num_bytes):
    """The time of a copy in memory, into pages that are new each time as a checkpoint's are."""
    source = b"\1" * num_bytes
    times = []
    for _ in range(COPIES):
        started = time.perf_counter()
        bytearray(source)
        times.append(time.perf_counter() - started)
    return max(0.001, 1000 * statistics.median(times))
