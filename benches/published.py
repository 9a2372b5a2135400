"""The baseline: LLaMA as `transformers` writes it, with the low-rank branch as the published ReLoRA code adds it.

Written from the descriptions, in plain eager PyTorch and without avoidable work: what it costs is what this way of
writing the model costs. A model in bf16 is bf16 throughout, weights and optimizer states too, as in the published code.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn

from .cases import ALPHA, RANK, RMS_NORM_EPS, ROPE_THETA, VOCAB_SIZE

INITIALIZER_RANGE = 0.02


class RmsNorm(nn.Module):
    """The mean square in fp32, the product with the weight in the model's type."""

    def __init__(self, size):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x):
        mean_square = x.to(torch.float32).pow(2).mean(-1, keepdim=True)
        normed = x * torch.rsqrt(mean_square + RMS_NORM_EPS)
        return self.weight * normed.to(self.weight.dtype)


class ReloraLinear(nn.Module):
    """y = W x + s B A dropout(x), with W frozen."""

    def __init__(self, num_inputs, num_outputs, dropout):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_outputs, num_inputs), requires_grad=False)
        self.lora_a = nn.Linear(num_inputs, RANK, bias=False)
        self.lora_b = nn.Linear(RANK, num_outputs, bias=False)
        self.dropout = nn.Dropout(dropout)
        self.scale = ALPHA / RANK

    def forward(self, x):
        y = F.linear(x, self.weight)
        y += self.lora_b(self.lora_a(self.dropout(x))) * self.scale
        return y


class Rotary(nn.Module):
    """Tables of cosine and sine, (t, d), for rotations of element i together with element i + d/2."""

    def __init__(self, head_size, num_positions):
        super().__init__()
        frequencies = ROPE_THETA ** (-torch.arange(0, head_size, 2).float() / head_size)
        angles = torch.outer(torch.arange(num_positions).float(), frequencies)
        angles = torch.cat([angles, angles], -1)
        self.register_buffer("cos", angles.cos())
        self.register_buffer("sin", angles.sin())

    def forward(self, x):
        return x * self.cos + rotate_half(x) * self.sin


def rotate_half(x):
    half = x.shape[-1] // 2
    return torch.cat([-x[..., half:], x[..., :half]], -1)


class Attention(nn.Module):
    def __init__(self, sizes, linear):
        super().__init__()
        h = sizes.hidden_size
        self.num_heads = sizes.num_heads
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (linear(h, h) for _ in range(4))

    def forward(self, x, rotary):
        b, t, h = x.shape
        q, k, v = (projection(x).view(b, t, self.num_heads, -1).transpose(1, 2)
                   for projection in (self.q_proj, self.k_proj, self.v_proj))  # (b, n, t, d)
        mixed = F.scaled_dot_product_attention(rotary(q), rotary(k), v, is_causal=True)
        return self.o_proj(mixed.transpose(1, 2).reshape(b, t, h))


class Mlp(nn.Module):
    def __init__(self, sizes, linear):
        super().__init__()
        h, f = sizes.hidden_size, sizes.intermediate_size
        self.gate_proj, self.up_proj, self.down_proj = linear(h, f), linear(h, f), linear(f, h)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    def __init__(self, sizes, linear):
        super().__init__()
        self.input_norm, self.post_attention_norm = RmsNorm(sizes.hidden_size), RmsNorm(sizes.hidden_size)
        self.attention, self.mlp = Attention(sizes, linear), Mlp(sizes, linear)

    def forward(self, x, rotary):
        x = x + self.attention(self.input_norm(x), rotary)
        return x + self.mlp(self.post_attention_norm(x))


class Llama(nn.Module):
    """From tokens (b, t) to the mean cross-entropy over their successors."""

    def __init__(self, case):
        super().__init__()
        sizes = case.sizes

        def linear(num_inputs, num_outputs):
            if case.is_low_rank:
                return ReloraLinear(num_inputs, num_outputs, case.dropout)
            return nn.Linear(num_inputs, num_outputs, bias=False)

        self.embed_tokens = nn.Embedding(VOCAB_SIZE, sizes.hidden_size)
        self.layers = nn.ModuleList(Layer(sizes, linear) for _ in range(sizes.num_layers))
        self.norm = RmsNorm(sizes.hidden_size)
        self.lm_head = nn.Linear(sizes.hidden_size, VOCAB_SIZE, bias=False)
        self.rotary = Rotary(sizes.hidden_size // sizes.num_heads, case.sequence_length)
        self.initialize()

    @torch.no_grad()
    def initialize(self):
        """Matrices normal, A uniform within 1/√in, B zero."""
        for name, parameter in self.named_parameters():
            if "lora_a" in name:
                nn.init.kaiming_uniform_(parameter, a=math.sqrt(5))
            elif "lora_b" in name:
                nn.init.zeros_(parameter)
            elif parameter.dim() == 2:
                nn.init.normal_(parameter, std=INITIALIZER_RANGE)

    def forward(self, tokens):
        x = self.embed_tokens(tokens)
        for layer in self.layers:
            x = layer(x, self.rotary)
        logits = self.lm_head(self.norm(x))
        shifted = logits[..., :-1, :].contiguous()
        targets = tokens[..., 1:].contiguous()
        return F.cross_entropy(shifted.view(-1, VOCAB_SIZE), targets.view(-1))
