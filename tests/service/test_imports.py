"""Continuing from a checkpoint that `transformers` wrote: imported, tokenized for, trained from, and loaded again."""

import hashlib
import json
import struct
import subprocess
import urllib.request
import uuid

import pytest
import torch
from local_server import BIN, RELORA
from safetensors.torch import load_file
from tokenizers import ByteLevelBPETokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

TEXT = "".join(f"def function_{i}(value):\n    return value * {i} + {i % 7}\n\n" for i in range(4000))
END_OF_TEXT = "</s>"
VARIANTS = {
    "sharded": {},
    "bf16-grouped": {"dtype": torch.bfloat16, "num_key_value_heads": 2},
    "tied-half": {"dtype": torch.float16, "tie_word_embeddings": True},
}


@pytest.fixture
def service(shared_service):
    return shared_service


def write_checkpoint(folder, dtype=torch.float32, **changes):
    """A small model with random weights and a tokenizer of its own."""
    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train_from_iterator([TEXT[:20_000]], vocab_size=300, special_tokens=["<pad>", END_OF_TEXT])
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer._tokenizer, eos_token=END_OF_TEXT, pad_token="<pad>"
    ).save_pretrained(folder)
    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=304, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=128, rms_norm_eps=1e-5, initializer_range=0.1,
        **{"num_key_value_heads": 4, "rope_parameters": {"rope_type": "default", "rope_theta": 50_000.0}} | changes,
    )
    LlamaForCausalLM(config).to(dtype).save_pretrained(folder, max_shard_size="100KB")
    shards = list(folder.glob("model-*-of-*.safetensors"))
    assert len(shards) > 1 and (folder / "model.safetensors.index.json").exists()
    return folder


def weights(folder):
    """Every tensor of a checkpoint, in one file or several, in fp32."""
    return {
        name: tensor.float()
        for path in sorted(folder.glob("model*.safetensors"))
        for name, tensor in load_file(path).items()
    }


def import_by_http(service, folder, name):
    """POST /v1/checkpoints as any HTTP client would."""
    boundary = uuid.uuid4().hex
    body = f'--{boundary}\r\nContent-Disposition: form-data; name="name"\r\n\r\n{name}\r\n'.encode()
    for path in sorted(folder.iterdir()):
        head = f'Content-Disposition: form-data; name="file"; filename="{path.name}"'
        body += f"--{boundary}\r\n{head}\r\n\r\n".encode() + path.read_bytes() + b"\r\n"
    body += f"--{boundary}--\r\n".encode()
    client = json.loads((service.data_dir / "client.json").read_text())
    request = urllib.request.Request(
        client["url"] + "/v1/checkpoints", data=body,
        headers={"Authorization": f"Bearer {client['api_key']}", "Content-Type": f"multipart/form-data; boundary={boundary}"},
    )
    with service.opener.open(request, timeout=60) as answer:
        assert answer.status == 201
        return json.load(answer)


def tokenize(service, checkpoint):
    """The test's text in the tokens of the checkpoint."""
    path = service.folder / "text.txt"
    path.write_text(TEXT)
    dataset = service.relora_json("dataset", "create", path, "--name", "text", "--no-tokenize")["dataset"]
    return service.relora_json("dataset", "tokenize", dataset["id"], "--tokenizer", checkpoint["id"])


def train(service, tokenization, checkpoint, method, num_steps=20):
    changes = {
        "init_checkpoint": checkpoint["id"], "method": method, "schedule": {"num_steps": num_steps, "warmup_steps": 2},
        "batch": {"num_seqs": 4, "sequence_length": 48}, "model": None,
    }
    job_id = service.submit(tokenization, **changes)
    job = service.wait_for_end(job_id)
    assert job["state"] == "succeeded", job["failure"]["message"]
    assert not [warning for warning in job["warnings"] if "tokenizer" in warning]
    return job_id


def download(service, kind, node, folder):
    assert service.relora(kind, "download", node["id"], "--out", folder) == 0
    return folder


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_run_begins_with_the_imported_weights_and_its_result_loads(service, tmp_path, variant):
    folder = write_checkpoint(tmp_path / "imported", **VARIANTS[variant])
    imported = import_by_http(service, folder, variant)
    assert (imported["name"], imported["job"], imported["parent"]) == (variant, None, None)

    tokenization = tokenize(service, imported)
    assert tokenization["vocab_size"] == 304
    assert {"tokenizer.json", "tokenizer_config.json"} <= {file["name"] for file in tokenization["files"]}
    job_id = train(service, tokenization, imported, {"type": "relora", "rank": 4, "restart_every_steps": 10})

    # Nothing was trained before the wrap: the base is what was imported, to the bit.
    [base] = service.nodes("bases", job_id)
    assert (base["step"], base["parent"]) == (0, imported["id"])
    want, got = weights(folder), weights(download(service, "base", base, tmp_path / "base"))
    if VARIANTS[variant].get("tie_word_embeddings"):
        want.pop("lm_head.weight", None)
    assert want.keys() == got.keys()
    for name, tensor in want.items():
        assert torch.equal(got[name], tensor), name

    final = service.nodes("checkpoints", job_id)[-1]
    assert final["step"] == 20
    result = download(service, "checkpoint", final, tmp_path / "result")
    assert (result / "tokenizer.json").read_bytes() == (folder / "tokenizer.json").read_bytes()
    model, tokenizer = AutoModelForCausalLM.from_pretrained(result), AutoTokenizer.from_pretrained(result)
    assert tokenizer.eos_token == END_OF_TEXT and model.config.eos_token_id == tokenizer.eos_token_id
    assert model.config.rope_parameters["rope_theta"] == 50_000.0
    tokens = tokenizer("def function_7(value):\n    return value", return_tensors="pt").input_ids
    with torch.no_grad():
        logits = model(tokens).logits
    assert not torch.equal(model.model.layers[0].mlp.up_proj.weight, want["model.layers.0.mlp.up_proj.weight"])
    torch.testing.assert_close(trainer_logits(result, tokens, tmp_path), logits, rtol=0, atol=1e-4)


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_trainer_computes_what_transformers_computes_of_an_import(tmp_path, variant):
    folder = write_checkpoint(tmp_path / "imported", **VARIANTS[variant])
    tokens = torch.arange(96).reshape(2, 48)
    with torch.no_grad():
        logits = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(tokens).logits
    torch.testing.assert_close(trainer_logits(folder, tokens, tmp_path), logits, rtol=0, atol=1e-4)


