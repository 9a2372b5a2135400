"""What people train with who write no model: LLaMA of `transformers`, with factors of `peft` beside its matrices.

It shows whether the baseline in published.py is as fast as that.
"""

from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from .cases import ALPHA, RANK, RMS_NORM_EPS, ROPE_THETA, VOCAB_SIZE

MATRICES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


class Llama(nn.Module):
    """From tokens (b, t) to the mean cross-entropy over their successors."""

    def __init__(self, case):
        super().__init__()
        sizes = case.sizes
        self.model = LlamaForCausalLM(LlamaConfig(
            vocab_size=VOCAB_SIZE, hidden_size=sizes.hidden_size, intermediate_size=sizes.intermediate_size,
            num_hidden_layers=sizes.num_layers, num_attention_heads=sizes.num_heads,
            max_position_embeddings=case.sequence_length, rms_norm_eps=RMS_NORM_EPS, rope_theta=ROPE_THETA,
            use_cache=False, attn_implementation="sdpa"))
        if case.is_low_rank:
            factors = LoraConfig(r=RANK, lora_alpha=ALPHA, lora_dropout=case.dropout, target_modules=MATRICES)
            self.model = get_peft_model(self.model, factors)
            # As ReLoRA has it, everything is trained but the matrices that have factors.
            for name, parameter in self.model.named_parameters():
                parameter.requires_grad = "base_layer" not in name

    def forward(self, tokens):
        return self.model(input_ids=tokens, labels=tokens).loss
