"""What is measured: sizes and settings, and what follows from them by counting."""

import json
from collections import Counter
from dataclasses import asdict, dataclass

VOCAB_SIZE, RANK, ALPHA = 32100, 128, 32
CLIP_NORM = 1.0
ADAMW = {"betas": [0.9, 0.999], "eps": 1e-8, "weight_decay": 0.0}
LEARNING_RATE = 1e-4
RMS_NORM_EPS, ROPE_THETA = 1e-6, 10000.0

# Updates of every side that are not timed: the first ones allocate, and compile.
NUM_WARM_UP_STEPS = 2


@dataclass(frozen=True)
class Sizes:
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_layers: int


# As in src/domain/spec/presets.rs.
MODELS = {
    "60m": Sizes(512, 1376, 8, 8),
    "130m": Sizes(768, 2048, 12, 12),
    "350m": Sizes(1024, 2736, 16, 24),
    "1b": Sizes(2048, 5461, 32, 24),
}


@dataclass(frozen=True)
class Case:
    """One row of the results. `memory` is the spec's section of that name, or None for its defaults."""

    model: str
    dtype: str
    method: str
    dropout: float
    device: str
    num_seqs: int
    sequence_length: int
    micro_batch_seqs: int
    num_steps: int
    num_threads: int
    memory: dict | None = None
    # Of our trainer alone; the published code asks for no such algorithms.
    deterministic: bool = False

    @classmethod
    def from_json(cls, text):
        return cls(**json.loads(text))

    def to_json(self):
        return json.dumps(asdict(self))

    @property
    def sizes(self):
        return MODELS[self.model]

    @property
    def is_low_rank(self):
        return self.method == "relora"

    @property
    def tokens_per_step(self):
        return self.num_seqs * self.sequence_length

    def __str__(self):
        dropout = f" dropout {self.dropout:g}" if self.is_low_rank else ""
        memory = "".join(f" {value}" for value in (self.memory or {}).values())
        deterministic = " deterministic" if self.deterministic else ""
        return f"{self.model} {self.dtype} {self.method}{dropout}{memory}{deterministic}"


def linear_shapes(sizes):
    """(out, in) of the seven matrices of a layer."""
    h, f = sizes.hidden_size, sizes.intermediate_size
    return [(h, h)] * 4 + [(f, h)] * 2 + [(h, f)]


def flops_per_token(case):
    """Of forward and backward as the published code computes them: W x beside B (A x), W without a gradient.

    Attention counts its causal half and no recomputation; elementwise operations count nothing.
    """
    sizes = case.sizes
    shapes = linear_shapes(sizes)
    if case.is_low_rank:
        per_layer = sum(4 * o * i + 6 * RANK * (o + i) for o, i in shapes)
    else:
        per_layer = sum(6 * o * i for o, i in shapes)
    attention = 6 * case.sequence_length * sizes.hidden_size
    return sizes.num_layers * (per_layer + attention) + 6 * VOCAB_SIZE * sizes.hidden_size


def frozen_weight_bytes(case):
    """Of the frozen matrices as our trainer keeps them between updates, without copies made of them for products."""
    if not case.is_low_rank:
        return 0
    storage = (case.memory or {}).get("frozen_weights", "full")
    per_layer = sum(_stored_bytes(storage, o, i) for o, i in linear_shapes(case.sizes))
    return case.sizes.num_layers * per_layer


def _stored_bytes(storage, num_rows, num_columns):
    """fp32; or 8 bits with an fp32 scale per row; or 4 bits with an fp32 scale per block of 64."""
    count = num_rows * num_columns
    return {"full": 4 * count, "int8": count + 4 * num_rows, "nf4": count // 2 + 4 * count // 64}[storage]


def matrix_products(case):
    """The products of one micro-batch in linears and head, forward and backward: (m, k, n, layout) -> count.

    The layout says which operand is transposed in memory, as it is in a training step: `nt` in x Wᵀ, `nn` in y W,
    `tn` in yᵀ x.
    """
    num_tokens = case.micro_batch_seqs * case.sequence_length
    products = Counter()

    def add(num_outputs, num_inputs, count, has_gradient):
        products[num_tokens, num_inputs, num_outputs, "nt"] += count
        products[num_tokens, num_outputs, num_inputs, "nn"] += count
        if has_gradient:
            products[num_outputs, num_tokens, num_inputs, "tn"] += count

    for num_outputs, num_inputs in linear_shapes(case.sizes):
        add(num_outputs, num_inputs, case.sizes.num_layers, not case.is_low_rank)
        if case.is_low_rank:
            add(RANK, num_inputs, case.sizes.num_layers, True)
            add(num_outputs, RANK, case.sizes.num_layers, True)
    add(VOCAB_SIZE, case.sizes.hidden_size, 1, True)
    return products
