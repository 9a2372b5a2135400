"""Several workers on one database: what one leaves behind another takes up."""

import json
import os
import signal
import subprocess
import time

import pytest
from local_server import RELORA


class Worker:
    """A `relora worker` of its own, on the database and store of a server."""

    def __init__(self, service, name, **settings):
        access = json.loads((service.data_dir / "s3" / "access.json").read_text())
        socket = service.data_dir / "postgres" / "socket"
        self.env = service.env | {
            "DATABASE_URL": f"postgres://relora@localhost/postgres?host={socket}",
            "S3_ENDPOINT": f"http://127.0.0.1:{access['port']}",
            "AWS_ACCESS_KEY_ID": access["access_key_id"],
            "AWS_SECRET_ACCESS_KEY": access["secret_access_key"],
            "RELORA_WORKER_NAME": name,
            "RELORA_WORK_DIR": str(service.data_dir / name),
        } | settings
        self.log = open(service.folder / f"{name}.log", "wb")
        self.process = subprocess.Popen([RELORA, "worker"], env=self.env, stdout=self.log, stderr=self.log)

    def kill(self):
        self.process.kill()
        self.process.wait()


@pytest.fixture
def service(make_service):
    service = make_service(RELORA_LOCAL_WORKER="false")
    service.start()
    return service


def test_a_killed_worker_is_followed_by_another_once_its_lease_has_run_out(service):
    workers = [Worker(service, "first")]
    try:
        job_id = service.submit(service.tokenization())
        service.wait_for_state(job_id, after_step=0)
        workers.append(Worker(service, "second"))
        workers[0].kill()
        job = service.wait_for_end(job_id)
        assert job["state"] == "succeeded", job["failure"]["message"]
        events = service.events(job_id)
        assert [event["type"] for event in events].count("claimed") == 2
        requeued = next(event for event in events if event["type"] == "requeued")
        assert "not heard of for a whole lease" in requeued["message"]
    finally:
        for worker in workers:
            worker.kill()


def test_a_trainer_that_is_held_does_not_outlive_its_worker(service):
    worker = Worker(service, "first")
    try:
        job_id = service.submit(service.tokenization())
        service.wait(job_id, lambda job: job["progress"]["step"] > 0)
        trainer = service.trainer_pid()
        os.kill(trainer, signal.SIGSTOP)
    finally:
        worker.kill()
    deadline = time.monotonic() + 10
    while service.trainer_pid() == trainer:
        assert time.monotonic() < deadline, "the trainer stands still for ever"
        time.sleep(0.1)
