//! The training spec: what a client sends (`request`), how it is checked and completed (`normalise`),
//! and the normalised form that is stored, returned and given to the trainer (here).
//!
//! Holding a [`TrainSpec`] is the proof that it was checked: nothing below re-checks or fills in.

pub(in crate::domain) mod check;
mod fork;
mod init;
mod memory;
mod method;
mod normalise;
mod normalise_method;
mod presets;
mod request;
#[cfg(test)]
mod tests;
mod warnings;

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

pub use fork::fork_of;
pub use init::InitFacts;
pub use memory::{AutoKeyword, Choices, FrozenWeights, MemorySpec, MergedPlan, MergedWeights, MicroBatch, Recompute};
pub use method::{
    ControlSpec, FactorsSpec, Linear, LoraSpec, MethodPreset, MethodSpec, OptimizerReset, ReloraSpec, RestartLr,
    RestartSchedule,
};
pub use normalise::DataFacts;
pub use presets::PRESETS;
pub use request::TrainSpecRequest;

use super::ids::{DatasetId, NodeId, TokenizationId};

/// A training spec with every default filled in.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct TrainSpec {
    pub spec_version: i64,
    pub name: String,
    pub dataset: DatasetId,
    pub tokenization: TokenizationId,
    /// The stored checkpoint whose weights the run begins with; null for weights that are drawn.
    pub init_checkpoint: Option<NodeId>,
    pub model: ModelSpec,
    pub method: MethodSpec,
    pub optimizer: OptimizerSpec,
    pub schedule: ScheduleSpec,
    pub batch: BatchSpec,
    pub memory: MemorySpec,
    pub precision: Precision,
    pub deterministic: bool,
    pub seed: i64,
    pub eval: EvalSpec,
    pub checkpoints: CheckpointsSpec,
    pub state_every_s: i64,
    pub resources: ResourcesSpec,
    pub priority: i64,
    pub labels: BTreeMap<String, String>,
    pub max_runtime_s: Option<i64>,
    pub max_stall_s: i64,
    pub retries: RetriesSpec,
}

impl TrainSpec {
    /// The model that is trained: `model`, but for the sizes of a control.
    pub fn trained_model(&self) -> ModelSpec {
        match self.method {
            MethodSpec::Control(ControlSpec { hidden_size, intermediate_size, .. }) => {
                ModelSpec { preset: None, hidden_size, intermediate_size, ..self.model.clone() }
            }
            _ => self.model.clone(),
        }
    }
}

/// A LLaMA model, in the terms of a `transformers` configuration.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct ModelSpec {
    pub preset: Option<String>,
    pub vocab_size: i64,
    pub hidden_size: i64,
    pub intermediate_size: i64,
    pub num_hidden_layers: i64,
    pub num_attention_heads: i64,
    pub num_key_value_heads: i64,
    pub max_position_embeddings: i64,
    pub rms_norm_eps: f64,
    pub rope_theta: f64,
    /// Standard deviation of the initial weights.
    pub initializer_range: f64,
    pub tie_word_embeddings: bool,
}

impl ModelSpec {
    pub fn head_dim(&self) -> i64 {
        self.hidden_size / self.num_attention_heads
    }

    /// (out, in) of the seven matrices of a layer, in the order of `Linear::ALL`.
    pub fn linear_shapes(&self) -> [(i64, i64); 7] {
        let (h, f) = (self.hidden_size, self.intermediate_size);
        let kv = self.num_key_value_heads * self.head_dim();
        [(h, h), (kv, h), (kv, h), (h, h), (f, h), (f, h), (h, f)]
    }

    /// Parameters of these matrices in all layers.
    pub fn num_linear_params(&self) -> i64 {
        self.num_hidden_layers * self.linear_shapes().iter().map(|(o, i)| o * i).sum::<i64>()
    }

    /// Parameters of the whole model, without LoRA factors.
    pub fn num_params(&self) -> i64 {
        let embeddings = if self.tie_word_embeddings { 1 } else { 2 } * self.vocab_size * self.hidden_size;
        let norms = (2 * self.num_hidden_layers + 1) * self.hidden_size;
        embeddings + norms + self.num_linear_params()
    }

    /// Parameters of LoRA factors of this rank beside every matrix.
    pub fn num_lora_params(&self, rank: i64) -> i64 {
        self.num_hidden_layers * self.linear_shapes().iter().map(|(o, i)| rank * (o + i)).sum::<i64>()
    }
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct OptimizerSpec {
    /// Peak rate of the low-rank phase, or of the whole run where there is one phase only.
    pub learning_rate: f64,
    /// Peak rate of the warm start.
    pub warm_start_learning_rate: f64,
    pub betas: [f64; 2],
    pub eps: f64,
    pub weight_decay: f64,
    /// Largest norm of the gradient over all trainable parameters; 0 switches clipping off.
    pub clip_norm: f64,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct ScheduleSpec {
    /// Updates in the whole run, the warm start included.
    pub num_steps: i64,
    pub warmup_steps: i64,
    /// The rate at the end of the cosine, as a share of the peak.
    pub min_lr_frac: f64,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct BatchSpec {
    /// Sequences per update, over all devices and micro-batches.
    pub num_seqs: i64,
    pub sequence_length: i64,
    /// Sequences that go through the model at once; with `auto` as many as the trainer chooses.
    pub micro_batch_seqs: MicroBatch,
    /// Sequences at the start of the run's order that are passed over, because an earlier job has read them.
    pub skip_seqs: i64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum Precision {
    Fp32,
    /// Matrix products in bfloat16; weights, moments and merges in fp32.
    Bf16,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct EvalSpec {
    /// Updates between evaluations; one more before the first update, at the wrap and at the end.
    pub every_steps: i64,
    /// Validation tokens per evaluation, at most.
    pub max_tokens: i64,
    /// Prompts that are continued with the trained model at the end.
    pub prompts: Vec<String>,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct CheckpointsSpec {
    /// Updates between merged checkpoints; one more at the wrap and at the end.
    pub every_steps: i64,
    /// How many of the newest are kept; null for all.
    pub keep_last: Option<i64>,
    /// Beside the newest, those whose step is a multiple of this.
    pub keep_every_steps: Option<i64>,
    /// Beside the newest, as many with the lowest evaluation loss at their step.
    pub keep_best: Option<i64>,
    /// Seconds after which one goes in any case, unless it is pinned or the newest; null for never.
    pub ttl_s: Option<i64>,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct ResourcesSpec {
    pub device: Device,
    pub num_gpus: i64,
}

/// How often a job is tried again after an attempt has failed.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct RetriesSpec {
    /// In a row, without a newer state in between, where neither the job nor its data is at fault.
    pub infrastructure: i64,
    /// In the whole job, after every other failure.
    pub user: i64,
}

/// The device that a job asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema, sqlx::Type)]
#[serde(rename_all = "snake_case")]
#[sqlx(type_name = "text", rename_all = "snake_case")]
pub enum Device {
    /// A GPU where the worker has one, else the CPU.
    Auto,
    Cpu,
    Cuda,
}
