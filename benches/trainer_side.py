"""Measures our trainer: the executable itself, on a spec and random tokens, ended when enough updates are done."""

import json
import os
import shutil
import subprocess
import threading

import numpy as np

from .cases import (
    ADAMW,
    ALPHA,
    CLIP_NORM,
    LEARNING_RATE,
    NUM_WARM_UP_STEPS,
    RANK,
    RMS_NORM_EPS,
    ROPE_THETA,
    VOCAB_SIZE,
)
from .sides import TIMEOUT_S, SideFailed, explain_exit
from .usage import Usage

# More than any run makes, so that no schedule ends, restarts, saves or evaluates while updates are timed.
NEVER = 1_000_000

# The spec's defaults.
DEFAULT_MEMORY = {"recompute": "cheap", "frozen_weights": "full", "merged_weights": "auto"}

# A low-rank run begins by writing these, beside its first updates.
FIRST_NODES = {"base", "checkpoint"}


def spec_of(case):
    """The normalised spec of a case. A low-rank one begins at low rank."""
    sizes = case.sizes
    spec = {
        "spec_version": 1, "name": "bench", "dataset": "ds_1", "tokenization": "tz_1",
        "model": {
            "preset": None, "vocab_size": VOCAB_SIZE, "hidden_size": sizes.hidden_size,
            "intermediate_size": sizes.intermediate_size, "num_hidden_layers": sizes.num_layers,
            "num_attention_heads": sizes.num_heads, "num_key_value_heads": sizes.num_heads,
            "max_position_embeddings": case.sequence_length, "rms_norm_eps": RMS_NORM_EPS, "rope_theta": ROPE_THETA,
            "initializer_range": 0.02, "tie_word_embeddings": False,
        },
        "method": method_of(case),
        "optimizer": ADAMW | {
            "learning_rate": LEARNING_RATE, "warm_start_learning_rate": LEARNING_RATE, "clip_norm": CLIP_NORM,
        },
        "schedule": {"num_steps": NEVER, "warmup_steps": 1, "min_lr_frac": 0.1},
        "batch": {
            "num_seqs": case.num_seqs, "sequence_length": case.sequence_length,
            "micro_batch_seqs": case.micro_batch_seqs, "skip_seqs": 0,
        },
        "precision": case.dtype, "deterministic": case.deterministic, "seed": 7,
        "eval": {"every_steps": NEVER, "max_tokens": 1, "prompts": []}, "checkpoints": {"every_steps": NEVER},
        "state_every_s": NEVER, "resources": {"device": case.device, "num_gpus": 1}, "priority": 0, "labels": {},
        "max_runtime_s": None,
        "max_stall_s": 900,
        "retries": {"infrastructure": 5, "user": 0},
    }
    spec["memory"] = case.memory or DEFAULT_MEMORY
    return spec


def method_of(case):
    if not case.is_low_rank:
        return {"type": "full"}
    return {
        "type": "relora", "rank": RANK, "scale": ALPHA / RANK, "dropout": case.dropout,
        "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
        "train_embeddings": True, "train_head": True, "warm_start_steps": 0, "relora_warmup_steps": 1,
        "restart_every_steps": NEVER, "reset_every_steps": NEVER, "restart_warmup_steps": 1,
        "restart_schedule": "jagged", "restart_lr": "one_over_w",
        "optimizer_reset": {"type": "zero", "reset_step_count": True}, "allow_short_last_cycle": False,
        "rank_threshold": None,
    }


def write_tokens(folder, case):
    """Random tokens in the form of a tokenization, which PyTorch's side reads too. No text is ever made of them."""
    folder.mkdir()
    counts = {"train": 8 * case.tokens_per_step, "valid": case.sequence_length}
    draws = np.random.default_rng(7)
    for split, count in counts.items():
        draws.integers(0, VOCAB_SIZE, count).astype("<u2").tofile(folder / f"{split}.bin")
    facts = {"format_version": 1, "dtype": "u16", "vocab_size": VOCAB_SIZE, "train_tokens": counts["train"],
             "valid_tokens": counts["valid"], "eos_token_id": 0}
    (folder / "tokenization.json").write_text(json.dumps(facts))
    (folder / "tokenizer.json").write_text("{}")
    return folder


def measure_trainer(case, trainer, data, folder):
    """Runs the trainer in a folder of its own. Returns its figures and the device."""
    (folder / "spec.json").write_text(json.dumps(spec_of(case)))
    command = [trainer, folder / "spec.json", "--data", data, "--out", folder / "out"]
    command += ["--threads", str(case.num_threads)]
    device_bytes_before = used_device_bytes() if case.device == "cuda" else None
    with open(folder / "trainer.log", "wb") as log:
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True)
    timer = threading.Timer(TIMEOUT_S, process.kill)
    timer.start()
    try:
        result = watch(process, case)
        if case.device == "cuda":
            used_bytes = used_device_bytes()
            result["peak_bytes"] = used_bytes - device_bytes_before if used_bytes else None
        return result
    finally:
        timer.cancel()
        # Asked to stop it would write its state, which nobody wants.
        process.kill()
        process.wait()


def watch(process, case):
    """Reads events until enough updates are timed. They count once the start's are over and its nodes are on disk."""
    speeds, device_name, usage = [], None, None
    nodes_awaited = set(FIRST_NODES) if case.is_low_rank else set()
    for line in process.stdout:
        event = json.loads(line)
        match event["event"]:
            case "ready":
                device_name = event["device"]
            case "node":
                nodes_awaited.discard(event["kind"])
            case "failed":
                raise SideFailed(event["message"])
            case "step" if usage:
                speeds.append(event["tokens_per_s"])
            case "step" if event["step"] >= NUM_WARM_UP_STEPS and not nodes_awaited:
                usage = Usage(process.pid, counts_resident=case.device == "cpu")
        if len(speeds) == case.num_steps:
            return usage.figures(speeds, case.tokens_per_step) | {"device_name": device_name}
    raise SideFailed(explain_exit(process.wait()))


def used_device_bytes():
    """Memory in use on the GPU that the trainer takes, by whatever process, as the driver counts it. None if it does not
    say."""
    if not shutil.which("nvidia-smi"):
        return None
    gpu = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    command = ["nvidia-smi", f"--id={gpu}", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout) << 20
