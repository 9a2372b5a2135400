"""What a trainer found of its device decides which jobs are taken, and of what they are warned."""

import json
import os
import subprocess

import pytest
from conftest import TEXT
from local_server import BIN, RELORA, Failure

FOUND = {
    "device": "cpu", "num_gpus": 0, "memory_bytes": 8 << 30, "bf16_speedup": 0.25,
    "gpu_problem": "the driver is for CUDA 12.4",
    "numerics": {"device": "cpu", "cpu_capability": "", "num_threads": 1, "libtorch": "2", "trainer": "0"},
}


@pytest.fixture
def trainer(tmp_path):
    """A trainer that finds what is written above, and trains as always."""
    trainer = tmp_path / "trainer"
    trainer.write_text(
        "#!/bin/sh\n"
        f"""[ "$1" != --probe ] || {{ echo '{json.dumps(FOUND)}'; exit; }}\n"""
        f"""exec {BIN / "relora-trainer"} "$@"\n"""
    )
    os.chmod(trainer, 0o755)
    return trainer


@pytest.fixture
def service(make_service, trainer):
    service = make_service(RELORA_TRAINER=str(trainer))
    service.start()
    return service


def test_a_job_is_measured_by_what_the_worker_found(service):
    tokenization = service.tokenization()
    assert "no GPU can be used here" in service.log() and FOUND["gpu_problem"] in service.log()

    spec = {
        "dataset": tokenization["dataset"], "method": {"type": "full"}, "schedule": {"num_steps": 10},
        "batch": {"num_seqs": 2, "sequence_length": 32}, "precision": "bf16",
        "model": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2},
    }
    with pytest.raises(Failure) as refused:
        service.post("/v1/jobs", spec | {"model": {"preset": "llama-1b"}})
    for part in ["status 422", '"/model"', "no worker has more than 8.00 GiB"]:
        assert part in str(refused.value)

    job = service.wait_for_end(service.post("/v1/jobs", spec)["id"])
    assert job["state"] == "succeeded", job["failure"]
    assert [warning for warning in job["warnings"] if "0.25 times the rate" in warning]
    warnings = [event["message"] for event in service.events(job["id"]) if event["type"] == "warning"]
    assert len(warnings) == 1 and "0.25 times the rate" in warnings[0]


def test_a_run_by_hand_is_warned_too(make_service, trainer, tmp_path):
    text, spec = tmp_path / "text.txt", tmp_path / "spec.json"
    text.write_text(TEXT)
    spec.write_text(json.dumps({
        "method": {"type": "full"}, "schedule": {"num_steps": 1}, "batch": {"num_seqs": 2, "sequence_length": 32},
        "model": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 2},
        "precision": "bf16",
    }))
    command = [RELORA, "train", spec, "--text", text, "--vocab-size", "300", "--out", tmp_path / "out"]
    env = make_service().env | {"RELORA_TRAINER": str(trainer)}
    run = subprocess.run(command, env=env, stdout=subprocess.PIPE, text=True, check=True, timeout=120)
    assert "warning: /precision" in run.stdout and "0.25 times the rate" in run.stdout, run.stdout
