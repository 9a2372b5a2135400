"""ReLoRA in plain PyTorch, written from the method's description and not from the trainer.

It draws initial weights, factors and the order of rows as the trainer documents them (Philox4x32-10, a Feistel
permutation), then trains in the most direct way there is: one batch at once, `torch.optim.AdamW`, no flat buffers.
"""

import json
import math
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

WEIGHTS, FACTORS, ROW_ORDER = 1, 2, 3


# --- Random numbers: functions of (seed, purpose, indices, element) ---


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
    return np.stack(out, axis=1).reshape(-1)


def uniform(seed, purpose, indices, shape, bound):
    unit = (words(seed, purpose, indices, math.prod(shape)) >> np.uint64(8)).astype(np.float64) / 2**24
    return torch.tensor((unit * 2 * bound - bound)[: math.prod(shape)], dtype=torch.float32).view(shape)


def normal(seed, purpose, indices, shape, std):
    top = (words(seed, purpose, indices, math.prod(shape)) >> np.uint64(8)).astype(np.float64)
    radius = np.sqrt(-2 * np.log((top[0::2] + 1) / 2**24))
    angle = 2 * np.pi * top[1::2] / 2**24
    pairs = np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1).reshape(-1)
    return torch.tensor(pairs[: math.prod(shape)] * std, dtype=torch.float32).view(shape)


