//! Full weights after a restart, from the base and the deltas up to it: written as a checkpoint, compared with one, or
//! only computed. In fp32, tensor by tensor, in the order in which the training merged, so that the bits are the same.

use std::{
    fs,
    path::{Path, PathBuf},
    process::ExitCode,
};

use tch::{Kind, Tensor};

use super::{
    checkpoint::{self, MappedCheckpoint},
    delta::{Delta, module},
    error::TrainError,
    process::unless_it_panics,
    tensor_file,
};
use crate::domain::{
    checkpoint::{CONFIG_FILE, GENERATION_CONFIG_FILE, TOKENIZER_FILES, tensors},
    contract::RebuildReport,
    job::FailureKind,
    lineage::MODEL_FILE,
    spec::ModelSpec,
    verification::{Difference, Differences},
};

/// Rebuilds the weights after a restart, and says on stdout what came of it, as one JSON object.
#[derive(Debug, Clone, clap::Parser)]
#[command(name = "relora-trainer --rebuild", version)]
pub struct RebuildArgs {
    /// The folder of the base.
    base: PathBuf,
    /// The folders of the deltas, in the order of their restarts.
    deltas: Vec<PathBuf>,
    /// Folder for the weights, with everything else that a checkpoint has.
    #[arg(long)]
    out: Option<PathBuf>,
    /// Folder of a checkpoint to compare the weights with.
    #[arg(long)]
    compare: Option<PathBuf>,
    /// CPU threads.
    #[arg(long, default_value_t = 1)]
    threads: i32,
}

impl RebuildArgs {
    /// Whatever goes wrong becomes a `Failed` report and a non-zero exit code.
    pub fn run(&self) -> ExitCode {
        tch::set_num_threads(self.threads);
        let (report, code) = match unless_it_panics(|| self.rebuild()) {
            Ok(differences) => (RebuildReport::Done { differences }, ExitCode::SUCCESS),
            Err(TrainError { kind, message }) => {
                tracing::error!(failure.kind = ?kind, message, "the weights cannot be rebuilt");
                (RebuildReport::Failed { kind, message }, ExitCode::FAILURE)
            }
        };
        println!("{}", serde_json::json!(report));
        code
    }

    fn rebuild(&self) -> Result<Differences, TrainError> {
        let chain = Chain::open(&self.base, &self.deltas)?;
        if let Some(out) = &self.out {
            chain.write(out)?;
        }
        match &self.compare {
            Some(checkpoint) => chain.compare(checkpoint),
            None if self.out.is_some() => Ok(Differences::new()),
            None => chain.compute().map(|()| Differences::new()),
        }
    }
}

/// A base and the deltas after it.
struct Chain {
    folder: PathBuf,
    model: ModelSpec,
    base: MappedCheckpoint,
    deltas: Vec<Delta>,
}

impl Chain {
    fn open(base: &Path, deltas: &[PathBuf]) -> Result<Self, TrainError> {
        let model = checkpoint::read_model(base)?;
        let deltas = deltas.iter().map(|folder| Delta::open(folder, &model)).collect::<Result<_, _>>()?;
        Ok(Self { folder: base.to_owned(), base: MappedCheckpoint::open(base, &model)?, model, deltas })
    }

    /// The tensor of this name after the last restart.
    fn tensor(&self, name: &str) -> Result<Tensor, TrainError> {
        let _guard = tch::no_grad_guard();
        let value = find(&self.base, name)?;
        let value = self.deltas.iter().fold(value, |value, delta| delta.apply(name, value));
        check_finite(name, &value)?;
        Ok(value)
    }

    fn compute(&self) -> Result<(), TrainError> {
        tensors(&self.model).iter().try_for_each(|tensor| self.tensor(&tensor.name).map(drop))
    }

    /// Writes a checkpoint: the weights, and beside them what lies beside the base's.
    fn write(&self, out: &Path) -> Result<(), TrainError> {
        fs::create_dir_all(out).map_err(|error| TrainError::storage("create", out, error))?;
        tensor_file::write_late(&out.join(MODEL_FILE), &tensors(&self.model), &|name| self.tensor(name))?;
        for name in [CONFIG_FILE, GENERATION_CONFIG_FILE].into_iter().chain(TOKENIZER_FILES) {
            let source = self.folder.join(name);
            if source.exists() {
                fs::copy(&source, out.join(name)).map_err(|error| TrainError::storage("copy", &source, error))?;
            }
        }
        Ok(())
    }

