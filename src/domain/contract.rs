//! The contract between the worker and its trainer process: one JSON document per line, commands on
//! the trainer's stdin, events on its stdout. Logs go to stderr.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::{
    job::FailureKind,
    lineage::NodeKind,
    offer::Offer,
    spec::{Choices, Linear},
    verification::Differences,
};

/// Version of this contract and of the state files. A worker claims only what its trainer understands.
pub const FORMAT_VERSION: i64 = 4;

/// What a trainer that is asked with `--probe` says of its machine, on stdout.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Probe {
    #[serde(flatten)]
    pub offer: Offer,
    /// What must be equal for two trainers to compute the same bits.
    pub numerics: Numerics,
    /// Why the GPUs of a machine with a driver cannot be used.
    pub gpu_problem: Option<String>,
}

/// What the worker asks of a running trainer. End of file means that the worker is gone: stop.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "command", rename_all = "snake_case", deny_unknown_fields)]
pub enum Command {
    /// Write a state at the next step boundary and go on.
    SaveState,
    /// Write a state at the next step boundary and end with `Stopped`.
    Stop,
    /// The same, with a checkpoint of the weights as they are then.
    Finish,
}

/// What the trainer reports, from rank 0 alone.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "event", rename_all = "snake_case")]
pub enum Event {
    /// First event: the model is built and the data is open.
    Ready {
        format_version: i64,
        device: String,
        /// Updates already done: 0, or the step of the state that this run goes on from.
        step: i64,
        num_params: i64,
        fingerprint: Fingerprint,
        /// What the run goes by where the spec says `auto`.
        choices: Choices,
    },
    /// One update is done. `step` counts the updates done so far, so the first one reports 1.
    Step(StepReport),
    /// Token-weighted mean loss over the validation split after `step` updates.
    Eval { step: i64, loss: f64, perplexity: f64, num_tokens: i64 },
    /// A node of the lineage is complete on disk under its final name.
    Node(NodeReport),
    /// The optimizer state of the factors was reset after `step` updates.
    OptimizerReset {
        step: i64,
        /// Counted from 1.
        reset: i64,
        /// Share of the moments' entries that are zero now.
        cleared_frac: f64,
    },
    /// How much rank W - W(warm start) has after a restart, by kind of matrix.
    Ranks { step: i64, restart: i64, threshold: f64, kinds: BTreeMap<Linear, RankCount> },
    /// Text generated from one of the spec's prompts, which it begins with.
    Sample { step: i64, prompt: String, text: String },
    /// Something that the user should know and that does not end the run.
    Warning { step: i64, message: String },
    /// Nothing else was said for some seconds: the run is at work within a long step.
    Alive { step: i64 },
    /// What goes on here was begun where the same work gives other bits.
    NumericsChanged { step: i64, before: Fingerprint, now: Fingerprint },
    /// Last event of a run that reached `num_steps`. Every file is written.
    Done { step: i64 },
    /// Last event of a run that was asked to stop. Its state is written.
    Stopped { step: i64 },
    /// Last event of a run that cannot go on.
    Failed { kind: FailureKind, message: String },
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct StepReport {
    pub step: i64,
    /// Mean cross-entropy over all targets of the global batch, before the update.
    pub loss: f64,
    /// Norm over all trainable parameters, before clipping.
    pub grad_norm: f64,
    /// The learning rate of this update.
    pub learning_rate: f64,
    pub tokens_per_s: f64,
    /// Tokens read since the start of the job, all updates together.
    pub num_tokens: i64,
    pub num_restarts: i64,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct NodeReport {
    pub kind: NodeKind,
    pub step: i64,
    /// For a restart its number from 1; for other nodes the restarts done before it.
    pub restart: i64,
    /// Files of the node, by name.
    pub files: Vec<NodeFile>,
    /// How long the training loop stood still for this node: the copy of the tensors, ms.
    pub stall_ms: i64,
    /// Of a restart: the Frobenius norm of what it merged, by kind of matrix.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub update_norms: BTreeMap<Linear, f64>,
}

/// What a trainer that was asked to rebuild weights says at its end, on stdout.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "outcome", rename_all = "snake_case")]
pub enum RebuildReport {
    /// With how far the weights are from those that they were compared with, if they were compared.
    Done {
        differences: Differences,
    },
    Failed {
        kind: FailureKind,
        message: String,
    },
}

/// Singular values of all matrices of a kind.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct RankCount {
    /// Those above the threshold.
    pub num_above: i64,
    pub num_values: i64,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct NodeFile {
    /// The name under which the file is downloaded, such as `model.safetensors`.
    pub name: String,
    /// Where it lies, relative to the output directory. Nodes may share a file: every state of one
    /// cycle names the same frozen weights.
    pub path: String,
}

/// What must be equal for two runs to give the same bits (docs/architecture.md, exact continuation).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Fingerprint {
    #[serde(flatten)]
    pub numerics: Numerics,
    pub micro_batch_seqs: i64,
}

/// The part of a fingerprint that a worker has before it has a job.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Numerics {
    pub device: String,
    pub cpu_capability: String,
    pub num_threads: i64,
    pub libtorch: String,
    pub trainer: String,
}
