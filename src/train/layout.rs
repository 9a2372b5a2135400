//! The JSON files beside weights: what `transformers` needs to load a model, and `peft` a delta.
//!
//! They depend on the spec alone, so equal weights lie beside equal files.

use serde_json::{Value, json};

use crate::domain::spec::{FactorsSpec, Linear, ModelSpec};

/// Modules that are trained at full rank beside the factors, by the names under which `peft` replaces them.
fn full_rank_modules(spec: &ModelSpec, factors: &FactorsSpec) -> Vec<&'static str> {
    let mut modules = vec!["input_layernorm", "post_attention_layernorm", "norm"];
    if factors.train_embeddings {
        modules.push("embed_tokens");
    }
    if factors.train_head && !spec.tie_word_embeddings {
        modules.push("lm_head");
    }
    modules.extend(Linear::ALL.into_iter().filter(|l| !factors.target_modules.contains(l)).map(Linear::name));
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
pub fn adapter_config(spec: &ModelSpec, factors: &FactorsSpec) -> Value {
    json!({
        "base_model_name_or_path": null,
        "bias": "none",
        "ensure_weight_tying": spec.tie_word_embeddings && factors.train_embeddings,
        "fan_in_fan_out": false,
        "inference_mode": true,
        "lora_alpha": factors.scale * factors.rank as f64,
        "lora_dropout": factors.dropout,
        "modules_to_save": full_rank_modules(spec, factors),
        "peft_type": "LORA",
        "r": factors.rank,
        "target_modules": factors.target_modules,
        "task_type": "CAUSAL_LM",
        "use_rslora": false,
    })
}

/// The name of a parameter or factor in a delta.
pub fn adapter_name(name: &str) -> String {
    format!("base_model.model.{name}")
}