    /// How far the weights are from those of a checkpoint, by kind of tensor.
    fn compare(&self, folder: &Path) -> Result<Differences, TrainError> {
        let model = checkpoint::read_model(folder)?;
        let differs = model.differences(&self.model);
        if !differs.is_empty() {
            let message = format!("the checkpoint {} is another model than the base: {differs:?}", folder.display());
            return Err(TrainError::new(FailureKind::Data, message));
        }
        let merged = MappedCheckpoint::open(folder, &model)?;
        let mut differences = Differences::new();
        for tensor in tensors(&self.model) {
            let (rebuilt, merged) = (self.tensor(&tensor.name)?, find(&merged, &tensor.name)?);
            check_finite(&tensor.name, &merged)?;
            let Difference { max_abs, max_rel } = difference(&rebuilt, &merged);
            let of_kind = differences.entry(module(&tensor.name).to_owned()).or_default();
            *of_kind = Difference { max_abs: of_kind.max_abs.max(max_abs), max_rel: of_kind.max_rel.max(max_rel) };
        }
        Ok(differences)
    }
}

/// A tensor of a checkpoint in fp32.
fn find(checkpoint: &MappedCheckpoint, name: &str) -> Result<Tensor, TrainError> {
    let missing = || TrainError::new(FailureKind::Internal, format!("{name} is not in a checkpoint that was checked"));
    Ok(checkpoint.find(name).ok_or_else(missing)?.1.to_kind(Kind::Float))
}

/// What is not finite equals nothing, and is near nothing.
fn check_finite(name: &str, value: &Tensor) -> Result<(), TrainError> {
    match value.isfinite().all().int64_value(&[]) {
        0 => Err(TrainError::new(FailureKind::Data, format!("{name} has values that are not finite"))),
        _ => Ok(()),
    }
}

