"""The servers that train: each takes one job at a time, so as many run as runs are wanted at once.

A server keeps database and store in a data folder that outlives it: what was submitted before a stop
or a kill goes on at the next start.
"""

import pathlib
import time

from scripts.local_server import STOP_S, Failure, LocalServer

from .definition import spec_sha256

FINAL_STATES = ("succeeded", "failed", "cancelled")


class Lane:
    """A server and the run that it is at."""

    def __init__(self, number, out, num_threads):
        folder = out / f"server-{number}"
        folder.mkdir(parents=True, exist_ok=True)
        self.server = LocalServer(folder / "server.log", folder / "data")
        self.server.env |= {"RELORA_TRAINER_THREADS": str(num_threads), "RELORA_WORKER_NAME": f"lane-{number}"}
        self.number = number
        self.run = self.spec = self.job_id = self.tokenization = None
        self.earlier_jobs = {}

    def start(self):
        _wait_for_killed_server(self.server.data_dir)
        self.server.start()

    def ensure_tokens(self, text, text_sha256, options):
        """Uploads and tokenizes the text, unless that was done at an earlier start."""
        self.tokenization = self._find_tokens(text_sha256, options)
        if self.tokenization is None:
            print(f"server {self.number}: uploading and tokenizing {text.name}", flush=True)
            flags = [("--" + name.replace("_", "-"), value) for name, value in options.items()]
            created = self.server.relora_json("dataset", "create", text, "--name", text.name, *sum(flags, ()))
            self.tokenization = created["tokenization"]

    def _find_tokens(self, text_sha256, options):
        for dataset in self.server.pages("/v1/datasets", limit=500):
            if dataset["state"] != "ready" or dataset["sha256"] != text_sha256:
                continue
            for made in self.server.pages("/v1/tokenizations", dataset=dataset["id"], limit=500):
                if made["state"] == "ready" and all(made[name] == value for name, value in options.items()):
                    return made
        return None

    def adopt(self, wanted, recorded_job_ids):
        """Finds the jobs of wanted runs that an earlier start submitted, and cancels what nobody wants.

        `wanted` names the runs, each with its spec; a job is that run's if it was submitted with an equal spec.
        """
        by_label = {(run.name, spec_sha256(spec)): run for run, spec in wanted.items()}
        for job in self.server.pages("/v1/jobs", limit=500):
            labels = job["spec"]["labels"]
            run = by_label.get((labels.get("run"), labels.get("spec_sha256")))
            if job["id"] in recorded_job_ids or job["state"] == "cancelled":
                continue
            if run is not None and run not in self.earlier_jobs:
                self.earlier_jobs[run] = job["id"]
            elif job["state"] not in FINAL_STATES:
                print(f"server {self.number}: cancelling {job['id']} ({job['name']}), which is not wanted", flush=True)
                self.server.post(f"/v1/jobs/{job['id']}/cancel")

    def begin(self, run, spec):
        """Submits a run, or takes up the job that an earlier start submitted."""
        self.run, self.spec = run, spec
        self.job_id = self.earlier_jobs.pop(run, None)
        if self.job_id is None:
            request = spec | {
                "name": run.name,
                "dataset": self.tokenization["dataset"],
                "tokenization": self.tokenization["id"],
                "labels": {"run": run.name, "spec_sha256": spec_sha256(spec)},
            }
            self.job_id = self.server.post("/v1/jobs", request)["id"]
            return "submitted"
        return "taken up again"

    def finished_job(self):
        """The job of the run if it has come to its end; None while it goes on."""
        if self.server.process.poll() is not None:
            raise Failure(f"server {self.number} ended by itself; see {self.server.log_path}")
        try:
            job = self.server.get(f"/v1/jobs/{self.job_id}")
        except OSError as error:
            print(f"server {self.number}: no answer ({error}); asking again", flush=True)
            return None
        return job if job["state"] in FINAL_STATES else None

    def end(self):
        self.run = self.spec = self.job_id = None

    def close(self):
        self.server.close()


def _wait_for_killed_server(data_dir):
    """Whoever killed the last start left its server stopping: it saves what it trains, which takes a while."""
    deadline = time.monotonic() + STOP_S
    while pids := _servers_of(data_dir):
        if time.monotonic() > deadline:
            raise Failure(f"{data_dir} is in use by process {pids[0]}: stop it, or take another --out")
        time.sleep(0.2)


def _servers_of(data_dir):
    setting = f"RELORA_DATA_DIR={data_dir}".encode()
    pids = []
    for folder in pathlib.Path("/proc").glob("[0-9]*"):
        try:
            if (folder / "comm").read_text().strip() == "relora":
                pids += [int(folder.name)] if setting in (folder / "environ").read_bytes().split(b"\0") else []
        except OSError:
            continue
    return pids
