//! The delta of a restart on disk, in the `peft` layout: factors that are added to the matrices before it, and values
//! that replace what trains at full rank. It is checked against the model before any of it is used.

use std::{collections::BTreeSet, path::Path};

use safetensors::Dtype;
use serde::Deserialize;
use tch::Tensor;

use super::{
    checkpoint::{self, MappedShard},
    error::TrainError,
    layout,
    relora::{factor_name, scaled_product},
};
use crate::domain::{
    checkpoint::{HEAD, Shard, TensorShape, tensors},
    lineage::{ADAPTER_CONFIG_FILE, ADAPTER_FILE},
    problem::Problem,
    spec::ModelSpec,
};

/// What of `adapter_config.json` the arithmetic depends on.
#[derive(Debug, Deserialize)]
struct AdapterConfig {
    r: i64,
    lora_alpha: f64,
    target_modules: BTreeSet<String>,
    modules_to_save: BTreeSet<String>,
}

/// A delta that fits its model, where it lies.
pub struct Delta {
    shard: Shard,
    file: MappedShard,
    scale: f64,
}

impl Delta {
    pub fn open(folder: &Path, model: &ModelSpec) -> Result<Self, TrainError> {
        let config: AdapterConfig = serde_json::from_value(checkpoint::read_json(folder, ADAPTER_CONFIG_FILE)?)
            .map_err(|error| TrainError::data(&folder.join(ADAPTER_CONFIG_FILE), error))?;
        checkpoint::refuse("delta", folder, config.check(model))?;
        let (shard, file) = checkpoint::open(folder, ADAPTER_FILE)?;
        checkpoint::refuse("delta", folder, check_tensors(&shard, &config.wanted(model), model))?;
        Ok(Self { shard, file, scale: config.lora_alpha / config.r as f64 })
    }

    /// The tensor of this name after the restart, from what it was before: as the merge of the training computes it.
    pub fn apply(&self, name: &str, before: Tensor) -> Tensor {
        let find = |name: &str| Some(self.file.tensor(self.shard.header.info(&layout::adapter_name(name))?));
        let factor = |factor: &str| find(&factor_name(name, factor));
        match (find(name), factor("lora_A"), factor("lora_B")) {
            (Some(value), ..) => value,
            (None, Some(a), Some(b)) => before + scaled_product(&a, &b, self.scale),
            // Neither wrapped nor trained.
            _ => before,
        }
    }
}

impl AdapterConfig {
    fn check(&self, model: &ModelSpec) -> Vec<Problem> {
        let mut problems = Vec::new();
        if self.r < 1 {
            problems.push(Problem::at(&[ADAPTER_CONFIG_FILE, "r"], format!("is {}; a rank is above 0", self.r)));
        }
        let tensors = tensors(model);
        let known: BTreeSet<_> = tensors.iter().map(|tensor| module(&tensor.name)).collect();
        for (field, modules) in [("target_modules", &self.target_modules), ("modules_to_save", &self.modules_to_save)] {
            for unknown in modules.iter().filter(|module| !known.contains(module.as_str())) {
                let message = format!("names {unknown}, which the model does not have");
                problems.push(Problem::at(&[ADAPTER_CONFIG_FILE, field], message));
            }
        }
        problems
    }

    /// Every tensor that the delta must have.
    fn wanted(&self, model: &ModelSpec) -> Vec<TensorShape> {
        let of_tensor = |tensor: TensorShape| {
            let module = module(&tensor.name);
            let is_saved = self.modules_to_save.contains(module);
            if let (true, &[rows, columns]) = (self.target_modules.contains(module), &tensor.shape[..]) {
                let factor = |name: &str, shape: [i64; 2]| TensorShape {
                    name: factor_name(&tensor.name, name),
                    shape: shape.to_vec(),
                };
                return vec![factor("lora_A", [self.r, columns]), factor("lora_B", [rows, self.r])];
            }
            if is_saved { vec![tensor] } else { Vec::new() }
        };
        tensors(model).into_iter().flat_map(of_tensor).collect()
    }
}

/// The module that a tensor belongs to, by the name under which `peft` finds it: `q_proj`, `norm`.
pub fn module(name: &str) -> &str {
    let path = name.strip_suffix(".weight").unwrap_or(name);
    path.rsplit('.').next().unwrap_or(path)
}

fn check_tensors(shard: &Shard, wanted: &[TensorShape], model: &ModelSpec) -> Vec<Problem> {
    let mut problems = Vec::new();
    let mut unknown: BTreeSet<_> = shard.header.offset_keys().into_iter().collect();
    if model.tie_word_embeddings {
        // The embedding once more.
        unknown.remove(&layout::adapter_name(HEAD));
    }
    for TensorShape { name, shape } in wanted {
        let name = layout::adapter_name(name);
        unknown.remove(&name);
        let message = match shard.header.info(&name) {
            None => "is missing".to_owned(),
            Some(info) if !info.shape.iter().map(|&n| n as i64).eq(shape.iter().copied()) => {
                format!("has the shape {:?}, wanted is {shape:?}", info.shape)
            }
            Some(info) if info.dtype != Dtype::F32 => format!("is {}, wanted is F32", info.dtype),
            Some(_) => continue,
        };
        problems.push(Problem::at(&[ADAPTER_FILE, &name], message));
    }
    problems.extend(unknown.iter().map(|name| Problem::at(&[ADAPTER_FILE, name], "is no part of the delta")));
    problems
}
