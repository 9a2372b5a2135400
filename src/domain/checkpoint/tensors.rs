//! The tensors of a model by name and shape: the one list that imports are checked against and the trainer builds.

use crate::domain::spec::{Linear, ModelSpec};

pub const EMBEDDING: &str = "model.embed_tokens.weight";
pub const HEAD: &str = "lm_head.weight";

/// A tensor of a model, by its name in `transformers` checkpoints.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TensorShape {
    pub name: String,
    pub shape: Vec<i64>,
}

/// The path of a matrix: its parameters are `{path}.weight`, `{path}.lora_A.weight`, `{path}.lora_B.weight`.
pub fn linear_path(layer: i64, linear: Linear) -> String {
    format!("model.layers.{layer}.{}", linear.path())
}

/// Every tensor of the model, without LoRA factors, in the order in which initial weights are drawn.
pub fn tensors(model: &ModelSpec) -> Vec<TensorShape> {
    let tensor = |name: String, shape: &[i64]| TensorShape { name, shape: shape.to_vec() };
    let hidden = model.hidden_size;
    let mut all = vec![tensor(EMBEDDING.into(), &[model.vocab_size, hidden])];
    for layer in 0..model.num_hidden_layers {
        for (linear, (rows, columns)) in Linear::ALL.into_iter().zip(model.linear_shapes()) {
            all.push(tensor(format!("{}.weight", linear_path(layer, linear)), &[rows, columns]));
        }
        for norm in ["input_layernorm", "post_attention_layernorm"] {
            all.push(tensor(format!("model.layers.{layer}.{norm}.weight"), &[hidden]));
        }
    }
    all.push(tensor("model.norm.weight".into(), &[hidden]));
    if !model.tie_word_embeddings {
        all.push(tensor(HEAD.into(), &[model.vocab_size, hidden]));
    }
    all
}
