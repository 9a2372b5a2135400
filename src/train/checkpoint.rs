//! The checkpoint that a run begins with: a folder in the `transformers` layout, in one file or in shards, read into
//! fp32. It is checked before the first step by the code that checks imports, because the files came another way.

use std::{collections::BTreeSet, fs, path::Path};

use memmap2::Mmap;
use safetensors::tensor::TensorInfo;
use serde_json::Value;
use tch::{Device, Kind, Tensor};

use super::{error::TrainError, model::parameters, native, weights::Weights};
use crate::domain::{
    checkpoint::{
        CONFIG_FILE, EMBEDDING, HEAD, INDEX_FILE, Shard, WeightDtype, check_index, check_set, check_tensors,
        header_bytes, is_taken, is_weights, model_of_config, read_header,
    },
    job::FailureKind,
    problem::Problem,
    spec::{MethodSpec, ModelSpec, TrainSpec},
};

/// The weights before the first update: those of the checkpoint in `folder`, or drawn.
pub fn first_weights(folder: Option<&Path>, spec: &TrainSpec, device: Device) -> Result<Weights, TrainError> {
    let Some(folder) = folder else {
        return match &spec.init_checkpoint {
            None => Ok(Weights::initial(spec, device)),
            Some(id) => {
                let message = format!("the spec begins with the checkpoint {id}: name its folder with --weights");
                Err(TrainError::new(FailureKind::UserConfig, message))
            }
        };
    };
    if matches!(spec.method, MethodSpec::Factorized(_) | MethodSpec::Control(_)) {
        let message = "/method/type trains other matrices than a checkpoint has: leave out --weights";
        return Err(TrainError::new(FailureKind::UserConfig, message));
    }
    let model = read_model(folder)?;
    let differs: Vec<_> =
        model.differences(&spec.model).into_iter().map(|(name, has)| format!("/model/{name} ({has} there)")).collect();
    if !differs.is_empty() {
        let message = format!("the checkpoint {} is another model: {}", folder.display(), differs.join(", "));
        return Err(TrainError::new(FailureKind::UserConfig, message));
    }
    tracing::info!(weights.path = %folder.display(), "begins with a checkpoint");
    let mut weights = Weights::of_first_phase(spec, device);
    read_into(&mut weights, folder, &spec.model)?;
    Ok(weights)
}

/// The model of a checkpoint.
pub fn read_model(folder: &Path) -> Result<ModelSpec, TrainError> {
    model_of_config(read_json(folder, CONFIG_FILE)?).map_err(|problems| {
        let problems = problems.into_iter().map(|problem| problem.within(CONFIG_FILE)).collect();
        refusal(FailureKind::UserConfig, "checkpoint", folder, problems)
    })
}

/// The weights of a checkpoint of this model.
pub fn read_weights(folder: &Path, model: &ModelSpec, device: Device) -> Result<Weights, TrainError> {
    let mut weights = Weights::zeros(model, device);
    read_into(&mut weights, folder, model)?;
    Ok(weights)
}

/// Sets every parameter of the model to what the checkpoint has.
fn read_into(weights: &mut Weights, folder: &Path, model: &ModelSpec) -> Result<(), TrainError> {
    let checkpoint = MappedCheckpoint::open(folder, model)?;
    for parameter in parameters(model) {
        if let Some((_, value)) = checkpoint.find(&parameter.name) {
            weights.set(&parameter.name, &value);
        }
    }
    if let Some((file, head)) = checkpoint.find(HEAD).filter(|_| model.tie_word_embeddings) {
        refuse("checkpoint", folder, check_tied_head(file, &head, weights))?;
    }
    Ok(())
}

/// The weights of a checkpoint where they lie: every tensor of its model is there, in its shape.
pub struct MappedCheckpoint {
    shards: Vec<(Shard, MappedShard)>,
}

impl MappedCheckpoint {
    pub fn open(folder: &Path, model: &ModelSpec) -> Result<Self, TrainError> {
        let names = file_names(folder)?;
        let refused = |problems| refuse("checkpoint", folder, problems);
        refused(check_set(&names.iter().map(String::as_str).collect()))?;
        let (mut shards, mut files) = (Vec::new(), Vec::new());
        for name in names.iter().filter(|name| is_weights(name)) {
            let (shard, file) = open(folder, name)?;
            shards.push(shard);
            files.push(file);
        }
        refused(check_tensors(model, &shards))?;
        if names.contains(INDEX_FILE) {
            refused(check_index(read_json(folder, INDEX_FILE)?, &shards))?;
        }
        Ok(Self { shards: shards.into_iter().zip(files).collect() })
    }

