"""What is downloaded from the service is what `transformers` and `peft` load."""

import json
import subprocess

import pytest
import torch
from local_server import BIN
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer


@pytest.fixture
def downloads(service, tmp_path):
    """Base, deltas and final checkpoint of a finished job, as the client downloads them."""
    job_id = service.submit(service.tokenization())
    assert service.wait_for_end(job_id)["state"] == "succeeded"
    nodes = {
        "base": service.nodes("bases", job_id)[-1],
        "checkpoint": service.nodes("checkpoints", job_id)[-1],
    } | {f"restart {node['restart']}": node for node in service.nodes("restarts", job_id)}
    folders = {}
    for name, node in nodes.items():
        folders[name] = tmp_path / name
        assert service.relora(name.split()[0], "download", node["id"], "--out", folders[name]) == 0
    return folders


def test_a_job_reports_what_its_restarts_merged_and_cleared(service, tmp_path):
    method = {
        "type": "relora", "rank": 8, "warm_start_steps": 20, "restart_every_steps": 20, "rank_threshold": 0.001,
        "optimizer_reset": {"type": "magnitude", "frac": 0.75},
    }
    schedule = {"num_steps": 80}
    job_id = service.submit(service.tokenization(), method=method, schedule=schedule)
    assert service.wait_for_end(job_id)["state"] == "succeeded"

    events = service.events(job_id)
    cleared = [event["data"]["cleared_frac"] for event in events if event["type"] == "optimizer_reset"]
    assert cleared == pytest.approx([0.75, 0.75], abs=0.01)
    ranks = {event["data"]["restart"]: event["data"]["kinds"] for event in events if event["type"] == "ranks"}
    assert sorted(ranks) == [1, 2, 3]
    assert all(len(kinds) == 7 for kinds in ranks.values())
    assert ranks[3]["q_proj"]["num_above"] > ranks[1]["q_proj"]["num_above"] > 0

    for restart in service.nodes("restarts", job_id):
        folder = tmp_path / restart["id"]
        assert service.relora("restart", "download", restart["id"], "--out", folder) == 0
        delta = load_file(folder / "adapter_model.safetensors")
        products = {kind: [] for kind in restart["update_norms"]}
        for name, a in delta.items():
            if name.endswith("lora_A.weight"):
                b = delta[name.replace("lora_A", "lora_B")]
                products[name.split(".")[-3]].append(32 / 8 * b @ a)
        for kind, norm in restart["update_norms"].items():
            assert torch.stack(products[kind]).norm().item() == pytest.approx(norm, rel=1e-5)
    metrics = service.get(f"/v1/jobs/{job_id}/metrics?name=update_norm")["data"]
    assert [metric["step"] for metric in metrics] == [40, 60, 80]


def test_transformers_and_peft_load_what_the_service_stores(downloads, tmp_path):
    checkpoint = AutoModelForCausalLM.from_pretrained(downloads["checkpoint"])
    tokens = AutoTokenizer.from_pretrained(downloads["checkpoint"])("def function_7(value):\n    return value", return_tensors="pt").input_ids

    with torch.no_grad():
        logits = checkpoint(tokens).logits
    trainer = [BIN / "relora-trainer", "--logits", downloads["checkpoint"], tmp_path / "logits.safetensors"]
    subprocess.run(trainer, input=json.dumps(tokens.tolist()), text=True, check=True)
    torch.testing.assert_close(load_file(tmp_path / "logits.safetensors")["logits"], logits, rtol=0, atol=1e-4)

    assert_merge_to(checkpoint, downloads, num_restarts=3)


def assert_merge_to(checkpoint, downloads, num_restarts):
    """`peft` adds the deltas to the base and has the weights of the checkpoint."""
    model = AutoModelForCausalLM.from_pretrained(downloads["base"])
    for restart in range(1, num_restarts + 1):
        model = PeftModel.from_pretrained(model, downloads[f"restart {restart}"]).merge_and_unload()
    merged = model.state_dict()
    for name, weight in checkpoint.state_dict().items():
        torch.testing.assert_close(merged[name], weight, rtol=0, atol=1e-6, msg=lambda m, name=name: f"{name}: {m}")


def test_a_middle_restart_becomes_a_checkpoint_and_the_last_one_equals_its_own(service, downloads, tmp_path):
    _, middle, last = sorted(service.pages("/v1/restarts"), key=lambda node: node["step"])
    assert (middle["restart"], middle["step"], last["restart"]) == (2, 450, 3)

    checked = service.relora_json("restart", "verify", middle["id"], "--wait")["verification"]
    assert checked["is_sound"] and checked["compared_with"] is None and checked["differences"] == {}
    task = service.relora_json("restart", "materialize", middle["id"], "--wait")
    folder = tmp_path / "materialized"
    assert service.relora("checkpoint", "download", task["checkpoint"], "--out", folder) == 0
    node = service.get(f"/v1/checkpoints/{task['checkpoint']}")
    assert (node["parent"], node["step"], node["restart"]) == (middle["id"], 450, 2)
    assert {file.name for file in folder.iterdir()} == {file.name for file in downloads["checkpoint"].iterdir()}
    assert_merge_to(AutoModelForCausalLM.from_pretrained(folder), downloads, num_restarts=2)
    assert len(AutoTokenizer.from_pretrained(folder)) == 300
    again = service.relora_json("restart", "materialize", middle["id"])
    assert again == task

    checked = service.relora_json("restart", "verify", last["id"], "--wait")["verification"]
    assert checked["compared_with"] == service.nodes("checkpoints", last["job"])[-1]["id"]
    assert checked["is_sound"] and checked["is_within_tolerance"]
    assert set(checked["differences"]) >= {"q_proj", "down_proj", "embed_tokens", "lm_head", "input_layernorm", "norm"}
    assert all(difference["max_rel"] <= 1e-6 for difference in checked["differences"].values())
    assert [file["problem"] for file in checked["files"]] == [None] * len(checked["files"])
    stored = {(node["id"], file["name"]): file["sha256"] for node in [last, middle] for file in node["files"]}
    assert stored.items() <= {(file["node"], file["name"]): file["sha256"] for file in checked["files"]}.items()


def test_a_job_begins_with_a_materialized_checkpoint(service):
    tokenization = service.tokenization()
    method = {"type": "relora", "rank": 8, "warm_start_steps": 20, "restart_every_steps": 20}
    job_id = service.submit(tokenization, method=method, schedule={"num_steps": 60})
    assert service.wait_for_end(job_id)["state"] == "succeeded"
    [first, _] = service.nodes("restarts", job_id)
    checkpoint = service.relora_json("restart", "materialize", first["id"], "--wait")["checkpoint"]

    method |= {"warm_start_steps": 0}
    next_id = service.submit(
        tokenization, model=None, init_checkpoint=checkpoint, method=method, schedule={"num_steps": 20},
    )
    assert service.wait_for_end(next_id)["state"] == "succeeded"
    base = service.nodes("bases", next_id)[0]
    assert base["parent"] == checkpoint

    def weights(node):
        return next(file["sha256"] for file in node["files"] if file["name"] == "model.safetensors")

    assert weights(base) == weights(service.get(f"/v1/checkpoints/{checkpoint}"))
