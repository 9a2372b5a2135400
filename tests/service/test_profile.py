"""`relora train … --profile FILE`: a trace of some updates of either phase, with every part named."""

import json
import subprocess

from conftest import TEXT
from local_server import RELORA

# Every phase of an update, with every kind of layer, as docs/performance.md counts them.
SPANS = {
    "update": {"full rank", "low rank"},
    "data": {"read rows"},
    "weights": {"refresh", "W + sBA"},
    "forward": {
        "forward", "embedding", "norm", "queries, keys, values", "rotary", "attention", "output", "gate and up", "swiglu",
        "down",
    },
    "loss": {"loss", "norm", "logits", "cross-entropy", "head"},
    "backward": {
        "backward", "norm", "queries, keys, values", "rotary", "attention", "output", "gate and up", "swiglu", "down",
        "embedding", "dx = dy W", "gradients of parameters", "swiglu again", "norm again",
    },
    "optimizer": {"gradients to zero", "gradient norm", "wait for the device", "AdamW"},
}
NUM_UPDATES = 8


def test_a_profile_names_every_phase_and_every_kind_of_layer(make_service, tmp_path):
    text, spec, profile = tmp_path / "text.txt", tmp_path / "spec.json", tmp_path / "profile.json"
    text.write_text(TEXT)
    spec.write_text(json.dumps({
        "model": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3, "num_attention_heads": 2},
        "method": {"type": "relora", "rank": 4, "warm_start_steps": 12, "restart_every_steps": 12},
        "schedule": {"num_steps": 24}, "batch": {"num_seqs": 2, "sequence_length": 32},
    }))
    command = [RELORA, "train", spec, "--text", text, "--vocab-size", "300", "--out", tmp_path / "out"]
    subprocess.run([*command, "--profile", profile], env=make_service().env, check=True, timeout=120)

    events = json.loads(profile.read_text())["traceEvents"]
    names = {}
    for event in events:
        assert event["ph"] == "X" and event["dur"] >= 0, event
        names.setdefault(event["cat"], set()).add(event["name"])
    assert names == SPANS
    updates = [event for event in events if event["cat"] == "update"]
    for phase in SPANS["update"]:
        assert sum(event["name"] == phase for event in updates) == NUM_UPDATES
    # Every span lies within an update, and of a layer's parts there is one to a layer.
    spans = sorted((event["ts"], event["ts"] + event["dur"]) for event in updates)
    for event in events:
        assert any(start <= event["ts"] and event["ts"] + event["dur"] <= end + 1 for start, end in spans), event
    downs = [event for event in events if (event["cat"], event["name"]) == ("forward", "down")]
    assert len(downs) == 3 * len(updates)
