"""Writes fixtures/: the inputs of the reference's trajectories, and the trajectories themselves.

    python tests/reference/make_fixtures.py

- initial/: the weights that every trajectory begins with, as a `transformers` checkpoint.
- inputs.safetensors: batches (num_steps, num_seqs, sequence_length), and the draws of the low-rank phase by what is
  wrapped, everything or some matrices: `{wrapped}.a.{restart}.{matrix}`, `{wrapped}.b.0.{matrix}`
  and `{wrapped}.u.{reset}.{factor}.{moment}`.
- {name}.json: the normalised spec, and loss, norm of the gradient before clipping and learning rate of every update.
- {name}.safetensors: the merged weights at the end.
"""

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

import draws
import relora_reference as reference
import support

FOLDER = Path(__file__).parent / "fixtures"
SEED, VOCAB_SIZE, NUM_SEQS, SEQUENCE_LENGTH, NUM_STEPS = 7, 64, 6, 17, 80

MODEL = {"vocab_size": VOCAB_SIZE, "num_key_value_heads": 2}
# Adam's update is close to a sign where moments are new and gradients small, and there a rounding error decides: with
# an eps of 1e-8 and betas[1] of 0.999 the weights of `zero` stray ten times further in fp32 than with these. Some
# updates of every trajectory are clipped, and some are not.
OPTIMIZER = {"learning_rate": 1e-2, "warm_start_learning_rate": 5e-3, "betas": [0.9, 0.95], "eps": 1e-5,
             "weight_decay": 0.1, "clip_norm": 1.0}
# A moment kept beside a square that was cleared is divided by eps alone: 1e-8 is chaos, and with 1e-5 the norms of
# `random_independent` stray a hundred times further.
OPTIMIZER_OF_INDEPENDENT_MASKS = OPTIMIZER | {"eps": 1e-3}

LORA = support.LOW_RANK | {"type": "lora", "warm_start_steps": 16, "relora_warmup_steps": 3}
RELORA = LORA | {
    "type": "relora", "restart_every_steps": 16, "reset_every_steps": 16, "restart_warmup_steps": 3,
    "restart_schedule": "jagged", "restart_lr": "one_over_w",
    "optimizer_reset": {"type": "zero", "reset_step_count": True}, "allow_short_last_cycle": False,
    "rank_threshold": None,
}
MAGNITUDE = {"type": "magnitude", "frac": 0.9, "reset_step_count": True, "joint_mask": True}
RANDOM = MAGNITUDE | {"type": "random"}
INDEPENDENT = {"joint_mask": False, "reset_step_count": False}


def relora(**changes):
    return RELORA | changes


# name -> method, and what else differs
TRAJECTORIES = {
    "full": ({"type": "full"}, {}),
    # With a scale of 2, as below, rounding errors in a matrix that is s·B·A alone grow a hundred thousandfold.
    "factorized": (support.LOW_RANK | {"type": "factorized", "scale": 0.5}, {}),
    "lora": (LORA, {}),
    "zero": (RELORA, {}),
    "zero_keeping_step_count": (relora(optimizer_reset={"type": "zero", "reset_step_count": False}), {}),
    "magnitude": (relora(optimizer_reset=MAGNITUDE), {}),
    "magnitude_independent": (relora(optimizer_reset=MAGNITUDE | INDEPENDENT),
                              {"optimizer": OPTIMIZER_OF_INDEPENDENT_MASKS}),
    "random": (relora(optimizer_reset=RANDOM), {}),
    "random_independent": (relora(optimizer_reset=RANDOM | INDEPENDENT), {"optimizer": OPTIMIZER_OF_INDEPENDENT_MASKS}),
    "none": (relora(optimizer_reset={"type": "none"}), {}),
    "restart_lr_zero": (relora(restart_lr="zero"), {}),
    "plain": (relora(restart_schedule="plain"), {}),
    "cyclical": (relora(restart_schedule="cyclical"), {}),
    "online": (relora(restart_every_steps=5, reset_every_steps=15), {"num_steps": 76}),
    "some_matrices": (relora(target_modules=["q_proj", "v_proj", "down_proj"], train_embeddings=False,
                             train_head=False), {}),
}


