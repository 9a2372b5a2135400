"""Specs, data and trainer processes for the tests of this folder."""

import json
import os
import resource
import subprocess
import threading
from functools import partial
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers

LOW_RANK = {
    "rank": 4, "scale": 2.0, "dropout": 0.0,
    "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    "train_embeddings": True, "train_head": True,
}


# After which a trainer is killed.
TIMEOUT_S = 300


def spec(model, method, optimizer, schedule, batch, **others):
    """A normalised spec, for one thread of the CPU."""
    sizes = {
        "preset": None, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 4, "max_position_embeddings": 64, "rms_norm_eps": 1e-6, "rope_theta": 10000.0,
        "initializer_range": 0.05, "tie_word_embeddings": False,
    }
    return {
        "spec_version": 1, "name": "reference", "dataset": "ds_1", "tokenization": "tz_1", "model": sizes | model,
        "method": method, "optimizer": optimizer, "schedule": schedule, "batch": batch,
        "memory": {"recompute": "cheap", "frozen_weights": "full", "merged_weights": "auto"}, "precision": "fp32",
        "deterministic": True, "seed": 7, "eval": {"every_steps": 20, "max_tokens": 100000, "prompts": []},
        "checkpoints": {"every_steps": 10}, "state_every_s": 3600, "resources": {"device": "cpu", "num_gpus": 1},
        "priority": 0, "labels": {}, "max_runtime_s": None, "max_stall_s": 900,
        "retries": {"infrastructure": 5, "user": 0},
    } | others


def write_tokens(folder, train, valid, vocab_size):
    """A data directory of the trainer: token files, and a tokenizer that knows the words w0, w1, …"""
    folder.mkdir()
    for split, tokens in [("train", train), ("valid", valid)]:
        np.asarray(tokens, dtype="<u2").tofile(folder / f"{split}.bin")
    facts = {"format_version": 1, "dtype": "u16", "vocab_size": vocab_size, "train_tokens": len(train),
             "valid_tokens": len(valid), "eos_token_id": 0}
    (folder / "tokenization.json").write_text(json.dumps(facts))
    tokenizer = Tokenizer(models.WordLevel({f"w{i}": i for i in range(vocab_size)}, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
    return folder


def token_rows(data, split, sequence_length):
    """The rows of a split; a last, shorter one is left out."""
    tokens = np.fromfile(Path(data) / f"{split}.bin", dtype="<u2").astype(np.int64)
    return torch.from_numpy(tokens[: len(tokens) // sequence_length * sequence_length]).view(-1, sequence_length)


class Run:
    """A trainer process. A command is sent, or its stdin closed, when one of the steps is reported."""

    def __init__(self, spec, data, folder, resume=None, at_steps=(), send=None, address_space_bytes=None):
        folder.mkdir(exist_ok=True)
        self.out = folder / "out"
        (folder / "spec.json").write_text(json.dumps(spec))
        # One thread: the model is too small to share, and threads that wait for each other are slow on a busy machine.
        command = [os.environ["RELORA_TRAINER"], folder / "spec.json", "--data", data, "--out", self.out]
        command += ["--threads", "1"]
        if resume:
            command += ["--resume", resume]
        pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
        limits = [address_space_bytes] * 2
        limit = partial(resource.setrlimit, resource.RLIMIT_AS, limits) if address_space_bytes else None
        process = subprocess.Popen(command, **pipes, text=True, preexec_fn=limit)
        timer = threading.Timer(TIMEOUT_S, process.kill)
        timer.start()
        self.events = []
        try:
            for line in process.stdout:
                event = json.loads(line)
                self.events.append(event)
                if event["event"] == "step" and event["step"] in at_steps:
                    process.stdin.close() if send is None else process.stdin.write(send + "\n")
                    if send:
                        process.stdin.flush()
            self.log = process.stderr.read()
            self.exit_code = process.wait()
        finally:
            in_time = timer.is_alive()
            timer.cancel()
        if not in_time:
            self.log += f"\nkilled after {TIMEOUT_S} s"

    def of(self, kind):
        return [event for event in self.events if event["event"] == kind]

    def weights(self, step):
        return load_file(self.out / "checkpoints" / str(step) / "model.safetensors")
