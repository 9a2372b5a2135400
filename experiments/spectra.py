"""Singular values of what training changed: of W_end - W_start, for every wrapped matrix."""

import re

import numpy as np
from safetensors.numpy import load

MATRIX = re.compile(r"model\.layers\.\d+\.(?:self_attn|mlp)\.(?P<kind>\w+_proj)\.weight")
KINDS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def spectra(start, end):
    """Singular values by kind of matrix, one list per layer, largest first; of two safetensors files' bytes."""
    start, end = load(start), load(end)
    if start.keys() != end.keys():
        raise ValueError("the two files do not name the same tensors")
    values = {kind: [] for kind in KINDS}
    for name in sorted(start, key=_numbers_as_numbers):
        if found := MATRIX.fullmatch(name):
            delta = end[name].astype(np.float64) - start[name].astype(np.float64)
            singular = np.linalg.svd(delta, compute_uv=False)
            values[found["kind"]].append([float(f"{value:.4g}") for value in singular])
    return values


def num_above(layers, threshold):
    """How many singular values of all layers exceed a threshold, and how many there are."""
    values = [value for layer in layers for value in layer]
    return sum(value > threshold for value in values), len(values)


def _numbers_as_numbers(name):
    return [int(part) if part.isdigit() else part for part in name.split(".")]
