//! How a run spends its memory, and what the trainer chooses where the spec leaves that to it.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::{BatchSpec, TrainSpec};

/// How the run's memory is spent.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct MemorySpec {
    /// What the backward pass computes again instead of keeping it. The results do not depend on it.
    pub recompute: Recompute,
    /// How `lora` and `relora` keep the frozen matrices on the device in the low-rank phase.
    pub frozen_weights: FrozenWeights,
    /// Where W + sBA is kept, which is applied as one matrix.
    pub merged_weights: MergedWeights,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum Recompute {
    /// Nothing: every activation is kept.
    None,
    /// What is cheap to compute: the outputs of norms, and the product within SwiGLU.
    Cheap,
    /// Every layer: its input alone is kept.
    Layers,
}

/// Other than `full`, a master in fp32 stays in host memory, into which restarts merge.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum FrozenWeights {
    /// In fp32.
    Full,
    /// In 8 bits, with a scale per output channel.
    Int8,
    /// In 4 bits of the type NF4, with a scale per block of 64.
    Nf4,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum MergedWeights {
    /// As the trainer chooses: resident where that fits, scratch with quantised frozen weights.
    Auto,
    /// Of all layers, computed once per update.
    Resident,
    /// Of one layer, computed in every pass.
    Scratch,
}

/// Where W + sBA is kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum MergedPlan {
    Resident,
    Scratch,
}

/// A number of sequences, or `auto`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(untagged)]
pub enum MicroBatch {
    #[schema(title = "MicroBatchSeqs")]
    Seqs(i64),
    #[schema(title = "MicroBatchAuto")]
    Auto(AutoKeyword),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum AutoKeyword {
    Auto,
}

/// What is settled of what a spec may leave to the trainer. It is chosen once, at a run's first start, because results
/// depend on it in their last bits.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct Choices {
    pub micro_batch_seqs: i64,
    pub merged_weights: MergedPlan,
}

impl MicroBatch {
    pub const AUTO: Self = Self::Auto(AutoKeyword::Auto);

    /// The number, where it is settled.
    pub fn seqs(self) -> Option<i64> {
        match self {
            Self::Seqs(seqs) => Some(seqs),
            Self::Auto(_) => None,
        }
    }
}

impl MergedWeights {
    /// The plan, where it is settled.
    pub fn plan(self) -> Option<MergedPlan> {
        match self {
            Self::Auto => None,
            Self::Resident => Some(MergedPlan::Resident),
            Self::Scratch => Some(MergedPlan::Scratch),
        }
    }
}

impl From<MergedPlan> for MergedWeights {
    fn from(plan: MergedPlan) -> Self {
        match plan {
            MergedPlan::Resident => Self::Resident,
            MergedPlan::Scratch => Self::Scratch,
        }
    }
}

impl TrainSpec {
    /// What the spec leaves to nobody; none while anything of it is `auto`.
    pub fn choices(&self) -> Option<Choices> {
        Some(Choices {
            micro_batch_seqs: self.batch.micro_batch_seqs.seqs()?,
            merged_weights: self.memory.merged_weights.plan()?,
        })
    }

    /// The spec with these choices in the place of every `auto`.
    pub fn with_choices(&self, choices: &Choices) -> Self {
        let micro_batch_seqs = self.batch.micro_batch_seqs.seqs().unwrap_or(choices.micro_batch_seqs);
        let merged_weights = self.memory.merged_weights.plan().unwrap_or(choices.merged_weights);
        Self {
            batch: BatchSpec { micro_batch_seqs: MicroBatch::Seqs(micro_batch_seqs), ..self.batch.clone() },
            memory: MemorySpec { merged_weights: merged_weights.into(), ..self.memory },
            ..self.clone()
        }
    }
}
