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

    model = AutoModelForCausalLM.from_pretrained(downloads["base"])
    deltas = sorted(name for name in downloads if name.startswith("restart"))
    assert deltas == ["restart 1", "restart 2", "restart 3"]
    for delta in deltas:
        model = PeftModel.from_pretrained(model, downloads[delta]).merge_and_unload()
    merged = model.state_dict()
    for name, weight in checkpoint.state_dict().items():
        torch.testing.assert_close(merged[name], weight, rtol=0, atol=1e-6, msg=lambda m, name=name: f"{name}: {m}")
