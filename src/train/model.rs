//! The parameters of a LLaMA model. Their names equal those of `transformers` checkpoints.

use super::weights::Parameter;
pub use crate::domain::checkpoint::{EMBEDDING, HEAD, linear_path};
use crate::domain::{
    checkpoint::{TensorShape, tensors},
    spec::ModelSpec,
};

/// Every parameter of the model, without LoRA factors, in the order in which initial weights are drawn.
pub fn parameters(spec: &ModelSpec) -> Vec<Parameter> {
    // Weight decay acts on matrices, and on no embedding.
    let decays = |tensor: &TensorShape| tensor.shape.len() > 1 && tensor.name != EMBEDDING;
    let parameter = |tensor: TensorShape| Parameter { decays: decays(&tensor), name: tensor.name, shape: tensor.shape };
    tensors(spec).into_iter().map(parameter).collect()
}
