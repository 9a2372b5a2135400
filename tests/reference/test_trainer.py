"""The trainer against PyTorch, transformers and peft.

    RELORA_TRAINER=target/release/relora-trainer pytest tests/reference
"""

import copy
import json
import os
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import draws
import relora_reference
import support
from support import Run

VOCAB_SIZE, SEQUENCE_LENGTH, NUM_STEPS, NUM_VALID_TOKENS = 256, 17, 40, 600

SPEC = support.spec(
    model={"vocab_size": VOCAB_SIZE},
    method=support.LOW_RANK | {
        "type": "relora", "warm_start_steps": 10, "relora_warmup_steps": 3, "restart_every_steps": 10,
        "reset_every_steps": 10, "restart_warmup_steps": 3, "restart_schedule": "jagged", "restart_lr": "one_over_w",
        "optimizer_reset": {"type": "zero", "reset_step_count": True}, "allow_short_last_cycle": False,
        "rank_threshold": None,
    },
    optimizer={
        "learning_rate": 5e-3, "warm_start_learning_rate": 3e-3, "betas": [0.9, 0.95], "eps": 1e-6,
        "weight_decay": 0.1, "clip_norm": 1.0,
    },
    schedule={"num_steps": NUM_STEPS, "warmup_steps": 4, "min_lr_frac": 0.1},
    batch={"num_seqs": 10, "sequence_length": SEQUENCE_LENGTH, "micro_batch_seqs": 4, "skip_seqs": 0},
    eval={"every_steps": 20, "max_tokens": 100000, "prompts": ["w1 w2 w3"]},
)

CHANGES = {
    "plain": {},
    "grouped and tied": {"model": {"num_key_value_heads": 2, "tie_word_embeddings": True}},
    "some matrices": {
        "method": {"target_modules": ["v_proj", "down_proj"], "train_embeddings": False, "rank_threshold": 1e-3},
    },
}


def spec_of(change):
    spec = copy.deepcopy(SPEC)
    for part, values in change.items():
        spec[part].update(values)
    return spec


def write_data(folder):
    """Words that follow each other with some regularity."""
    noise = np.random.default_rng(3)
    splits = []
    for count in [3000, NUM_VALID_TOKENS]:
        tokens, token = [], 1
        for _ in range(count):
            token = (token * 5 + int(noise.integers(0, 6))) % VOCAB_SIZE
            tokens.append(token)
        splits.append(tokens)
    return support.write_tokens(folder, *splits, VOCAB_SIZE)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("data") / "tokens")


@pytest.fixture(scope="module", params=CHANGES.values(), ids=CHANGES.keys())
def run(request, data, tmp_path_factory):
    run = Run(spec_of(request.param), data, tmp_path_factory.mktemp("run"))
    assert run.exit_code == 0, run.log
    run.change = request.param
    return run


def test_the_loss_curve_and_the_final_weights_equal_those_of_the_reference(run, data):
    spec = spec_of(run.change)
    reference = relora_reference.train(spec, draws.inputs(spec, support.token_rows(data, "train", SEQUENCE_LENGTH)))
    got = [event["loss"] for event in run.of("step")]
    assert len(got) == NUM_STEPS
    np.testing.assert_allclose(got, reference.losses, rtol=1e-4)
    final = run.weights(NUM_STEPS)
    assert final.keys() == reference.weights.keys()
    for name, weight in reference.weights.items():
        torch.testing.assert_close(final[name], weight, rtol=0, atol=1e-3, msg=lambda m, name=name: f"{name}: {m}")
    assert got[-1] < got[0] - 0.5, "nothing was learned, so the comparison says little"


def test_transformers_computes_the_loss_that_the_trainer_reported(run, data):
    evals = {event["step"]: event for event in run.of("eval")}
    assert sorted(evals) == [0, 10, 20, 40]
    for step in [10, 20, 40]:
        loss = validation_loss(run.out / "checkpoints" / str(step), data)
        assert abs(loss - evals[step]["loss"]) < 1e-4
        assert evals[step]["num_tokens"] == NUM_VALID_TOKENS // SEQUENCE_LENGTH * (SEQUENCE_LENGTH - 1)


def test_transformers_computes_the_logits_of_the_trainer(run, tmp_path):
    checkpoint = run.out / "checkpoints" / str(NUM_STEPS)
    rows = torch.arange(4 * SEQUENCE_LENGTH).view(4, SEQUENCE_LENGTH) * 7 % VOCAB_SIZE
    command = [os.environ["RELORA_TRAINER"], "--logits", checkpoint, tmp_path / "logits.safetensors"]
    subprocess.run(command, input=json.dumps(rows.tolist()), text=True, check=True)
    logits = load_file(tmp_path / "logits.safetensors")["logits"]
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(checkpoint)(rows).logits
    assert expected.abs().max() > 1, "the logits are all alike, so the comparison says little"
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-4)


def test_peft_applies_the_deltas_in_order_and_arrives_at_every_checkpoint(run):
    model = AutoModelForCausalLM.from_pretrained(run.out / "base" / "10")
    assert [event["restart"] for event in run.of("node") if event["kind"] == "restart"] == [1, 2, 3]
    for restart, step in [(1, 20), (2, 30), (3, 40)]:
        model = PeftModel.from_pretrained(model, run.out / "restarts" / str(restart)).merge_and_unload()
        merged = model.state_dict()
        for name, weight in run.weights(step).items():
            torch.testing.assert_close(merged[name], weight, rtol=0, atol=1e-6, msg=lambda m, name=name: f"{name}: {m}")
        checkpoint = AutoModelForCausalLM.from_pretrained(run.out / "checkpoints" / str(step))
        tokens = torch.arange(SEQUENCE_LENGTH)[None]
        with torch.no_grad():
            torch.testing.assert_close(model(tokens).logits, checkpoint(tokens).logits, rtol=0, atol=1e-4)


