//! The logits of a checkpoint: what tests compare with other implementations of the model.

use std::{io, path::Path};

use tch::{Device, Tensor};

use super::{
    checkpoint,
    engine::{Engine, Settings},
    error::TrainError,
    tensor_file,
};
use crate::domain::{job::FailureKind, spec::Precision};

/// Reads rows of tokens, a JSON array of arrays of equal length, from stdin and writes the tensor
/// `logits` (rows, S, V) of the model in a checkpoint's directory to a safetensors file.
pub fn write(folder: &Path, out: &Path) -> Result<(), TrainError> {
    let spec = checkpoint::read_model(folder)?;
    let rows: Vec<Vec<i64>> = serde_json::from_reader(io::stdin())
        .map_err(|error| TrainError::new(FailureKind::Data, format!("read rows of tokens from stdin: {error}")))?;
    let _guard = tch::no_grad_guard();
    let weights = checkpoint::read_weights(folder, &spec, Device::Cpu)?;
    let mut engine = Engine::new(&spec, &weights, Settings::new(Precision::Fp32));
    let rows: Vec<_> = rows.iter().map(|row| Tensor::from_slice(row)).collect();
    let rows = Tensor::stack(&rows, 0);
    let logits = engine.logits(&rows).view([rows.size()[0], rows.size()[1], -1]);
    tensor_file::write(out, &[("logits".into(), logits)])
}
