"""The random numbers of a run, as the trainer documents them: functions of (seed, purpose, indices, element).

Philox4x32-10 keyed by (seed, purpose) and counted by (element, two indices); uniform numbers in float32 arithmetic, so
that they equal the trainer's bit for bit. The reference takes its random inputs as data and does not import this.
"""

import math

import numpy as np
import torch

from relora_reference import Inputs, parameter_shapes, wrapped_paths

WEIGHTS, FACTORS, ROW_ORDER, OPTIMIZER_RESET = 1, 2, 3, 6


def philox(counter, key):
    """Philox4x32-10 over arrays of counters: four lists of equal length, as uint64 that hold 32 bits."""
    low = np.uint64(0xFFFFFFFF)
    c = [np.asarray(word, dtype=np.uint64) for word in counter]
    k = [np.uint64(word) for word in key]
    for _ in range(10):
        a, b = np.uint64(0xD2511F53) * c[0], np.uint64(0xCD9E8D57) * c[2]
        c = [(b >> np.uint64(32)) ^ c[1] ^ k[0], b & low, (a >> np.uint64(32)) ^ c[3] ^ k[1], a & low]
        k = [(k[0] + np.uint64(0x9E3779B9)) & low, (k[1] + np.uint64(0xBB67AE85)) & low]
    return c


def words(seed, purpose, indices, num_words):
    blocks = np.arange((num_words + 3) // 4, dtype=np.uint64)
    index = [np.full_like(blocks, i) for i in indices]
    out = philox([blocks & np.uint64(0xFFFFFFFF), blocks >> np.uint64(32), *index], (seed, purpose))
    return np.stack(out, axis=1).reshape(-1)[:num_words]


def unit(seed, purpose, indices, shape):
    """In [0, 1): multiples of 2^-24, which float32 holds exactly."""
    drawn = (words(seed, purpose, indices, math.prod(shape)) >> np.uint64(8)).astype(np.float32)
    return torch.from_numpy(drawn * np.float32(2**-24)).view(shape)


def uniform(seed, purpose, indices, shape, width):
    """In ±1/sqrt(width). Every operation rounds to float32, as the trainer's do."""
    bound = np.float32(1) / np.sqrt(np.float32(width))
    drawn = unit(seed, purpose, indices, shape).numpy()
    return torch.from_numpy(drawn * (np.float32(2) * bound) - bound)


def normal(seed, purpose, indices, shape, std):
    """Box-Muller. Not bit for bit the trainer's: logarithm and cosine differ between mathematical libraries."""
    num_pairs = (math.prod(shape) + 1) // 2
    top = (words(seed, purpose, indices, 2 * num_pairs) >> np.uint64(8)).astype(np.float64)
    radius = np.sqrt(-2 * np.log((top[0::2] + 1) / 2**24))
    angle = 2 * np.pi * top[1::2] / 2**24
    pairs = np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1).reshape(-1)
    return torch.tensor(pairs[: math.prod(shape)] * std, dtype=torch.float32).view(shape)


def row_order(seed, num_rows, pass_index):
    """The order of the rows in one pass: a four-round Feistel network, walked until it falls inside."""
    half = max(1, ((num_rows - 1).bit_length() + 1) // 2)
    mask = np.uint64((1 << half) - 1)

    def shuffle(x):
        left, right = x >> np.uint64(half), x & mask
        for r in range(4):
            word = philox([right, *(np.full_like(right, i) for i in (r, pass_index, 0))], (seed, ROW_ORDER))[0]
            left, right = right, left ^ (word & mask)
        return left << np.uint64(half) | right

    x = shuffle(np.arange(num_rows, dtype=np.uint64))
    while (outside := x >= num_rows).any():
        x[outside] = shuffle(x[outside])
    return x.tolist()


def initial_weights(model, seed):
    """Matrices normal around zero, norms one."""
    return {
        name: torch.ones(shape) if len(shape) == 1 else
        normal(seed, WEIGHTS, (0, index), shape, model["initializer_range"])
        for index, (name, shape) in enumerate(parameter_shapes(model).items())
    }


def factor_shapes(spec):
    """The shapes of A and B of every wrapped matrix."""
    rank, shapes = spec["method"].get("rank"), parameter_shapes(spec["model"])
    matrices = [shapes[f"{path}.weight"] for path in wrapped_paths(spec)]
    return [((rank, columns), (rows, rank)) for rows, columns in matrices]


def factors_a(spec, restart):
    """A of every wrapped matrix, as the cycle with this index begins."""
    return {(restart, index): uniform(spec["seed"], FACTORS, (restart, index), a, width=a[1])
            for index, (a, _) in enumerate(factor_shapes(spec))}


def factors_b(spec):
    """B of every matrix of a factorized model. Elsewhere B begins at zero."""
    shapes = factor_shapes(spec)
    return {(0, index): uniform(spec["seed"], FACTORS, (0, len(shapes) + index), b, width=b[1])
            for index, (_, b) in enumerate(shapes)}


def reset_units(spec, reset):
    """What the random reset with this index (from 1) draws, for both moments of A0, B0, A1, B1, …"""
    factors = [shape for pair in factor_shapes(spec) for shape in pair]
    return {(reset, index, moment): unit(spec["seed"], OPTIMIZER_RESET, (reset, 2 * index + moment), shape)
            for index, shape in enumerate(factors) for moment in (0, 1)}


def num_cycles(spec, every):
    """How often this period begins in the low-rank phase."""
    method = spec["method"]
    return -((method["warm_start_steps"] - spec["schedule"]["num_steps"]) // method[every])


def inputs(spec, rows):
    """Everything that a run over these rows of a train.bin takes as given."""
    method, batch, num_steps = spec["method"], spec["batch"], spec["schedule"]["num_steps"]
    restarts = range(num_cycles(spec, "restart_every_steps") if method["type"] == "relora" else 1)
    is_random = method.get("optimizer_reset", {}).get("type") == "random"
    resets = range(1, num_cycles(spec, "reset_every_steps") if is_random else 1)
    first_seq, num_seqs = batch["skip_seqs"], num_steps * batch["num_seqs"]
    num_passes = -(-(first_seq + num_seqs) // len(rows))
    order = [row for index in range(num_passes) for row in row_order(spec["seed"], len(rows), index)]
    order = order[first_seq : first_seq + num_seqs]
    return Inputs(
        weights=initial_weights(spec["model"], spec["seed"]),
        a={key: a for restart in restarts for key, a in factors_a(spec, restart).items()},
        b=factors_b(spec) if method["type"] == "factorized" else {},
        u={key: u for reset in resets for key, u in reset_units(spec, reset).items()},
        batches=rows[order].view(num_steps, batch["num_seqs"], -1),
    )
