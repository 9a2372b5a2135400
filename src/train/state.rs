//! What an exact continuation needs: the loop's own values, the trained parameters with their moments, and, wrapped,
//! the frozen matrices, which lie in a file of their own because a whole cycle shares them.

use std::{fs, path::Path};

use serde::{Deserialize, Serialize};
use tch::{Device, Tensor};

use super::{
    error::TrainError,
    host_copy::copy_to_host,
    ranks::wrapped_matrices,
    relora::Wrapping,
    tensor_file,
    weights::{Group, LowRankWeights, Weights},
};
use crate::domain::{
    contract::{FORMAT_VERSION, Fingerprint},
    job::FailureKind,
    lineage,
    spec::{Choices, TrainSpec},
};

pub const STATE_JSON: &str = "state.json";
pub const STATE_TENSORS: &str = "state.safetensors";

/// Everything that the loop remembers from one step to the next, beside tensors.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LoopState {
    /// Updates done.
    pub step: i64,
    /// Restarts done.
    pub restart: i64,
    /// Global batches read: the updates, and those that were skipped because their loss was not finite.
    pub num_batches: i64,
    pub num_tokens: i64,
    pub num_skipped_in_a_row: i64,
    pub phase: Phase,
    /// The evaluation after this step was cut short by a stop, and is made up for by whoever goes on.
    pub evaluation_due: bool,
    /// The newest checkpoint, and the newest whose weights have given a finite loss since: that one is named where the
    /// run cannot go on.
    pub last_checkpoint_step: Option<i64>,
    pub last_good_checkpoint_step: Option<i64>,
}

impl LoopState {
    /// Before the first update.
    pub fn new() -> Self {
        Self {
            step: 0,
            restart: 0,
            num_batches: 0,
            num_tokens: 0,
            num_skipped_in_a_row: 0,
            phase: Phase::FullRank,
            evaluation_due: false,
            last_checkpoint_step: None,
            last_good_checkpoint_step: None,
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Phase {
    FullRank,
    LowRank,
}

impl Phase {
    pub fn name(self) -> &'static str {
        match self {
            Self::FullRank => "full rank",
            Self::LowRank => "low rank",
        }
    }
}

/// `state.json`.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct StateFile {
    pub format_version: i64,
    #[serde(rename = "loop")]
    pub loop_state: LoopState,
    /// Updates that Adam's moments have seen: the full-rank parameters' and the factors'.
    num_updates: Vec<i64>,
    pub fingerprint: Fingerprint,
    /// As the run went by it, with nothing left to choose.
    spec: TrainSpec,
}

impl StateFile {
    pub fn new(loop_state: &LoopState, weights: &Weights, fingerprint: &Fingerprint, spec: &TrainSpec) -> Self {
        Self {
            format_version: FORMAT_VERSION,
            loop_state: loop_state.clone(),
            num_updates: weights.groups().map(|group| group.num_updates).collect(),
            fingerprint: fingerprint.clone(),
            spec: spec.clone(),
        }
    }

    pub fn read(dir: &Path) -> Result<Self, TrainError> {
        let path = dir.join(STATE_JSON);
        let fail = |reason: String| TrainError::state(&path, reason);
        let json = fs::read(&path).map_err(|error| fail(error.to_string()))?;
        // The version is looked at first: another version's fields would be refused as damage.
        let value: serde_json::Value = serde_json::from_slice(&json).map_err(|error| fail(error.to_string()))?;
        match value["format_version"].as_i64() {
            Some(FORMAT_VERSION) => serde_json::from_value(value).map_err(|error| fail(error.to_string())),
            other => Err(fail(format!(
                "format_version {} is not known to this trainer, which reads {FORMAT_VERSION}; \
                 continue with the trainer that wrote it",
                other.map_or("(none)".into(), |version| version.to_string())
            ))),
        }
    }

    /// What the run chose that wrote the state.
    pub fn choices(&self) -> Option<Choices> {
        self.spec.choices()
    }

