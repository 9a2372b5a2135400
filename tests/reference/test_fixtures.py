"""The trainer against the trajectories in fixtures/, and these against the reference that wrote them.

    RELORA_TRAINER=target/release/relora-trainer pytest tests/reference
"""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import draws
import make_fixtures as fixtures
import relora_reference as reference
from support import Run, write_tokens

# Measured: losses and norms of the trainer within 5e-7 of the reference's, weights within 1e-5 of the largest of their
# tensor. That is the rounding of fp32; the losses of two methods are 2e-3 and more apart.
LOSS_RTOL, GRAD_NORM_RTOL, WEIGHT_TOLERANCE = 1e-5, 1e-5, 1e-4


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    rows = fixtures.token_file()
    folder = tmp_path_factory.mktemp("data") / "tokens"
    return write_tokens(folder, rows.flatten(), rows[:40].flatten(), fixtures.VOCAB_SIZE)


def stored(name):
    """A trajectory of the fixtures: spec and series, and the final weights."""
    trajectory = json.loads((fixtures.FOLDER / f"{name}.json").read_text())
    return trajectory, load_file(fixtures.FOLDER / f"{name}.safetensors")


def weight_errors(got, want):
    """By name, relative to the largest element of the tensor."""
    assert got.keys() == want.keys()
    return {name: ((got[name] - weight).abs().max() / weight.abs().max()).item() for name, weight in want.items()}


def distance(ours, theirs):
    """Between all weights of two models, as one vector."""
    return torch.stack([(ours[name] - weight).norm() for name, weight in theirs.items()]).norm().item()


def series_of(run):
    """What the trainer reported, under the fixtures' names."""
    keys = {"losses": "loss", "grad_norms": "grad_norm", "learning_rates": "learning_rate"}
    return {name: [event[key] for event in run.of("step")] for name, key in keys.items()}


def largest_error(got, want):
    return np.abs(np.array(got) / np.array(want) - 1).max()


@pytest.mark.parametrize("name", fixtures.TRAJECTORIES)
def test_the_reference_repeats_its_trajectory(name):
    """Not to the bit: sums are taken in another order on another processor, and twelve digits are stored."""
    trajectory, weights = stored(name)
    assert trajectory["spec"] == fixtures.spec_of(name)
    run = reference.train(trajectory["spec"], fixtures.stored_inputs(trajectory["spec"]))
    for series in ("losses", "grad_norms", "learning_rates"):
        np.testing.assert_allclose(getattr(run, series), trajectory[series], rtol=1e-8, err_msg=series)
    assert max(weight_errors(run.weights, weights).values()) < 1e-6


def test_the_inputs_are_what_the_trainer_draws():
    tensors = load_file(fixtures.FOLDER / "inputs.safetensors")
    drawn = fixtures.drawn_inputs()
    assert drawn.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert torch.equal(drawn[name], tensor), name


def test_the_initial_weights_are_what_the_trainer_draws():
    weights = load_file(fixtures.FOLDER / "initial" / "model.safetensors")
    drawn = draws.initial_weights(fixtures.spec_of("full")["model"], fixtures.SEED)
    assert max(weight_errors(drawn, weights).values()) < 1e-6


def test_philox_gives_the_published_answers():
    """Random123's known-answer file, philox4x32 with 10 rounds."""
    answers = {
        0: [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8],
        0xFFFFFFFF: [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD],
    }
    for word, answer in answers.items():
        assert [int(out) for out in draws.philox([word] * 4, [word] * 2)] == answer


def test_transformers_computes_the_first_loss():
    """The model of the reference is the one that `transformers` knows by these weights."""
    trajectory, _ = stored("full")
    rows = load_file(fixtures.FOLDER / "inputs.safetensors")["batches"][0].long()
    model = AutoModelForCausalLM.from_pretrained(fixtures.FOLDER / "initial", dtype=torch.float64)
    with torch.no_grad():
        loss = model(rows, labels=rows).loss.item()
    # transformers computes its norms and rotations in fp32.
    assert abs(loss - trajectory["losses"][0]) < 1e-6


def test_no_two_methods_have_one_trajectory():
    """A trainer that takes one option for another is off by far more than the bounds."""
    losses = {name: stored(name)[0]["losses"] for name in fixtures.TRAJECTORIES}
    for index, (name, ours) in enumerate(losses.items()):
        assert ours[-1] < ours[0] - 0.5, f"{name} learned nothing"
        for other in list(losses)[:index]:
            common = min(len(ours), len(losses[other]))
            assert largest_error(ours[:common], losses[other][:common]) > 100 * LOSS_RTOL, f"{name} and {other}"


def keep_a(model, inputs, restart):
    for _, b in model.factors.values():
        torch.no_grad()(b.zero_)()


def clear_one_element_less(x, frac):
    return x.abs() >= x.abs().flatten().kthvalue(round(frac * x.numel())).values


def with_joint_mask(joint_mask, kept=reference.kept):
    return lambda reset, moments, draws: kept(reset | {"joint_mask": joint_mask}, moments, draws)


