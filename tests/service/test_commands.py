"""What an owner asks of a job, and an operator of a worker."""

import subprocess

from local_server import RELORA

from test_workers import Worker


def types(service, job_id):
    return [event["type"] for event in service.events(job_id)]


def test_a_job_that_was_paused_and_resumed_ends_with_the_same_bits(service):
    tokenization = service.tokenization()
    undisturbed = service.submit(tokenization)
    assert service.wait_for_end(undisturbed)["state"] == "succeeded"

    job_id = service.submit(tokenization)
    service.wait(job_id, lambda job: job["progress"]["step"] > 170)
    assert service.relora("job", "pause", job_id) == 0
    paused = service.wait(job_id, lambda job: job["state"] == "paused")
    assert service.trainer_pid() is None, "a paused job holds no memory"
    # The worker is free for others meanwhile.
    other = service.submit(tokenization, schedule={"num_steps": 300, "warmup_steps": 10})
    assert service.wait_for_end(other)["state"] == "succeeded"

    assert service.relora("job", "resume", job_id) == 0
    job = service.wait_for_end(job_id)
    assert job["state"] == "succeeded" and job["exact"]
    resumed = [event for event in service.events(job_id) if event["type"] == "claimed"][1]
    assert resumed["data"]["start_step"] >= paused["progress"]["step"] > 170, "no step was lost"
    assert service.weights(job_id) == service.weights(undisturbed)


def test_a_cancelled_job_leaves_its_weights_and_can_be_gone_on_with_or_forked(service):
    job_id = service.submit(service.tokenization())
    service.wait(job_id, lambda job: job["progress"]["step"] > 210)
    assert service.relora("job", "cancel", job_id) == 0
    assert service.wait_for_end(job_id)["state"] == "cancelled"
    last = service.nodes("checkpoints", job_id)[-1]
    assert last["step"] > 210 and last["step"] % 200 != 0, "the checkpoint is that of the moment"

    fork = service.relora_json("job", "fork", last["id"])
    assert fork["spec"]["method"]["warm_start_steps"] == 0
    assert service.relora("job", "retry", job_id) == 0
    job = service.wait_for_end(job_id)
    assert job["state"] == "succeeded"
    assert [event["data"]["start_step"] for event in service.events(job_id) if event["type"] == "claimed"] == [0, last["step"]]
    assert service.wait_for_end(fork["id"])["state"] == "succeeded"
    assert [base["parent"] for base in service.nodes("bases", fork["id"])] == [last["id"]]


def test_a_job_that_is_cancelled_by_force_ends_at_once(service):
    job_id = service.submit(service.tokenization())
    service.wait_for_state(job_id, after_step=150)
    assert service.relora("job", "cancel", job_id, "--force") == 0
    assert service.wait_for_end(job_id)["state"] == "cancelled"
    assert service.trainer_pid() is None
    steps = {node["step"] for node in service.nodes("checkpoints", job_id)}
    assert steps <= {150, 200, 400, 600}, "those of the plan, and none of the moment"


def test_a_drained_worker_hands_its_job_to_another(make_service):
    service = make_service(RELORA_LOCAL_WORKER="false")
    service.start()
    workers = [Worker(service, "first")]
    try:
        job_id = service.submit(service.tokenization())
        service.wait(job_id, lambda job: job["progress"]["step"] > 20)
        workers.append(Worker(service, "second"))
        operate = [RELORA, "workers"]
        subprocess.run([*operate, "drain", "first", "--hand-back"], env=workers[0].env, check=True)
        job = service.wait_for_end(job_id)
        assert job["state"] == "succeeded" and job["exact"]
        starts = [event["data"]["start_step"] for event in service.events(job_id) if event["type"] == "claimed"]
        assert len(starts) == 2 and starts[1] > 20, "the second began where the first had saved"
        listed = subprocess.run([*operate, "list"], env=workers[0].env, check=True, capture_output=True, text=True).stdout
        assert any("first" in line and "drained" in line for line in listed.splitlines()), listed
        unknown = subprocess.run([*operate, "drain", "third"], env=workers[0].env, capture_output=True, text=True)
        assert unknown.returncode == 1 and "third" in unknown.stderr
    finally:
        for worker in workers:
            worker.kill()


def test_what_is_gone_on_with_on_other_numerics_is_no_longer_exact(make_service):
    service = make_service(RELORA_LOCAL_WORKER="false")
    service.start()
    worker = Worker(service, "one-thread", RELORA_TRAINER_THREADS="1")
    try:
        job_id = service.submit(service.tokenization())
        service.wait_for_state(job_id, after_step=0)
        worker.kill()
        worker = Worker(service, "two-threads", RELORA_TRAINER_THREADS="2")
        job = service.wait_for_end(job_id)
        assert job["state"] == "succeeded" and not job["exact"]
        changed = next(event for event in service.events(job_id) if event["type"] == "numerics_changed")
        assert (changed["data"]["before"]["num_threads"], changed["data"]["now"]["num_threads"]) == (1, 2)
    finally:
        worker.kill()
