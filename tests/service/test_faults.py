"""Whatever dies, the job goes on from its last state, to the same bits."""

import os
import signal
import subprocess

import pytest
from local_server import RELORA


@pytest.fixture
def undisturbed(make_service):
    """A server with tokens, and the hashes of a run that nobody disturbed."""
    service = make_service()
    service.start()
    tokenization = service.tokenization()
    job_id = service.submit(tokenization)
    assert service.wait_for_end(job_id)["state"] == "succeeded"
    return service, tokenization, service.weights(job_id)


def claims(service, job_id):
    return [event for event in service.events(job_id) if event["type"] == "claimed"]


def disturb_and_compare(undisturbed, disturb):
    """Disturbs a run once it has a state; it must go on from there and end with the same weights."""
    service, tokenization, weights = undisturbed
    job_id = service.submit(tokenization)
    service.wait_for_state(job_id, after_step=0)
    disturb(service)
    job = service.wait_for_end(job_id)
    assert job["state"] == "succeeded", job["failure"]["message"]
    assert len(claims(service, job_id)) == 2
    assert claims(service, job_id)[1]["data"]["start_step"] > 0, "the second attempt began from nothing"
    started = [event["data"]["choices"] for event in service.events(job_id) if event["type"] == "started"]
    assert started == [{"micro_batch_seqs": 8, "merged_weights": "resident"}] * 2
    assert job["choices"] == started[0] and job["spec"]["batch"]["micro_batch_seqs"] == "auto"
    assert service.weights(job_id) == weights
    ranks = {event["data"]["restart"] for event in service.events(job_id) if event["type"] == "ranks"}
    assert 3 in ranks, "the ranks at the end were not counted"
    metrics = service.get(f"/v1/jobs/{job_id}/metrics?name=loss&limit=1000")["data"]
    assert [metric["step"] for metric in metrics] == list(range(1, 601)), "every step has one loss"


def test_a_killed_trainer_is_followed_by_another_that_goes_on(undisturbed):
    disturb_and_compare(undisturbed, lambda service: os.kill(service.trainer_pid(), signal.SIGKILL))


def test_a_job_that_begins_with_a_checkpoint_goes_on_from_its_state(undisturbed):
    """Killed before its first state it begins with the checkpoint again, killed after it it needs it no more."""
    service, tokenization, _ = undisturbed
    checkpoint = service.get("/v1/checkpoints")["data"][0]["id"]
    changes = {"model": None, "init_checkpoint": checkpoint, "schedule": {"num_steps": 600, "warmup_steps": 10}}
    first = service.submit(tokenization, **changes)
    assert service.wait_for_end(first)["state"] == "succeeded"
    second = service.submit(tokenization, **changes)
    service.wait(second, lambda job: job["state"] == "running")
    os.kill(service.trainer_pid(), signal.SIGKILL)
    service.wait_for_state(second, after_step=0)
    os.kill(service.trainer_pid(), signal.SIGKILL)
    assert service.wait_for_end(second)["state"] == "succeeded"
    starts = [claim["data"]["start_step"] for claim in claims(service, second)]
    assert len(starts) == 3 and starts[:2] == [0, 0] and starts[2] > 0
    assert service.weights(second) == service.weights(first)
    assert [base["parent"] for base in service.nodes("bases", second)] == [checkpoint]


def test_a_killed_server_with_its_worker_is_clean_at_the_next_start(undisturbed):
    def kill_and_start(service):
        service.kill()
        service.start()

    disturb_and_compare(undisturbed, kill_and_start)


def test_ctrl_c_saves_the_state_and_puts_the_job_back_into_the_queue(undisturbed):
    def interrupt_and_start(service):
        assert service.interrupt() == 0
        assert service._left_over() == {}, "the server left processes behind"
        service.start()

    disturb_and_compare(undisturbed, interrupt_and_start)


def test_a_cancelled_job_stops_and_keeps_what_it_made(service):
    job_id = service.submit(service.tokenization())
    service.wait_for_state(job_id, after_step=150)
    assert service.relora("job", "cancel", job_id) == 0
    job = service.wait_for_end(job_id)
    assert job["state"] == "cancelled"
    assert service.trainer_pid() is None
    assert len(service.nodes("bases", job_id)) == 1


def test_a_job_past_its_time_ends_as_timeout(service):
    job_id = service.submit(service.tokenization(), schedule={"num_steps": 150 + 150 * 1000, "warmup_steps": 30}, max_runtime_s=3)
    job = service.wait_for_end(job_id)
    assert (job["state"], job["failure"]["kind"]) == ("failed", "timeout")
    assert not job["failure"]["retryable"]


@pytest.mark.parametrize(
    ("settings", "names"),
    [
        ({"DATABASE_URL": "postgres://nobody@127.0.0.1:9/none"}, ["DATABASE_URL"]),
        ({"S3_ENDPOINT": "http://127.0.0.1:9", "AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b"}, ["127.0.0.1:9"]),
        ({"RELORA_BIND": "nowhere"}, ["RELORA_BIND", "nowhere"]),
        ({"RELORA_TRAINER": "/nonexistent/trainer"}, ["/nonexistent/trainer", "RELORA_TRAINER"]),
    ],
    ids=["database", "store", "address", "trainer"],
)
def test_a_server_that_cannot_start_says_what_and_where(make_service, settings, names):
    service = make_service(**settings)
    ended = subprocess.run(
        [RELORA, "serve"], env=service.env, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE, text=True, timeout=60,
    )
    assert ended.returncode == 1
    for name in names:
        assert name in ended.stderr
    assert "panicked" not in ended.stderr
    assert service._left_over() == {}, "the server left processes behind"