def draw_by_columns(reset, moments, draws):
    masks = [u.T.reshape(u.shape).double() >= reset["frac"] for u in draws]
    return [masks[0], masks[0]]


def decay_everything(parameters, o):
    return torch.optim.AdamW(parameters.values(), betas=tuple(o["betas"]), eps=o["eps"], weight_decay=o["weight_decay"])


MISTAKES = {
    "a restart leaves A as it was": ("zero", "draw_again", keep_a),
    "a mask clears one element less": ("magnitude", "larger_than_smallest", clear_one_element_less),
    "magnitudes choose two masks instead of one": ("magnitude", "kept", with_joint_mask(False)),
    "magnitudes choose one mask instead of two": ("magnitude_independent", "kept", with_joint_mask(True)),
    "draws choose two masks instead of one": ("random", "kept", with_joint_mask(False)),
    "draws choose one mask instead of two": ("random_independent", "kept", with_joint_mask(True)),
    "a mask is drawn column by column": ("random", "kept", draw_by_columns),
    "norms and embedding decay": ("zero", "adamw", decay_everything),
}


@pytest.mark.parametrize("name, function, mistake", MISTAKES.values(), ids=MISTAKES.keys())
def test_a_mistake_would_be_seen(monkeypatch, name, function, mistake):
    trajectory, weights = stored(name)
    monkeypatch.setattr(reference, function, mistake)
    run = reference.train(trajectory["spec"], fixtures.stored_inputs(trajectory["spec"]))
    assert largest_error(run.losses, trajectory["losses"]) > 10 * LOSS_RTOL
    assert max(weight_errors(run.weights, weights).values()) > 10 * WEIGHT_TOLERANCE


@pytest.mark.parametrize("name", fixtures.TRAJECTORIES)
def test_the_trainer_follows_the_reference(name, data, tmp_path):
    trajectory, weights = stored(name)
    run = Run(trajectory["spec"], data, tmp_path)
    assert run.exit_code == 0, run.log
    got = series_of(run)
    np.testing.assert_allclose(got["learning_rates"], trajectory["learning_rates"], rtol=1e-9)
    np.testing.assert_allclose(got["losses"], trajectory["losses"], rtol=LOSS_RTOL)
    np.testing.assert_allclose(got["grad_norms"], trajectory["grad_norms"], rtol=GRAD_NORM_RTOL)
    errors = weight_errors(run.weights(trajectory["spec"]["schedule"]["num_steps"]), weights)
    assert max(errors.values()) < WEIGHT_TOLERANCE, errors


def test_control_is_full_training_of_a_smaller_model(data, tmp_path):
    sizes = {"hidden_size": 16, "intermediate_size": 24}
    spec = fixtures.spec_of("full")
    smaller = spec | {"model": spec["model"] | sizes}
    expected = reference.train(smaller, draws.inputs(smaller, fixtures.token_file()))
    run = Run(spec | {"method": {"type": "control", "rank": 4} | sizes}, data, tmp_path)
    assert run.exit_code == 0, run.log
    np.testing.assert_allclose(series_of(run)["losses"], expected.losses, rtol=LOSS_RTOL)


def test_sequences_that_are_passed_over_come_first(data, tmp_path):
    """And the run goes on into the next pass over the data, whose order is another."""
    spec = fixtures.spec_of("full")
    num_steps, skip_seqs = 8, fixtures.NUM_STEPS * fixtures.NUM_SEQS - 20
    spec |= {"schedule": spec["schedule"] | {"num_steps": num_steps}, "batch": spec["batch"] | {"skip_seqs": skip_seqs}}
    expected = reference.train(spec, draws.inputs(spec, fixtures.token_file()))
    run = Run(spec, data, tmp_path)
    assert run.exit_code == 0, run.log
    np.testing.assert_allclose(series_of(run)["losses"], expected.losses, rtol=LOSS_RTOL)


@pytest.mark.parametrize("name", ["full", "lora", "zero"])
def test_in_bf16_the_trainer_stays_near_the_reference(name, data, tmp_path):
    """bf16 rounds every operand by up to 2^-9, and a loss is a mean over many.

    Measured: losses within 1.5e-3, norms within 7e-3, and the final weights 1.4e-2 of their way from the initial ones
    off. The bounds leave a factor of three for other processors.
    """
    trajectory, weights = stored(name)
    run = Run(trajectory["spec"] | {"precision": "bf16"}, data, tmp_path)
    assert run.exit_code == 0, run.log
    got = series_of(run)
    loss_error = largest_error(got["losses"], trajectory["losses"])
    assert 1e-5 < loss_error < 5e-3, "nothing was rounded to bf16, or more than that"
    assert largest_error(got["grad_norms"], trajectory["grad_norms"]) < 2e-2
    initial = load_file(fixtures.FOLDER / "initial" / "model.safetensors")
    final = run.weights(trajectory["spec"]["schedule"]["num_steps"])
    assert distance(final, weights) < 4e-2 * distance(initial, weights)
