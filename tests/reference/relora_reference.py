"""ReLoRA and what it is compared with in plain PyTorch, written from the method's description and not from the trainer.

Methods: `full`, `factorized` (every wrapped matrix is s·B·A), `lora` (W + s·B·A) and `relora` (LoRA with merges and
optimizer resets); the last two may begin with full-rank updates, the warm start. It trains in the most direct way
there is: one batch at once, autograd, `torch.optim.AdamW` with one tensor per parameter.

Weights, factors, draws and batches are given, see `Inputs`. All arithmetic is in float64: what a comparison shows is
the rounding, or the mistake, of the other side.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F

# By the names under which a method targets them, in the order in which matrices are counted.
LINEARS = {
    "q_proj": "self_attn.q_proj", "k_proj": "self_attn.k_proj", "v_proj": "self_attn.v_proj",
    "o_proj": "self_attn.o_proj", "gate_proj": "mlp.gate_proj", "up_proj": "mlp.up_proj", "down_proj": "mlp.down_proj",
}
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


@dataclass
class Inputs:
    """What a run takes as given. Matrices are counted as in `wrapped_paths`, factors as A0, B0, A1, B1, …"""

    weights: dict  # name -> initial value
    a: dict  # (restart, matrix) -> A as the cycle begins
    b: dict  # (0, matrix) -> B of a factorized model; elsewhere B begins at zero
    u: dict  # (reset, factor, moment) -> uniform draws of a random reset
    batches: torch.Tensor  # (num_steps, num_seqs, sequence_length)


@dataclass
class Trajectory:
    """What every update reported, the norm before clipping, and the merged weights at the end."""

    losses: list
    grad_norms: list
    learning_rates: list
    weights: dict


def parameter_shapes(m):
    """Name -> shape, in the order in which initial weights are drawn."""
    h, f, v = m["hidden_size"], m["intermediate_size"], m["vocab_size"]
    kv = m["num_key_value_heads"] * h // m["num_attention_heads"]
    shapes = {EMBEDDING: (v, h)}
    for layer in range(m["num_hidden_layers"]):
        for name, shape in zip(LINEARS.values(), [(h, h), (kv, h), (kv, h), (h, h), (f, h), (f, h), (h, f)]):
            shapes[f"model.layers.{layer}.{name}.weight"] = shape
        for name in ["input_layernorm", "post_attention_layernorm"]:
            shapes[f"model.layers.{layer}.{name}.weight"] = (h,)
    shapes["model.norm.weight"] = (h,)
    if not m["tie_word_embeddings"]:
        shapes[HEAD] = (v, h)
    return shapes


def wrapped_paths(spec):
    """The matrices that get factors, layer by layer."""
    targets = spec["method"].get("target_modules", [])
    return [f"model.layers.{layer}.{path}" for layer in range(spec["model"]["num_hidden_layers"])
            for name, path in LINEARS.items() if name in targets]


class Model:
    def __init__(self, m, weights, scale):
        self.m, self.weights, self.scale = m, weights, scale
        self.factors = {}  # path -> [A (rank, in), B (out, rank)]

    def linear(self, x, path):
        """W x + s·B·A x, of what there is: factors only where wrapped, no W in a factorized model."""
        weight, factors = self.weights.get(f"{path}.weight"), self.factors.get(path)
        if factors is None:
            return x @ weight.T
        a, b = factors
        branch = self.scale * ((x @ a.T) @ b.T)
        return branch if weight is None else x @ weight.T + branch

    def norm(self, x, name):
        return x / torch.sqrt((x * x).mean(-1, keepdim=True) + self.m["rms_norm_eps"]) * self.weights[f"{name}.weight"]

    def rotate(self, x):
        t, d = x.shape[-2:]
        frequency = self.m["rope_theta"] ** (-torch.arange(0, d, 2, dtype=torch.float64) / d)
        angle = torch.outer(torch.arange(t, dtype=torch.float64), frequency)
        turned = torch.complex(x[..., : d // 2], x[..., d // 2 :]) * torch.polar(torch.ones_like(angle), angle)
        return torch.cat([turned.real, turned.imag], -1)

    def logits(self, tokens):
        m, (b, t) = self.m, tokens.shape
        heads, kv_heads = m["num_attention_heads"], m["num_key_value_heads"]
        x = self.weights[EMBEDDING][tokens]
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
        return self.norm(x, "model.norm") @ self.weights[EMBEDDING if m["tie_word_embeddings"] else HEAD].T

    def loss(self, rows):
        logits = self.logits(rows)[:, :-1]
        return F.cross_entropy(logits.reshape(-1, logits.shape[-1]), rows[:, 1:].reshape(-1))


def low_rank_start(spec):
    """The updates that are done when factors come in."""
    method = spec["method"]
    return {"full": spec["schedule"]["num_steps"], "factorized": 0}.get(method["type"], method.get("warm_start_steps"))


def cosine(q, floor):
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * q))


def warm_cosine(t, total, warmup, floor):
    return t / warmup if t < warmup else cosine((t - warmup) / max(1, total - warmup), floor)


def jagged_cosine(t, total, warmup, every, restart_warmup, restart_lr, floor):
    """At every restart the rate climbs anew, to where it joins the cosine."""
    k, rho = divmod(t, every)
    if t < every or rho >= restart_warmup:
        return warm_cosine(t, total, warmup, floor)
    join = cosine((k * every + restart_warmup - warmup) / max(1, total - warmup), floor)
    climbed = {"one_over_w": rho + 1, "zero": rho}[restart_lr]
    return climbed / restart_warmup * join


def cyclical_cosine(t, every, warmup, floor):
    """Every cycle climbs to the full peak. The first two updates of a later cycle move next to nothing."""
    k, rho = divmod(t, every)
    return 1e-7 if k > 0 and rho < min(2, warmup) else warm_cosine(rho, every, warmup, floor)


def learning_rate(spec, step):
    method, o, schedule = spec["method"], spec["optimizer"], spec["schedule"]
    total, floor, start = schedule["num_steps"], schedule["min_lr_frac"], low_rank_start(spec)
    if method["type"] in ("full", "factorized"):
        return o["learning_rate"] * warm_cosine(step, total, schedule["warmup_steps"], floor)
    if step < start:
        return o["warm_start_learning_rate"] * warm_cosine(step, total, schedule["warmup_steps"], floor)
    t, total, warmup = step - start, total - start, method["relora_warmup_steps"]
    if method["type"] == "lora" or method["restart_schedule"] == "plain":
        return o["learning_rate"] * warm_cosine(t, total, warmup, floor)
    every = method["reset_every_steps"]
    if method["restart_schedule"] == "cyclical":
        return o["learning_rate"] * cyclical_cosine(t, every, warmup, floor)
    return o["learning_rate"] * jagged_cosine(
        t, total, warmup, every, method["restart_warmup_steps"], method["restart_lr"], floor)


def adamw(parameters, o):
    """Decay acts on matrices and factors, and neither on norms nor on the embedding."""
    decays = {name: p for name, p in parameters.items() if p.dim() == 2 and name != EMBEDDING}
    others = [p for name, p in parameters.items() if name not in decays]
    groups = [{"params": list(decays.values()), "weight_decay": o["weight_decay"]}]
    if others:
        groups.append({"params": others, "weight_decay": 0.0})
    return torch.optim.AdamW(groups, betas=tuple(o["betas"]), eps=o["eps"])


def wrap(model, spec, inputs):
    """Puts factors beside the targeted matrices, or in their place. Every optimizer state is new."""
    method, is_factorized = spec["method"], spec["method"]["type"] == "factorized"
    paths = wrapped_paths(spec)
    frozen = {f"{path}.weight" for path in paths}
    frozen |= {name for name, trains in [(EMBEDDING, method["train_embeddings"]), (HEAD, method["train_head"])]
               if not trains}
    for index, path in enumerate(paths):
        a = inputs.a[0, index]
        b = inputs.b[0, index] if is_factorized else torch.zeros(model.weights[f"{path}.weight"].shape[0], len(a))
        model.factors[path] = [a.double().requires_grad_(), b.double().requires_grad_()]
        if is_factorized:
            del model.weights[f"{path}.weight"]
    for name, weight in model.weights.items():
        weight.requires_grad_(name not in frozen)
    trained = {name: weight for name, weight in model.weights.items() if name not in frozen}
    factors = {f"{path}.{i}": factor for path, pair in model.factors.items() for i, factor in enumerate(pair)}
    return [adamw(trained, spec["optimizer"]), adamw(factors, spec["optimizer"])]


@torch.no_grad()
def merge(model):
    """W += s·B·A. The factors are to be drawn again, or given up."""
    for path, (a, b) in model.factors.items():
        name = f"{path}.weight"
        delta = model.scale * (b @ a)
        model.weights[name] = model.weights[name] + delta if name in model.weights else delta


@torch.no_grad()
def draw_again(model, inputs, restart):
    """In place: the optimizer's moments belong to the factors, whatever their values."""
    for index, (a, b) in enumerate(model.factors.values()):
        a.copy_(inputs.a[restart, index])
        b.zero_()


