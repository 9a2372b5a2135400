//! The logits of a checkpoint: what tests compare with other implementations of the model.

use std::{fs, io, path::Path};

use serde_json::{Map, Value};
use tch::{Device, Tensor};

use super::{error::TrainError, model::Llama, tensor_file, weights::Weights};
use crate::domain::{
    job::FailureKind,
    lineage::MODEL_FILE,
    spec::{ModelSpec, Precision},
};

/// Reads rows of tokens, a JSON array of arrays of equal length, from stdin and writes the tensor
/// `logits` (rows, S, V) of the model in a checkpoint's directory to a safetensors file.
pub fn write(checkpoint: &Path, out: &Path) -> Result<(), TrainError> {
    let spec = read_config(&checkpoint.join("config.json"))?;
    let rows: Vec<Vec<i64>> = serde_json::from_reader(io::stdin())
        .map_err(|error| TrainError::new(FailureKind::Data, format!("read rows of tokens from stdin: {error}")))?;
    let _guard = tch::no_grad_guard();
    let weights = Weights::zeros(&spec, Device::Cpu);
    let targets =
        weights.full_rank.names().map(str::to_owned).zip(weights.full_rank.leaves.iter().map(Tensor::shallow_clone));
    tensor_file::read_into(&checkpoint.join(MODEL_FILE), targets.collect())?;
    let model = Llama::new(&spec, &weights, Precision::Fp32);
    let rows: Vec<_> = rows.iter().map(|row| Tensor::from_slice(row)).collect();
    let logits = model.forward(&Tensor::stack(&rows, 0), None).contiguous();
    tensor_file::write(out, &[("logits".into(), logits)])
}

/// The sizes in a `transformers` configuration. They bear the same names as those of a spec.
fn read_config(path: &Path) -> Result<ModelSpec, TrainError> {
    const SIZES: [&str; 11] = [
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "max_position_embeddings",
        "rms_norm_eps",
        "rope_theta",
        "initializer_range",
        "tie_word_embeddings",
    ];
    let json = fs::read(path).map_err(|error| TrainError::data(path, error))?;
    let mut config: Map<String, Value> =
        serde_json::from_slice(&json).map_err(|error| TrainError::data(path, error))?;
    config.retain(|name, _| SIZES.contains(&name.as_str()));
    serde_json::from_value(Value::Object(config)).map_err(|error| TrainError::data(path, error))
}