def row_order(seed, num_rows, pass_index):
    """The order of the rows in one pass: a four-round Feistel network, walked until it falls inside."""
    half = max(1, ((num_rows - 1).bit_length() + 1) // 2)
    mask = (1 << half) - 1

    def shuffle(x):
        left, right = x >> half, x & mask
        for r in range(4):
            word = int(philox([[right], [r], [pass_index], [0]], (seed, ROW_ORDER))[0][0])
            left, right = right, left ^ (word & mask)
        return left << half | right

    def walk(x):
        x = shuffle(x)
        return x if x < num_rows else walk(x)

    return [walk(index) for index in range(num_rows)]


# --- The model ---

LINEARS = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
           "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]


def parameter_shapes(m):
    """Name -> shape, in the order in which initial weights are drawn."""
    h, f, v = m["hidden_size"], m["intermediate_size"], m["vocab_size"]
    kv = m["num_key_value_heads"] * h // m["num_attention_heads"]
    shapes = {"model.embed_tokens.weight": (v, h)}
    for layer in range(m["num_hidden_layers"]):
        for name, shape in zip(LINEARS, [(h, h), (kv, h), (kv, h), (h, h), (f, h), (f, h), (h, f)]):
            shapes[f"model.layers.{layer}.{name}.weight"] = shape
        for name in ["input_layernorm", "post_attention_layernorm"]:
            shapes[f"model.layers.{layer}.{name}.weight"] = (h,)
    shapes["model.norm.weight"] = (h,)
    if not m["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (v, h)
    return shapes


def initial_weights(m, seed):
    weights = {}
    for index, (name, shape) in enumerate(parameter_shapes(m).items()):
        is_norm = len(shape) == 1
        weights[name] = torch.ones(shape) if is_norm else normal(seed, WEIGHTS, (0, index), shape, m["initializer_range"])
    return weights


class Model:
    def __init__(self, m, weights, scale):
        self.m, self.weights, self.scale, self.factors = m, weights, scale, {}

    def linear(self, x, path):
        y = x @ self.weights[f"{path}.weight"].T
        if path in self.factors:
            a, b = self.factors[path]
            y = y + self.scale * ((x @ a.T) @ b.T)
        return y

    def norm(self, x, name):
        return x / torch.sqrt((x * x).mean(-1, keepdim=True) + self.m["rms_norm_eps"]) * self.weights[f"{name}.weight"]

    def rotate(self, x):
        t, d = x.shape[-2:]
        frequency = self.m["rope_theta"] ** (-torch.arange(0, d, 2, dtype=torch.float64) / d)
        angle = torch.outer(torch.arange(t, dtype=torch.float64), frequency)
        turn = torch.polar(torch.ones_like(angle), angle).to(torch.complex64)
        turned = torch.complex(x[..., : d // 2], x[..., d // 2 :]) * turn
        return torch.cat([turned.real, turned.imag], -1)

    def logits(self, tokens):
        m, (b, t) = self.m, tokens.shape
        heads, kv_heads = m["num_attention_heads"], m["num_key_value_heads"]
        x = self.weights["model.embed_tokens.weight"][tokens]
        for layer in range(m["num_hidden_layers"]):
            path = f"model.layers.{layer}"
            n = self.norm(x, f"{path}.input_layernorm")
            q, k, v = (
                self.linear(n, f"{path}.self_attn.{p}_proj").view(b, t, count, -1).transpose(1, 2)
                for p, count in [("q", heads), ("k", kv_heads), ("v", kv_heads)]
            )
            k, v = (y.repeat_interleave(heads // kv_heads, 1) for y in (k, v))
            scores = self.rotate(q) @ self.rotate(k).transpose(-1, -2) / math.sqrt(q.shape[-1])
            future = torch.ones(t, t, dtype=torch.bool).triu(1)
            mixed = scores.masked_fill(future, -math.inf).softmax(-1) @ v
            x = x + self.linear(mixed.transpose(1, 2).reshape(b, t, -1), f"{path}.self_attn.o_proj")
            n = self.norm(x, f"{path}.post_attention_layernorm")
            gate, up = self.linear(n, f"{path}.mlp.gate_proj"), self.linear(n, f"{path}.mlp.up_proj")
            x = x + self.linear(F.silu(gate) * up, f"{path}.mlp.down_proj")
        head = "model.embed_tokens.weight" if m["tie_word_embeddings"] else "lm_head.weight"
        return self.norm(x, "model.norm") @ self.weights[head].T

    def loss(self, rows):
        logits = self.logits(rows)[:, :-1]
        return F.cross_entropy(logits.reshape(-1, logits.shape[-1]), rows[:, 1:].reshape(-1))


# --- The schedule ---


def cosine(q, floor):
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * q))


def warm_cosine(t, total, warmup, floor):
    return t / warmup if t < warmup else cosine((t - warmup) / max(1, total - warmup), floor)


def jagged_cosine(t, total, warmup, every, restart_warmup, floor):
    k, rho = divmod(t, every)
    if t < every or rho >= restart_warmup:
        return warm_cosine(t, total, warmup, floor)
    join = cosine((k * every + restart_warmup - warmup) / max(1, total - warmup), floor)
    return (rho + 1) / restart_warmup * join


# --- Training ---


def adamw(parameters, o):
    """Decay acts on matrices, and neither on norms nor on the embedding."""
    decays = {name: p for name, p in parameters.items() if p.dim() == 2 and "embed_tokens" not in name}
    others = [p for name, p in parameters.items() if name not in decays]
    groups = [{"params": list(decays.values()), "weight_decay": o["weight_decay"]}]
    if others:
        groups.append({"params": others, "weight_decay": 0.0})
    return torch.optim.AdamW(groups, betas=tuple(o["betas"]), eps=o["eps"])


def draw_factors(model, spec, restart):
    rank, shapes = spec["method"]["rank"], parameter_shapes(spec["model"])
    paths = [f"model.layers.{layer}.{name}" for layer in range(spec["model"]["num_hidden_layers"]) for name in LINEARS]
    for index, path in enumerate(paths):
        rows, columns = shapes[f"{path}.weight"]
        a = uniform(spec["seed"], FACTORS, (restart, index), (rank, columns), 1 / math.sqrt(columns))
        model.factors[path] = [a.requires_grad_(), torch.zeros(rows, rank).requires_grad_()]


def training_batches(spec, data_dir):
    facts = json.loads((Path(data_dir) / "tokenization.json").read_text())
    tokens = np.fromfile(Path(data_dir) / "train.bin", dtype={"u16": "<u2", "u32": "<u4"}[facts["dtype"]])
    length, num_seqs = spec["batch"]["sequence_length"], spec["batch"]["num_seqs"]
    rows = torch.from_numpy(tokens[: len(tokens) // length * length].astype(np.int64)).view(-1, length)
    orders = {}
    for step in range(spec["schedule"]["num_steps"]):
        picked = []
        for sequence in range(step * num_seqs, (step + 1) * num_seqs):
            pass_index, index = divmod(sequence, len(rows))
            if pass_index not in orders:
                orders[pass_index] = row_order(spec["seed"], len(rows), pass_index)
            picked.append(orders[pass_index][index])
        yield rows[picked]


def train(spec, data_dir):
    """The loss of every step, and the final merged weights."""
    method, o, schedule = spec["method"], spec["optimizer"], spec["schedule"]
    warm, every, total = method["warm_start_steps"], method["restart_every_steps"], schedule["num_steps"]
    model = Model(spec["model"], initial_weights(spec["model"], spec["seed"]), method["alpha"] / method["rank"])
    for weight in model.weights.values():
        weight.requires_grad_()
    full, lora, losses = adamw(model.weights, o), None, []

    for step, rows in enumerate(training_batches(spec, data_dir)):
        if step == warm:
            for name, weight in model.weights.items():
                weight.requires_grad_(not any(name.endswith(f"{linear}.weight") for linear in LINEARS))
            full = adamw({name: w for name, w in model.weights.items() if w.requires_grad}, o)
        if step >= warm and (step - warm) % every == 0:
            merge(model)
            draw_factors(model, spec, (step - warm) // every)
            lora = adamw({f"{path}.{i}": f for path, pair in model.factors.items() for i, f in enumerate(pair)}, o)

        if step < warm:
            rate = o["warm_start_learning_rate"] * warm_cosine(step, total, schedule["warmup_steps"], schedule["min_lr_frac"])
        else:
            rate = o["learning_rate"] * jagged_cosine(
                step - warm, total - warm, method["relora_warmup_steps"], every, method["restart_warmup_steps"],
                schedule["min_lr_frac"])
        optimizers = [optimizer for optimizer in (full, lora) if optimizer]
        groups = [group for optimizer in optimizers for group in optimizer.param_groups]
        trained = [p for group in groups for p in group["params"]]
        for group in groups:
            group["lr"] = rate
        for p in trained:
            p.grad = None
        loss = model.loss(rows)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, o["clip_norm"])
        for optimizer in optimizers:
            optimizer.step()
        losses.append(loss.item())
    merge(model)
    return losses, {name: weight.detach() for name, weight in model.weights.items()}


@torch.no_grad()
def merge(model):
    for path, (a, b) in model.factors.items():
        model.weights[f"{path}.weight"] += model.scale * (b @ a)
    model.factors.clear()