def validation_loss(checkpoint, data):
    rows = support.token_rows(data, "valid", SEQUENCE_LENGTH)
    with torch.no_grad():
        return AutoModelForCausalLM.from_pretrained(checkpoint)(rows, labels=rows).loss.item()


def test_bf16_computes_with_what_its_restarts_merged(data, tmp_path):
    spec = spec_of({}) | {"precision": "bf16", "eval": SPEC["eval"] | {"every_steps": 10}}
    run = Run(spec, data, tmp_path)
    assert run.exit_code == 0, run.log
    evals = {event["step"]: event["loss"] for event in run.of("eval")}
    for step in [20, 30, 40]:
        exact = validation_loss(run.out / "checkpoints" / str(step), data)
        assert abs(evals[step] - exact) < 0.02, f"after step {step}: {evals[step]} in bf16, {exact} in fp32"
    assert evals[20] - evals[40] > 0.1, "the restarts moved nothing, so the comparison says little"


def test_dropout_reaches_the_low_rank_phase_and_it_alone(run, data, tmp_path):
    spec = spec_of(run.change)
    spec["method"]["dropout"] = 0.5
    dropped = [event["loss"] for event in Run(spec, data, tmp_path).of("step")]
    losses = [event["loss"] for event in run.of("step")]
    # B is zero in the first update after the wrap, whatever its input is.
    assert dropped[:11] == losses[:11]
    assert all(a != b for a, b in zip(dropped[12:], losses[12:]))


def test_a_prompt_is_continued(run):
    (sample,) = run.of("sample")
    assert sample["prompt"] == "w1 w2 w3"
    assert sample["text"].startswith("w1 w2 w3 w")


@pytest.mark.parametrize("send", [None, '{"command":"stop"}'], ids=["end of stdin", "stop"])
def test_a_stopped_run_goes_on_to_the_same_bits(run, data, tmp_path, send):
    first = Run(spec_of(run.change), data, tmp_path, at_steps=[19], send=send)
    assert first.exit_code == 0, first.log
    stopped = first.events[-1]
    assert stopped["event"] == "stopped" and 19 <= stopped["step"] < NUM_STEPS
    state = first.out / "states" / str(stopped["step"])
    rest = Run(spec_of(run.change), data, tmp_path, resume=state)
    assert rest.exit_code == 0, rest.log
    assert rest.events[-1]["event"] == "done"
    path = Path("checkpoints") / str(NUM_STEPS) / "model.safetensors"
    assert (rest.out / path).read_bytes() == (run.out / path).read_bytes()


def test_a_run_that_goes_on_from_its_warm_start_stores_the_frozen_weights(data, tmp_path):
    first = Run(spec_of({}), data, tmp_path, at_steps=[5], send='{"command":"stop"}')
    step = first.events[-1]["step"]
    assert step < 10, "the warm start was over before the stop arrived"
    state = first.out / "states" / str(step)
    rest = Run(spec_of({}), data, tmp_path, resume=state, at_steps=[12], send='{"command":"save_state"}')
    (state,) = [event for event in rest.of("node") if event["kind"] == "state"]
    paths = [file["path"] for file in state["files"]]
    assert "frozen/0/frozen.safetensors" in paths
    assert all((rest.out / path).is_file() for path in paths)


def test_save_state_names_the_frozen_weights_of_the_cycle_in_every_state(data, tmp_path):
    run = Run(spec_of({}), data, tmp_path, at_steps=[12, 15], send='{"command":"save_state"}')
    assert run.exit_code == 0, run.log
    states = [event for event in run.of("node") if event["kind"] == "state"]
    assert len(states) == 2
    for state in states:
        files = {file["name"]: file["path"] for file in state["files"]}
        assert files["frozen.safetensors"] == f"frozen/{state['restart']}/frozen.safetensors"
        assert all((run.out / path).is_file() for path in files.values())


def test_ranks_are_reported_where_they_are_asked_for(run):
    reports = {event["restart"]: event["kinds"] for event in run.of("ranks")}
    if spec_of(run.change)["method"]["rank_threshold"] is None:
        assert reports == {}
        return
    start = load_file(run.out / "base" / "10" / "model.safetensors")
    for restart, kinds in reports.items():
        assert sorted(kinds) == ["down_proj", "v_proj"]
        weights = run.weights(10 + 10 * restart)
        for kind, count in kinds.items():
            changes = [weights[name] - start[name] for name in weights if name.endswith(f"{kind}.weight")]
            values = torch.cat([torch.linalg.svdvals(change) for change in changes])
            assert count == {"num_above": int((values > 1e-3).sum()), "num_values": len(values)}
    assert list(reports) == [1, 2, 3]


def test_a_model_that_memory_has_no_room_for_fails_with_what_did_not_fit(data, tmp_path):
    spec = spec_of({"model": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 8}})
    run = Run(spec, data, tmp_path, address_space_bytes=8 << 30)
    failure = run.events[-1]
    assert failure["event"] == "failed" and failure["kind"] == "out_of_memory", run.log
    # 1.6 billion parameters of 16 bytes.
    assert "at full rank the run holds 24.16 GiB of weights, gradients and moments" in failure["message"]
    assert "a micro-batch of 4 x 17 tokens takes" in failure["message"]
    assert "The model does not fit" in failure["message"] or "would do" in failure["message"]


def test_a_run_without_data_fails_with_a_typed_event(tmp_path):
    run = Run(spec_of({}), tmp_path / "absent", tmp_path)
    assert run.exit_code != 0
    assert run.events[-1]["event"] == "failed" and run.events[-1]["kind"] == "data"