    /// The tensor of this name, in its own number format, and the file that has it.
    pub fn find(&self, name: &str) -> Option<(&str, Tensor)> {
        let find = |shard: &Shard, file: &MappedShard| Some(file.tensor(shard.header.info(name)?));
        self.shards.iter().find_map(|(shard, file)| Some((shard.file.as_str(), find(shard, file)?)))
    }
}

/// A head that is stored beside the embedding that it is tied to must be that embedding: `transformers` would compute
/// with the head that it finds.
fn check_tied_head(file: &str, head: &Tensor, weights: &Weights) -> Vec<Problem> {
    let is_embedding = weights.find(EMBEDDING).is_some_and(|embedding| {
        embedding.size() == head.size() && embedding.equal(&head.to_device(embedding.device()).to_kind(Kind::Float))
    });
    match is_embedding {
        true => vec![],
        false => vec![Problem::at(&[file, HEAD], "differs from the embedding, which config.json ties it to")],
    }
}

/// Fails if there are problems with the files of this folder, which is a checkpoint or a delta.
pub fn refuse(what: &str, folder: &Path, problems: Vec<Problem>) -> Result<(), TrainError> {
    match problems.is_empty() {
        true => Ok(()),
        false => Err(refusal(FailureKind::Data, what, folder, problems)),
    }
}

fn refusal(kind: FailureKind, what: &str, folder: &Path, problems: Vec<Problem>) -> TrainError {
    let problems: Vec<_> = problems.iter().map(|problem| format!("{} {}", problem.pointer, problem.message)).collect();
    TrainError::new(kind, format!("the {what} {} cannot be used: {}", folder.display(), problems.join("; ")))
}

/// The files of the folder that belong to a checkpoint.
fn file_names(folder: &Path) -> Result<BTreeSet<String>, TrainError> {
    let entries = fs::read_dir(folder).map_err(|error| TrainError::data(folder, error))?;
    let names = entries.filter_map(|entry| entry.ok()?.file_name().into_string().ok());
    Ok(names.filter(|name| is_taken(name)).collect())
}

pub fn read_json(folder: &Path, name: &str) -> Result<Value, TrainError> {
    let path = folder.join(name);
    let json = fs::read(&path).map_err(|error| TrainError::data(&path, error))?;
    serde_json::from_slice(&json).map_err(|error| TrainError::data(&path, error))
}

/// A weight file in memory, behind its header.
pub struct MappedShard {
    bytes: Mmap,
    data_start: usize,
}

impl MappedShard {
    /// A tensor in its own number format. Its place was checked against the file's length.
    pub fn tensor(&self, info: &TensorInfo) -> Tensor {
        let kind = match WeightDtype::of(info.dtype) {
            Some(WeightDtype::F16) => Kind::Half,
            Some(WeightDtype::Bf16) => Kind::BFloat16,
            Some(WeightDtype::F32) | None => Kind::Float,
        };
        let (start, end) = info.data_offsets;
        let shape: Vec<_> = info.shape.iter().map(|&n| n as i64).collect();
        Tensor::from_data_size(&self.bytes[self.data_start..][start..end], &shape, kind)
    }
}