fn difference(rebuilt: &Tensor, merged: &Tensor) -> Difference {
    let largest = |tensor: &Tensor| tensor.abs().max().double_value(&[]);
    let (max_abs, size) = (largest(&(rebuilt - merged)), largest(merged));
    // A tensor of zeros is equal or is something else altogether.
    let max_rel = if max_abs == 0.0 { 0.0 } else { max_abs / size.max(f64::MIN_POSITIVE) };
    Difference { max_abs, max_rel: max_rel.min(f64::MAX) }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::{
        domain::{lineage::ADAPTER_FILE, spec::TrainSpec},
        train::test_support::{self, method},
    };

    /// A run with two restarts, after updates 9 and 14, and its folder.
    fn given_run(patch: serde_json::Value) -> (tempfile::TempDir, TrainSpec) {
        let folder = test_support::scratch_dir();
        let mut spec = test_support::spec(patch);
        spec.checkpoints.every_steps = 9;
        test_support::train(folder.path(), &spec);
        (folder, spec)
    }

    fn args(run: &Path, num_restarts: usize) -> RebuildArgs {
        RebuildArgs {
            base: run.join("out/base/4"),
            deltas: (1..=num_restarts).map(|restart| run.join(format!("out/restarts/{restart}"))).collect(),
            out: None,
            compare: None,
            threads: 1,
        }
    }

    fn change_delta(run: &Path, change: impl Fn(&str, Tensor) -> Option<Tensor>) {
        let path = run.join("out/restarts/2").join(ADAPTER_FILE);
        let changed = test_support::read_tensors(&path).into_iter();
        let changed: Vec<_> =
            changed.filter_map(|(name, tensor)| Some((name.clone(), change(&name, tensor)?))).collect();
        tensor_file::write(&path, &changed).unwrap();
    }

    #[test]
    fn base_and_deltas_give_the_merged_weights_to_the_bit() {
        for patch in [
            json!({}),
            json!({"model": {"tie_word_embeddings": true}}),
            json!({"method": method(json!({"scale": 0.7, "train_embeddings": false, "train_head": false}))}),
            json!({"method": method(json!({"target_modules": ["q_proj", "down_proj"]}))}),
        ] {
            let (run, _) = given_run(patch);
            for (num_restarts, step) in [(1, 9), (2, 14)] {
                let merged = run.path().join(format!("out/checkpoints/{step}"));
                let out = run.path().join(format!("rebuilt/{step}"));
                let args = RebuildArgs {
                    compare: Some(merged.clone()),
                    out: Some(out.clone()),
                    ..args(run.path(), num_restarts)
                };
                let differences = args.rebuild().unwrap();
                assert!(differences.contains_key("q_proj") && differences.contains_key("norm"), "{differences:?}");
                assert!(differences.values().all(|d| *d == Difference::default()), "{differences:?}");
                for file in fs::read_dir(&merged).unwrap().map(|entry| entry.unwrap().file_name()) {
                    assert!(fs::read(merged.join(&file)).unwrap() == fs::read(out.join(&file)).unwrap(), "{file:?}");
                }
            }
        }
    }

    #[test]
    fn a_changed_weight_is_seen_in_its_kind_alone() {
        let (run, _) = given_run(json!({}));
        let merged = run.path().join("out/checkpoints/14");
        let path = merged.join(MODEL_FILE);
        let mut tensors = test_support::read_tensors(&path);
        let changed = tensors.iter_mut().find(|(name, _)| name == "model.layers.1.self_attn.k_proj.weight").unwrap();
        let size = changed.1.abs().max().double_value(&[]);
        changed.1 = &changed.1 + 1e-3;
        tensor_file::write(&path, &tensors).unwrap();

        let differences = RebuildArgs { compare: Some(merged), ..args(run.path(), 2) }.rebuild().unwrap();

        for (kind, difference) in &differences {
            let expected = if kind == "k_proj" { 1e-3 } else { 0.0 };
            assert!((difference.max_abs - expected).abs() < 1e-6, "{kind}: {difference:?}");
        }
        let expected = 1e-3 / (size + 1e-3);
        assert!((differences["k_proj"].max_rel / expected - 1.0).abs() < 0.01 + 1e-3 / size, "{differences:?}");
    }

    #[test]
    fn a_delta_that_does_not_fit_is_refused_by_the_name_of_its_tensor() {
        let (run, _) = given_run(json!({}));
        let prefix = "base_model.model.model";
        let [factor, norm] = ["layers.0.mlp.up_proj.lora_B.weight", "norm.weight"].map(|n| format!("{prefix}.{n}"));
        let error = || args(run.path(), 2).rebuild().unwrap_err();
        let original = test_support::read_tensors(&run.path().join("out/restarts/2").join(ADAPTER_FILE));
        let restore = || tensor_file::write(&run.path().join("out/restarts/2").join(ADAPTER_FILE), &original).unwrap();

        change_delta(run.path(), |name, tensor| (name != factor && name != norm).then_some(tensor));
        let message = error().message;
        for name in [&factor, &norm] {
            assert!(message.contains(&format!("/{ADAPTER_FILE}/{name} is missing")), "{message}");
        }
        restore();
        change_delta(run.path(), |name, tensor| {
            Some(if name == factor { tensor.transpose(0, 1).contiguous() } else { tensor })
        });
        assert!(error().message.contains(&format!("{factor} has the shape [3, 24], wanted is [24, 3]")), "{}", error());
        restore();
        change_delta(run.path(), |name, tensor| Some(if name == norm { tensor / 0.0 } else { tensor }));
        assert!(error().message.contains("model.norm.weight has values that are not finite"), "{}", error());
        assert_eq!(error().kind, FailureKind::Data);
        restore();
        args(run.path(), 2).rebuild().unwrap();

        fs::write(run.path().join("out/restarts/1/adapter_model.safetensors"), b"short").unwrap();
        assert!(error().message.contains("restarts/1") && error().kind == FailureKind::Data, "{}", error());
    }

    #[test]
    fn a_delta_of_another_model_is_refused() {
        let (run, _) = given_run(json!({}));
        let (other, _) = given_run(json!({"model": {"hidden_size": 8}}));
        let args = RebuildArgs { deltas: vec![other.path().join("out/restarts/1")], ..args(run.path(), 0) };
        let error = args.rebuild().unwrap_err();
        assert!(error.kind == FailureKind::Data && error.message.contains("has the shape"), "{error}");
    }
}
