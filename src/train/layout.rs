//! The JSON files beside weights: what `transformers` needs to load a model, and `peft` a delta.
//!
//! They depend on the spec alone, so equal weights lie beside equal files.

use serde_json::{Value, json};

use super::model::LINEARS;
use crate::domain::spec::{LowRank, ModelSpec};

/// Modules that are trained at full rank, by the names under which `peft` replaces them.
pub fn full_rank_modules(spec: &ModelSpec) -> Vec<&'static str> {
    let mut modules = vec!["embed_tokens", "input_layernorm", "post_attention_layernorm", "norm"];
    if !spec.tie_word_embeddings {
        modules.push("lm_head");
    }
    modules
}

/// `config.json` of a model.
pub fn model_config(spec: &ModelSpec, eos_token_id: i64) -> Value {
    json!({
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": false,
        "attention_dropout": 0.0,
        "bos_token_id": null,
        "eos_token_id": eos_token_id,
        "head_dim": spec.head_dim(),
        "hidden_act": "silu",
        "hidden_size": spec.hidden_size,
        "initializer_range": spec.initializer_range,
        "intermediate_size": spec.intermediate_size,
        "max_position_embeddings": spec.max_position_embeddings,
        "mlp_bias": false,
        "model_type": "llama",
        "num_attention_heads": spec.num_attention_heads,
        "num_hidden_layers": spec.num_hidden_layers,
        "num_key_value_heads": spec.num_key_value_heads,
        "pretraining_tp": 1,
        "rms_norm_eps": spec.rms_norm_eps,
        "rope_scaling": null,
        "rope_theta": spec.rope_theta,
        "tie_word_embeddings": spec.tie_word_embeddings,
        "torch_dtype": "float32",
        "use_cache": true,
        "vocab_size": spec.vocab_size,
    })
}

/// `generation_config.json` of a model.
pub fn generation_config(eos_token_id: i64) -> Value {
    json!({ "_from_model_config": true, "bos_token_id": null, "eos_token_id": eos_token_id })
}

/// `adapter_config.json` of a delta.
pub fn adapter_config(spec: &ModelSpec, low_rank: LowRank) -> Value {
    let target_modules = LINEARS.map(|linear| linear.rsplit('.').next());
    json!({
        "base_model_name_or_path": null,
        "bias": "none",
        "ensure_weight_tying": spec.tie_word_embeddings,
        "fan_in_fan_out": false,
        "inference_mode": true,
        "lora_alpha": low_rank.scale * low_rank.rank as f64,
        "lora_dropout": low_rank.dropout,
        "modules_to_save": full_rank_modules(spec),
        "peft_type": "LORA",
        "r": low_rank.rank,
        "target_modules": target_modules,
        "task_type": "CAUSAL_LM",
        "use_rslora": false,
    })
}

/// The name of a parameter or factor in a delta.
pub fn adapter_name(name: &str) -> String {
    format!("base_model.model.{name}")
}