/// Maps a weight file of a folder and reads its header.
pub fn open(folder: &Path, name: &str) -> Result<(Shard, MappedShard), TrainError> {
    let path = folder.join(name);
    let fail = |reason: String| TrainError::data(&path, format!("it {reason}"));
    let bytes = native::map_file(&path).map_err(|error| TrainError::data(&path, error))?;
    let file_bytes = bytes.len() as u64;
    let prefix = &bytes[..bytes.len().min(8)];
    let data_start = 8 + header_bytes(prefix, file_bytes).map_err(fail)? as usize;
    let header = read_header(&bytes[8..data_start], file_bytes).map_err(fail)?;
    Ok((Shard { file: name.to_owned(), header }, MappedShard { bytes, data_start }))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::{
        domain::{contract::Event, lineage::MODEL_FILE},
        train::{layout, tensor_file, test_support},
    };

    /// A folder with drawn weights as a run stores them, and the spec that they belong to.
    fn given_checkpoint() -> (tempfile::TempDir, TrainSpec, Weights) {
        let folder = test_support::scratch_dir();
        let (spec, weights) = write_checkpoint(folder.path());
        (folder, spec, weights)
    }

    fn write_checkpoint(folder: &Path) -> (TrainSpec, Weights) {
        let spec = test_support::spec(json!({"init_checkpoint": "node_1"}));
        let weights = Weights::initial(&TrainSpec { seed: 5, ..spec.clone() }, Device::Cpu);
        tensor_file::write(&folder.join(MODEL_FILE), &weights.merged()).unwrap();
        let config = layout::model_config(&spec.model, 0).to_string();
        fs::write(folder.join(CONFIG_FILE), config).unwrap();
        (spec, weights)
    }

    fn error(folder: &Path, spec: &TrainSpec) -> TrainError {
        first_weights(Some(folder), spec, Device::Cpu).err().expect("is refused")
    }

    #[test]
    fn weights_are_read_to_the_bit_and_never_forgotten() {
        let (folder, spec, weights) = given_checkpoint();
        let read = first_weights(Some(folder.path()), &spec, Device::Cpu).unwrap();
        assert!(read.full_rank.values.equal(&weights.full_rank.values));
        let error = first_weights(None, &spec, Device::Cpu).err().expect("is refused");
        assert!(error.kind == FailureKind::UserConfig && error.message.contains("node_1"), "{error}");
    }

    #[test]
    fn a_run_that_goes_on_from_a_state_needs_no_checkpoint_any_more() {
        let folder = test_support::scratch_dir();
        let weights = folder.path().join("weights");
        fs::create_dir(&weights).unwrap();
        let (spec, _) = write_checkpoint(&weights);
        test_support::try_train(folder.path(), &spec, None, Some(3)).unwrap();
        fs::remove_dir_all(&weights).unwrap();
        assert!(test_support::try_train(folder.path(), &spec, None, None).is_err(), "the beginning needs it");
        let state = folder.path().join("out/states/3");
        let events = test_support::try_train(folder.path(), &spec, Some(state), None).unwrap();
        assert_eq!(events.last(), Some(&Event::Done { step: spec.schedule.num_steps }));
    }

    #[test]
    fn another_model_is_refused_by_the_names_of_what_differs() {
        let (folder, mut spec, _) = given_checkpoint();
        spec.model.rope_theta = 5e5;
        spec.model.num_hidden_layers = 3;
        let error = error(folder.path(), &spec);
        assert_eq!(error.kind, FailureKind::UserConfig);
        assert!(error.message.contains("/model/num_hidden_layers (2 there), /model/rope_theta"), "{error}");
    }

    #[test]
    fn a_tied_head_that_is_another_matrix_is_refused() {
        let folder = test_support::scratch_dir();
        let spec = test_support::spec(json!({"model": {"tie_word_embeddings": true}}));
        let mut tensors = Weights::initial(&spec, Device::Cpu).merged();
        fs::write(folder.path().join(CONFIG_FILE), layout::model_config(&spec.model, 0).to_string()).unwrap();
        let embedding = tensors.iter().find(|(name, _)| name == EMBEDDING).expect("an embedding").1.shallow_clone();
        tensors.push((HEAD.into(), embedding.copy()));
        tensor_file::write(&folder.path().join(MODEL_FILE), &tensors).unwrap();
        assert!(read_weights(folder.path(), &spec.model, Device::Cpu).is_ok());

        tensors.last_mut().expect("the head").1 += 1e-3;
        tensor_file::write(&folder.path().join(MODEL_FILE), &tensors).unwrap();
        let error = read_weights(folder.path(), &spec.model, Device::Cpu).err().expect("is refused");
        assert!(error.kind == FailureKind::Data && error.message.contains("lm_head.weight differs"), "{error}");
    }

    #[test]
    fn damaged_files_are_refused_by_name() {
        let (folder, spec, _) = given_checkpoint();
        let path = folder.path().join(MODEL_FILE);
        let whole = fs::read(&path).unwrap();
        for (bytes, says) in [(&whole[..whole.len() - 1], "cut short"), (&whole[..5], "cut short"), (b"", "cut short")]
        {
            fs::write(&path, bytes).unwrap();
            let error = error(folder.path(), &spec);
            assert!(error.kind == FailureKind::Data && error.message.contains(says), "{error}");
        }
        let tensors = Weights::initial(&TrainSpec { seed: 5, ..spec.clone() }, Device::Cpu).merged();
        tensor_file::write(&path, &tensors[1..]).unwrap();
        let error = error(folder.path(), &spec);
        assert!(
            error.kind == FailureKind::Data && error.message.contains(&format!("{} is missing", tensors[0].0)),
            "{error}"
        );
        fs::remove_file(&path).unwrap();
        assert!(self::error(folder.path(), &spec).message.contains("/model.safetensors is missing"));
    }
}