def trainer_logits(folder, tokens, tmp_path):
    out = tmp_path / "logits.safetensors"
    trainer = [BIN / "relora-trainer", "--logits", folder, out]
    subprocess.run(trainer, input=json.dumps(tokens.tolist()), text=True, check=True)
    return load_file(out)["logits"]


def test_the_tokens_are_those_of_the_checkpoints_tokenizer(service, tmp_path):
    folder = write_checkpoint(tmp_path / "imported")
    # What a tokenizer does to a single input of a model must not touch the text.
    spoilt = json.loads((folder / "tokenizer.json").read_text())
    spoilt["truncation"] = {"direction": "Right", "max_length": 8, "strategy": "LongestFirst", "stride": 0}
    (folder / "tokenizer.json").write_text(json.dumps(spoilt))
    tokenization = tokenize(service, import_by_http(service, folder, "mine"))

    tokenizer = AutoTokenizer.from_pretrained(folder)
    want = tokenizer(TEXT, add_special_tokens=False, truncation=False).input_ids + [tokenizer.eos_token_id]
    files = {file["name"]: file for file in tokenization["files"]}
    num_train = tokenization["train_tokens"]
    for name, ids in [("train.bin", want[:num_train]), ("valid.bin", want[num_train:])]:
        content = struct.pack(f"<{len(ids)}H", *ids)
        assert files[name]["size_bytes"] == len(content)
        assert files[name]["sha256"] == hashlib.sha256(content).hexdigest(), name
    assert tokenization["tokenizer_vocab_size"] == len(tokenizer)


def test_a_lineage_goes_on_from_job_to_job(service, tmp_path):
    imported = service.relora_json("checkpoint", "import", write_checkpoint(tmp_path / "imported"), "--name", "mine")
    tokenization = tokenize(service, imported)
    full = train(service, tokenization, imported, {"type": "full"}, num_steps=5)
    [checkpoint] = service.nodes("checkpoints", full)
    assert checkpoint["parent"] == imported["id"]

    warm = {"type": "lora", "rank": 4, "warm_start_steps": 5}
    [base] = service.nodes("bases", train(service, tokenization, checkpoint, warm, num_steps=10))
    assert (base["step"], base["parent"]) == (5, checkpoint["id"])

    listed = subprocess.run([RELORA, "checkpoint", "list"], env=service.env, stdout=subprocess.PIPE, text=True, check=True)
    assert 'import "mine"' in listed.stdout and full in listed.stdout
    shown = subprocess.run(
        [RELORA, "checkpoint", "show", imported["id"]], env=service.env, stdout=subprocess.PIPE, text=True, check=True
    )
    assert 'import "mine"' in shown.stdout and "model.safetensors.index.json" in shown.stdout


def test_the_client_leaves_out_what_is_not_taken_and_shows_every_problem_before_it_sends(service, tmp_path):
    folder = write_checkpoint(tmp_path / "imported")
    before = service.get("/v1/checkpoints")["data"]
    (folder / "README.md").write_text("mine")
    (folder / "dangling").symlink_to("nowhere")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"hidden_act": "gelu", "vocab_size": 299}))
    refused = subprocess.run(
        [RELORA, "checkpoint", "import", folder], env=service.env, stderr=subprocess.PIPE, text=True, timeout=60
    )
    assert refused.returncode == 1
    for said in ("README.md", "dangling", "nothing was sent", "/config.json/hidden_act", "/tokenizer.json"):
        assert said in refused.stderr, refused.stderr
    assert service.get("/v1/checkpoints")["data"] == before


def test_a_run_by_hand_begins_with_a_folder(tmp_path, make_service):
    folder = write_checkpoint(tmp_path / "imported")
    text, spec, out = tmp_path / "text.txt", tmp_path / "spec.json", tmp_path / "out"
    text.write_text(TEXT)
    spec.write_text(json.dumps({
        "method": {"type": "relora", "rank": 4, "restart_every_steps": 5}, "schedule": {"num_steps": 5},
        "batch": {"num_seqs": 2, "sequence_length": 32},
    }))
    env = make_service().env
    command = [RELORA, "train", spec, "--text", text, "--out", out, "--threads", "1"]
    refused = subprocess.run(command, env=env, stderr=subprocess.PIPE, text=True, timeout=120)
    assert refused.returncode == 1 and "/model" in refused.stderr
    subprocess.run([*command, "--weights", folder], env=env, check=True, timeout=120)
    want, got = weights(folder), weights(out / "base" / "0")
    assert want.keys() == got.keys() and all(torch.equal(got[name], want[name]) for name in want)
    assert (out / "base" / "0" / "tokenizer.json").read_bytes() == (folder / "tokenizer.json").read_bytes()