def larger_than_smallest(x, frac):
    """Where x is above its k-th smallest magnitude, k = frac of its elements."""
    k = math.floor(frac * x.numel() + 0.5)
    return x.abs() > x.abs().flatten().kthvalue(k).values if k > 0 else torch.ones_like(x, dtype=torch.bool)


def kept(reset, moments, draws):
    """What a reset keeps of a factor's two moments, as masks."""
    if reset["type"] == "zero":
        return [torch.zeros_like(moment) for moment in moments]
    if reset["type"] == "magnitude":
        masks = [larger_than_smallest(moment, reset["frac"]) for moment in moments]
    else:
        masks = [u.double() >= reset["frac"] for u in draws]
    return [masks[0], masks[0]] if reset["joint_mask"] else masks


@torch.no_grad()
def reset_optimizer(optimizer, model, reset, inputs, number):
    """The `number`-th reset: for the factors alone, and in place."""
    if reset["type"] == "none":
        return
    for index, factor in enumerate(factor for pair in model.factors.values() for factor in pair):
        state = optimizer.state[factor]
        moments = [state["exp_avg"], state["exp_avg_sq"]]
        draws = [inputs.u[number, index, moment] for moment in (0, 1)] if reset["type"] == "random" else None
        for moment, mask in zip(moments, kept(reset, moments, draws)):
            moment.mul_(mask)
        if reset["reset_step_count"]:
            state["step"].zero_()


