"""What a host does to a worker: its disk is full, the kernel kills its trainer for want of memory, the trainer aborts.

An attempt fails with the kind of failure that fits and the end of the trainer's log; the worker lives and goes on.
"""

import os
import pathlib
import shlex
import signal
import subprocess
import tempfile

from local_server import BIN, Failure

from .. import jobs
from ..processes import until
from ..rows import Row, judged

DISK_MB = 64
MEMORY_BYTES = 24 << 20


def run_disk_full(site, runs, random):
    """The worker's scratch space is a disk of its own, which is filled during the run and freed after the failure."""
    spec = jobs.tiny(site)
    undisturbed = jobs.reference(site, spec)
    problems, kinds = [], []
    try:
        command = with_small_disk(site.folder / "work" / "small-disk")
    except Failure as failure:
        return Row("worker_disk_full", 0, None, f"NOT TRIED: {failure}")
    with site.working(name="small-disk", command=command) as [worker]:
        for _ in range(runs):
            job_id = jobs.submit(site, spec)
            jobs.wait_for_states(site, job_id)
            # The mount is the worker's alone, and is reached through it.
            disk = pathlib.Path(f"/proc/{worker.pid}/root{worker.work_dir}")
            fill(disk)
            try:
                failure = first_failure(site, job_id)
            finally:
                (disk / "ballast").unlink()
            kinds.append(failure["kind"])
            problems += unlike(failure, ("storage",), "No space left")
            problems += jobs.problems_of(site, job_id, undisturbed) + dead(worker)
    detail = f"failed as {', '.join(sorted(set(kinds)))}; the job went on once there was space"
    return judged("worker_disk_full", runs, problems, detail)


def with_small_disk(folder):
    """A command in front of the worker's: a mount of its own over the folder, which goes with the worker."""
    folder.mkdir(parents=True, exist_ok=True)
    namespace = ["unshare", "--mount"] if os.geteuid() == 0 else ["unshare", "--map-root-user", "--mount"]
    mount = f"mount -t tmpfs -o size={DISK_MB}m chaos {shlex.quote(str(folder))}"
    tried = subprocess.run([*namespace, "sh", "-c", mount], text=True, capture_output=True)
    if tried.returncode != 0:
        raise Failure(f"a small disk needs root or user namespaces: {tried.stderr.strip()}")
    return [*namespace, "sh", "-c", f'{mount} && exec "$@"', "sh"]


def fill(disk):
    """Takes what is free, to the last page."""
    with open(disk / "ballast", "wb", buffering=0) as ballast:
        for size in (1 << 20, 4096):
            try:
                while True:
                    ballast.write(bytes(size))
            except OSError:
                pass


def run_oom(site, runs, random):
    """The trainer alone lives in a memory group that is too small; a plain SIGKILL is told apart from that."""
    spec = jobs.tiny(site)
    try:
        group = memory_group()
    except OSError as error:
        return Row("worker_oom", 0, None, f"NOT TRIED: a memory group needs root and a writable control group: {error}")
    problems, kinds = [], []
    try:
        trainer = site.folder / "trainer-in-group"
        write_trainer(trainer, f"echo $$ >{group}/cgroup.procs")
        with site.working(RELORA_TRAINER=str(trainer)) as [worker]:
            for _ in range(runs):
                limit(group, MEMORY_BYTES)
                job = jobs.wait_for_end(site, jobs.submit(site, spec))
                failure = job["failure"] or {"kind": job["state"], "message": "", "log_tail": ""}
                kinds.append(failure["kind"])
                problems += unlike(failure, ("out_of_memory",), "") + dead(worker)
                limit(group, -1)
                job_id = jobs.submit(site, spec)
                jobs.wait_for_states(site, job_id)  # its log has a line by then
                os.kill(worker.trainer_pid(), signal.SIGKILL)
                failure = first_failure(site, job_id)
                kinds.append(failure["kind"])
                problems += unlike(failure, ("infrastructure",), "") + dead(worker)
                site.server.post(f"/v1/jobs/{job_id}/cancel")
                jobs.wait_for_end(site, job_id)
    finally:
        site.end_workers()
        until(lambda: remove(group), 10, "the memory group is empty")
    return judged("worker_oom", runs, problems, f"by the kernel and by hand: {', '.join(kinds[:2])}")


def memory_group():
    """A control group below our own, of either version."""
    lines = [line.split(":", 2) for line in pathlib.Path("/proc/self/cgroup").read_text().splitlines()]
    for _, controllers, path in lines:
        if "memory" in controllers.split(","):
            return pathlib.Path(tempfile.mkdtemp(prefix="relora-chaos-", dir=f"/sys/fs/cgroup/memory{path}"))
    parent = pathlib.Path("/sys/fs/cgroup" + next(path for number, _, path in lines if number == "0"))
    if "memory" not in (parent / "cgroup.subtree_control").read_text().split():
        (parent / "cgroup.subtree_control").write_text("+memory")
    return pathlib.Path(tempfile.mkdtemp(prefix="relora-chaos-", dir=parent))


def limit(group, num_bytes):
    """The most that the group's processes may have; -1 for no limit."""
    if (group / "memory.limit_in_bytes").exists():
        (group / "memory.limit_in_bytes").write_text(str(num_bytes))
        return
    (group / "memory.max").write_text("max" if num_bytes < 0 else str(num_bytes))
    if (group / "memory.swap.max").exists():
        (group / "memory.swap.max").write_text("0")


def remove(group):
    try:
        group.rmdir()
    except OSError:
        return False
    return True


def run_abort(site, runs, random):
    """libtorch, or whatever else is in the trainer's process, calls abort()."""
    spec = jobs.tiny(site)
    undisturbed = jobs.reference(site, spec)
    problems, kinds = [], []
    with site.working() as [worker]:
        for _ in range(runs):
            job_id = jobs.submit(site, spec)
            jobs.wait_for_states(site, job_id)
            os.kill(worker.trainer_pid(), signal.SIGABRT)
            failure = first_failure(site, job_id)
            kinds.append(failure["kind"])
            problems += unlike(failure, ("infrastructure", "internal"), "signal 6")
            problems += jobs.problems_of(site, job_id, undisturbed) + dead(worker)
    return judged("worker_abort", runs, problems, f"failed as {', '.join(sorted(set(kinds)))}; the job went on")


def write_trainer(path, before):
    """A trainer that does something first, unless it is only asked what there is."""
    path.write_text(f"""#!/bin/sh
[ "$1" = --probe ] || {before}
exec {BIN / "relora-trainer"} "$@"
""")
    path.chmod(0o755)


def first_failure(site, job_id):
    """Why the first attempt that failed did, whether another followed or not."""
    def ended():
        return jobs.events(site, job_id, "requeued") + jobs.events(site, job_id, "failed")

    return until(ended, 30, "the attempt fails")[0]["data"]["failure"]


def unlike(failure, kinds, part):
    """What a failure lacks."""
    problems = []
    if failure["kind"] not in kinds:
        problems.append(f"it failed as {failure['kind']} ({failure['message']}), not {' or '.join(kinds)}")
    if part not in failure["message"]:
        problems.append(f"the message {failure['message']!r} does not say {part!r}")
    if "log_tail" in failure and not failure["log_tail"].strip() and failure["kind"] != "out_of_memory":
        problems.append("the end of the log is missing")
    return problems


def dead(worker):
    return [] if worker.is_alive() else [f"{worker.name} ended with {worker.process.returncode}"]
