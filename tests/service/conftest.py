"""Real servers for the tests: `relora serve` with its own PostgreSQL, store and worker."""

import json
import pathlib
import signal
import sys
import time

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "scripts"))
from local_server import BIN, LocalServer  # noqa: E402

TEXT = "".join(f"def function_{i}(value):\n    return value * {i} + {i % 7}\n\n" for i in range(4000))


class Service(LocalServer):
    """A server of the test's own, with the verbs that the tests use."""

    def __init__(self, log_path, **settings):
        super().__init__(log_path)
        self.env |= {"RELORA_LEASE_S": "3", "RELORA_LOG": "info"} | settings
        self.folder = log_path.parent

    def kill(self):
        """kill -9: nobody gets to tidy up."""
        self.process.kill()
        self.process.wait()
        self.process = None

    def interrupt(self):
        """Ctrl-C, and the exit code that follows."""
        self.process.send_signal(signal.SIGINT)
        code = self.process.wait(60)
        self.process = None
        return code

    def log(self):
        return self.log_path.read_text(errors="replace")

    def tokenization(self):
        """The tokens that all jobs of a test train on."""
        path = self.folder / "text.txt"
        path.write_text(TEXT)
        created = self.relora_json("dataset", "create", path, "--name", "text", "--vocab-size", 300)
        return created["tokenization"]

    def submit(self, tokenization, **changes):
        path = self.folder / "spec.json"
        path.write_text(json.dumps(spec(tokenization) | changes))
        return self.relora_json("job", "submit", path)["id"]

    def job(self, job_id):
        return self.get(f"/v1/jobs/{job_id}")

    def wait(self, job_id, condition, timeout_s=120):
        """Returns the job once the condition holds for it."""
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            job = self.job(job_id)
            if condition(job):
                return job
            if job["state"] in ("succeeded", "failed", "cancelled"):
                break
            time.sleep(0.05)
        raise AssertionError(f"the condition never held; the job is {json.dumps(job, indent=2)}")

    def wait_for_end(self, job_id):
        return self.wait(job_id, lambda job: job["state"] in ("succeeded", "failed", "cancelled"))

    def wait_for_state(self, job_id, after_step):
        """Returns once a state later than the step is stored."""
        def stored(_):
            return any(event["type"] == "state" and event["data"]["step"] > after_step for event in self.events(job_id))
        return self.wait(job_id, stored)

    def nodes(self, kind, job_id):
        nodes = self.get(f"/v1/{kind}?job={job_id}")["data"]
        return sorted(nodes, key=lambda node: node["step"])

    def weights(self, job_id):
        """SHA-256 of every weight file that is part of the job's lineage."""
        return {
            (kind, node["step"]): file["sha256"]
            for kind in ("bases", "restarts", "checkpoints")
            for node in self.nodes(kind, job_id)
            for file in node["files"]
            if file["name"].endswith(".safetensors")
        }

    def trainer_pid(self):
        """The trainer of this server, if one runs."""
        pids = [pid for pid, arguments in self._left_over().items() if "relora-trainer" in arguments]
        return pids[0] if pids else None


def spec(tokenization):
    """A small model and a run of some seconds, with three restarts and several states."""
    return {
        "dataset": tokenization["dataset"],
        "tokenization": tokenization["id"],
        "model": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2},
        "method": {
            "type": "relora", "rank": 8, "warm_start_steps": 150, "restart_every_steps": 150, "rank_threshold": 0.001,
        },
        "schedule": {"num_steps": 600},
        "batch": {"num_seqs": 8, "sequence_length": 64},
        "eval": {"every_steps": 200, "max_tokens": 2000},
        "checkpoints": {"every_steps": 200},
        "state_every_s": 1,
    }


@pytest.fixture
def make_service(tmp_path):
    """Makes servers that are stopped at the end, whatever happens."""
    made = []

    def make(**settings):
        service = Service(tmp_path / f"server-{len(made)}.log", **settings)
        made.append(service)
        return service

    yield make
    for service in made:
        service.close()


@pytest.fixture
def service(make_service):
    service = make_service()
    service.start()
    return service


@pytest.fixture(scope="module")
def shared_service(tmp_path_factory):
    """One server for all tests of a file, where none of them disturbs it."""
    service = Service(tmp_path_factory.mktemp("service") / "server.log")
    try:
        service.start()
        yield service
    finally:
        service.close()


def pytest_configure():
    if not (BIN / "relora-trainer").exists():
        pytest.exit("relora-trainer is not built: run `make build` first", returncode=2)