def update(model, optimizers, rows, rate, clip_norm):
    """One update. Returns the loss, and the norm of the gradient before clipping."""
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    trained = [p for group in groups for p in group["params"]]
    for group in groups:
        group["lr"] = rate
    for p in trained:
        p.grad = None
    loss = model.loss(rows)
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(trained, clip_norm or math.inf)
    for optimizer in optimizers:
        optimizer.step()
    return loss.item(), norm.item()


def train(spec, inputs):
    method, start = spec["method"], low_rank_start(spec)
    weights = {name: weight.double().requires_grad_() for name, weight in inputs.weights.items()}
    model = Model(spec["model"], weights, method.get("scale"))
    optimizers = [adamw(model.weights, spec["optimizer"])]
    run = Trajectory([], [], [], {})

    for step, rows in enumerate(inputs.batches):
        t = step - start
        if t == 0:
            optimizers = wrap(model, spec, inputs)
        if t > 0 and method["type"] == "relora":
            if t % method["restart_every_steps"] == 0:
                merge(model)
                draw_again(model, inputs, t // method["restart_every_steps"])
            if t % method["reset_every_steps"] == 0:
                number = t // method["reset_every_steps"]
                reset_optimizer(optimizers[1], model, method["optimizer_reset"], inputs, number)
        rate = learning_rate(spec, step)
        loss, norm = update(model, optimizers, rows.long(), rate, spec["optimizer"]["clip_norm"])
        run.losses.append(loss)
        run.grad_norms.append(norm)
        run.learning_rates.append(rate)

    merge(model)
    run.weights = {name: weight.detach().float() for name, weight in model.weights.items()}
    return run
