"""The processes of the service: its server, its workers, and what is left of them."""

import ctypes
import pathlib
import signal
import subprocess
import time

from local_server import RELORA, Failure, LocalServer

def until(condition, timeout_s, what, pause_s=0.02):
    """Returns what the condition gives as soon as that is true."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        if result := condition():
            return result
        time.sleep(pause_s)
    raise Failure(f"{what}: not within {timeout_s} s")


def end_with_harness(number):
    """For a child: the kernel sends the signal when the harness is gone, however it went."""
    PR_SET_PDEATHSIG = 1

    def prepare():
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, number)

    return prepare


class Server(LocalServer):
    """`relora serve` with some settings. It may be killed and started again."""

    def __init__(self, folder, log_path, **settings):
        super().__init__(log_path, data_dir=folder)
        self.env |= {"RELORA_LOCAL_WORKER": "false"} | settings

    def kill(self):
        """kill -9."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None


class Worker:
    """A `relora worker` of a site, started at once."""

    def __init__(self, site, name, command=(), direct=False, **settings):
        self.name = name
        self.work_dir = site.folder / "work" / name
        self.log_path = site.logs / f"{name}.log"
        self.env = site.env | site.access(direct) | {
            "RELORA_WORKER_NAME": name, "RELORA_WORK_DIR": str(self.work_dir), "RELORA_LEASE_S": str(site.lease_s),
            "RELORA_LOG": "info",
        } | settings
        with open(self.log_path, "ab") as log:
            self.process = subprocess.Popen(
                [*command, RELORA, "worker"], env=self.env, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                start_new_session=True, preexec_fn=end_with_harness(signal.SIGKILL),
            )
        self.pid = self.process.pid

    def is_alive(self):
        return self.process.poll() is None

    def kill(self):
        self.process.kill()
        self.process.wait()

    def stop(self):
        """SIGTERM, and the exit code that follows."""
        self.process.terminate()
        return self.process.wait(60)

    def trainer_pid(self):
        """Its trainer, if one runs."""
        return next((pid for pid, line in processes_with(self.work_dir).items() if "relora-trainer" in line), None)

    def attempt_folder(self, job_id, lease_epoch):
        """Where the files of an attempt are, as long as they are."""
        return next(self.work_dir.glob(f"*/{job_id}-{lease_epoch}"), None)

    def log(self):
        return self.log_path.read_text(errors="replace")


def processes_with(folder):
    """The command lines of all processes that name a folder, by process id; those that have ended do not count."""
    found = {}
    for entry in pathlib.Path("/proc").glob("[0-9]*"):
        try:
            line = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
        except OSError:
            continue
        if str(folder) in line:
            found[int(entry.name)] = line
    return found