    /// Refuses a spec under which the state would mean something else. How often the run is evaluated and saved,
    /// the micro-batch, and what is computed again, may change.
    pub fn check_spec(&self, spec: &TrainSpec) -> Result<(), TrainError> {
        let theirs = &self.spec;
        let differs = [
            ("model", theirs.model != spec.model),
            ("method", theirs.method != spec.method),
            ("optimizer", theirs.optimizer != spec.optimizer),
            ("schedule", theirs.schedule != spec.schedule),
            ("batch/num_seqs", theirs.batch.num_seqs != spec.batch.num_seqs),
            ("batch/skip_seqs", theirs.batch.skip_seqs != spec.batch.skip_seqs),
            ("batch/sequence_length", theirs.batch.sequence_length != spec.batch.sequence_length),
            ("memory/frozen_weights", theirs.memory.frozen_weights != spec.memory.frozen_weights),
            ("precision", theirs.precision != spec.precision),
            ("seed", theirs.seed != spec.seed),
        ];
        let fields: Vec<_> = differs.iter().filter(|(_, differs)| *differs).map(|(field, _)| *field).collect();
        match fields.as_slice() {
            [] => Ok(()),
            fields => Err(TrainError::new(
                FailureKind::UserConfig,
                format!("the state was written under another spec: {} differ", fields.join(", ")),
            )),
        }
    }

    /// Reads the tensors that belong to this state into `weights`, which has the shape of its phase.
    pub fn read_tensors(&self, dir: &Path, weights: &mut Weights) -> Result<(), TrainError> {
        let targets = weights.groups().flat_map(|group| named(group, &group_buffers(group))).collect();
        tensor_file::read_into(&dir.join(STATE_TENSORS), targets)?;
        if self.num_updates.len() != weights.groups().count() {
            return Err(TrainError::state(&dir.join(STATE_JSON), "num_updates does not fit its phase"));
        }
        for (group, &num_updates) in weights.groups_mut().zip(&self.num_updates) {
            group.num_updates = num_updates;
        }
        if let Some(low_rank) = &mut weights.low_rank {
            read_frozen(dir, self.loop_state.restart, low_rank)?;
        }
        Ok(())
    }

    /// The wrapped matrices at the warm start, in host memory.
    pub fn read_start(&self, dir: &Path, spec: &TrainSpec) -> Result<Vec<Tensor>, TrainError> {
        let weights = Wrapping::of(spec).map(|wrapping| wrapping.zeros(Device::Cpu));
        let Some(mut low_rank) = weights.and_then(|weights| weights.low_rank) else { return Ok(Vec::new()) };
        read_frozen(dir, 0, &mut low_rank)?;
        Ok(wrapped_matrices(&low_rank))
    }
}

/// Reads the frozen matrices after a restart: they lie beside the states of their output directory.
fn read_frozen(state_dir: &Path, restart: i64, low_rank: &mut LowRankWeights) -> Result<(), TrainError> {
    if low_rank.frozen.is_empty() {
        return Ok(());
    }
    let path = state_dir.join("../..").join(lineage::frozen_path(restart));
    let targets = low_rank.frozen.iter().map(|f| (f.name.clone(), f.master.shallow_clone())).collect();
    tensor_file::read_into(&path, targets)?;
    Ok(())
}

/// A copy, in host memory, of what `state.safetensors` holds.
pub fn state_tensors(weights: &Weights) -> Vec<(String, Tensor)> {
    weights.groups().flat_map(|group| named(group, &group_buffers(group).map(copy_to_host).each_ref())).collect()
}

/// A copy, in host memory, of what `frozen.safetensors` holds.
pub fn frozen_tensors(low_rank: &LowRankWeights) -> Vec<(String, Tensor)> {
    low_rank.frozen.iter().map(|frozen| (frozen.name.clone(), copy_to_host(&frozen.master))).collect()
}

fn group_buffers(group: &Group) -> [&Tensor; 3] {
    [&group.values, &group.exp_avg, &group.exp_avg_sq]
}

fn named(group: &Group, buffers: &[&Tensor; 3]) -> Vec<(String, Tensor)> {
    let of = |prefix: &'static str, buffer: &Tensor| {
        let views = group.views(buffer);
        group.names().map(move |name| format!("{prefix}.{name}")).zip(views).collect::<Vec<_>>()
    };
    let [values, exp_avg, exp_avg_sq] = *buffers;
    [of("value", values), of("exp_avg", exp_avg), of("exp_avg_sq", exp_avg_sq)].into_iter().flatten().collect()
}