def spec_of(name):
    method, changes = TRAJECTORIES[name]
    schedule = {"num_steps": changes.get("num_steps", NUM_STEPS), "warmup_steps": 4, "min_lr_frac": 0.1}
    batch = {"num_seqs": NUM_SEQS, "sequence_length": SEQUENCE_LENGTH, "micro_batch_seqs": 4,
             "skip_seqs": 0}
    return support.spec(MODEL, method, changes.get("optimizer", OPTIMIZER), schedule, batch, seed=SEED)


def wrapped_of(spec):
    return "all" if len(spec["method"].get("target_modules", support.LOW_RANK["target_modules"])) == 7 else "some"


def token_file():
    """Rows of a train.bin that one run reads once: tokens follow each other with some regularity."""
    noise = draws.words(SEED, 0, (0, 0), NUM_STEPS * NUM_SEQS * SEQUENCE_LENGTH)
    tokens, token = [], 1
    for word in noise.tolist():
        token = (token * 5 + word % 6) % VOCAB_SIZE
        tokens.append(token)
    return torch.tensor(tokens, dtype=torch.int16).view(-1, SEQUENCE_LENGTH)


def drawn_inputs():
    """The tensors of inputs.safetensors, as the trainer would draw them."""
    rows = token_file()
    tensors = {"batches": draws.inputs(spec_of("full"), rows).batches.contiguous()}
    for name in TRAJECTORIES:
        spec = spec_of(name)
        wrapped, inputs = wrapped_of(spec), draws.inputs(spec, rows)
        for kind, drawn in [("a", inputs.a), ("b", inputs.b), ("u", inputs.u)]:
            tensors |= {f"{wrapped}.{kind}.{'.'.join(map(str, key))}": tensor for key, tensor in drawn.items()}
    return tensors


def stored_inputs(spec):
    """What the trajectory of this spec takes as given, read from the fixtures."""
    tensors = load_file(FOLDER / "inputs.safetensors")
    batches = tensors.pop("batches")[: spec["schedule"]["num_steps"]]
    drawn = {"a": {}, "b": {}, "u": {}}
    for name, tensor in tensors.items():
        wrapped, kind, *key = name.split(".")
        if wrapped == wrapped_of(spec):
            drawn[kind][tuple(map(int, key))] = tensor
    return reference.Inputs(load_file(FOLDER / "initial" / "model.safetensors"), batches=batches, **drawn)


def write_initial(folder):
    spec = spec_of("full")
    sizes = {key: value for key, value in spec["model"].items() if key != "preset"}
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu",
              "torch_dtype": "float32", "bos_token_id": None, "eos_token_id": 0, "attention_bias": False,
              "mlp_bias": False} | sizes
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    save_file(draws.initial_weights(spec["model"], SEED), folder / "model.safetensors", metadata={"format": "pt"})


def main():
    shutil.rmtree(FOLDER, ignore_errors=True)
    FOLDER.mkdir()
    write_initial(FOLDER / "initial")
    save_file(drawn_inputs(), FOLDER / "inputs.safetensors")
    for name in TRAJECTORIES:
        spec = spec_of(name)
        run = reference.train(spec, stored_inputs(spec))
        # Twelve digits: far below what any comparison resolves, far above float32.
        series = {key: [float(f"{x:.12g}") for x in getattr(run, key)]
                  for key in ("losses", "grad_norms", "learning_rates")}
        lines = [f'"spec": {json.dumps(spec)}', *(f'"{key}": {json.dumps(values)}' for key, values in series.items())]
        (FOLDER / f"{name}.json").write_text("{\n" + ",\n".join(lines) + "\n}\n")
        save_file(run.weights, FOLDER / f"{name}.safetensors")
        print(f"{name}: loss {run.losses[0]:.4f} to {run.losses[-1]:.4f}, largest norm {max(run.grad_norms):.3f}")


if __name__ == "__main__":
    main()
