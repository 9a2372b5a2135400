//! What this client reads of the server's answers. Fields that it has no use for are left out, so
//! that a newer server, which may send more, is understood.

use std::collections::BTreeMap;

use chrono::{DateTime, Utc};
use serde::Deserialize;
use serde_json::Value;

use crate::domain::{
    ids::{DatasetId, JobId, LineageTaskId, NodeId, TokenizationId},
    job::{Failure, JobState, WaitReason},
    verification::Difference,
};

/// One page of a list.
#[derive(Debug, Deserialize)]
pub struct Page {
    pub data: Vec<Value>,
    /// A text, or a step; null on the last page.
    pub next_cursor: Option<Value>,
}

#[derive(Debug, Deserialize)]
pub struct Dataset {
    pub id: DatasetId,
    pub name: String,
    /// empty, uploading, ready or failed.
    pub state: String,
    pub size_bytes: Option<u64>,
    pub num_documents: Option<i64>,
    pub error: Option<String>,
    pub created_at: DateTime<Utc>,
}

#[derive(Debug, Deserialize)]
pub struct Tokenization {
    pub id: TokenizationId,
    pub state: TokenizationState,
    /// None for one that is learned from the text.
    pub tokenizer_checkpoint: Option<NodeId>,
    pub tokenizer_vocab_size: Option<i64>,
    pub train_tokens: Option<i64>,
    pub valid_tokens: Option<i64>,
    pub train_documents: Option<i64>,
    pub valid_documents: Option<i64>,
    pub failure: Option<Failure>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum TokenizationState {
    Queued,
    Running,
    Ready,
    Failed,
}

#[derive(Debug, Deserialize)]
pub struct Job {
    pub id: JobId,
    pub name: String,
    pub state: JobState,
    pub wait_reason: Option<WaitReason>,
    pub queue_position: Option<i64>,
    #[serde(default)]
    pub warnings: Vec<String>,
    pub failure: Option<Failure>,
    pub progress: Option<Progress>,
    pub stored_bytes: Option<u64>,
    pub created_at: DateTime<Utc>,
    pub started_at: Option<DateTime<Utc>>,
    pub finished_at: Option<DateTime<Utc>>,
}

#[derive(Debug, Clone, Deserialize)]
pub struct Progress {
    pub step: u64,
    pub num_steps: u64,
    pub loss: Option<f64>,
    pub learning_rate: Option<f64>,
    pub tokens_per_s: Option<f64>,
    pub num_restarts: i64,
    pub total_restarts: i64,
    pub eta_s: Option<f64>,
}

#[derive(Debug, Deserialize)]
pub struct JobEvent {
    pub at: DateTime<Utc>,
    #[serde(rename = "type")]
    pub kind: String,
    pub message: String,
}

#[derive(Debug, Deserialize)]
pub struct Metric {
    pub step: i64,
    pub name: String,
    pub value: f64,
}

/// A restart that is checked, or whose weights are rebuilt.
#[derive(Debug, Deserialize)]
pub struct LineageTask {
    pub id: LineageTaskId,
    /// verify or materialize.
    pub kind: String,
    pub restart: NodeId,
    pub state: LineageTaskState,
    pub checkpoint: Option<NodeId>,
    pub verification: Option<Verification>,
    pub failure: Option<Failure>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum LineageTaskState {
    Queued,
    Running,
    Succeeded,
    Failed,
}

#[derive(Debug, Deserialize)]
pub struct Verification {
    pub is_sound: bool,
    pub message: String,
    #[serde(default)]
    pub differences: BTreeMap<String, Difference>,
    #[serde(default)]
    pub files: Vec<CheckedFile>,
}

#[derive(Debug, Deserialize)]
pub struct CheckedFile {
    pub node: NodeId,
    pub name: String,
    pub problem: Option<String>,
}

/// A base, a restart or a checkpoint.
#[derive(Debug, Deserialize)]
pub struct Node {
    pub id: NodeId,
    /// None of a checkpoint that came from outside.
    pub job: Option<JobId>,
    pub name: Option<String>,
    pub step: i64,
    pub restart: i64,
    #[serde(default)]
    pub superseded: bool,
    #[serde(default)]
    pub pinned: bool,
    pub deleted_at: Option<DateTime<Utc>>,
    pub size_bytes: u64,
    #[serde(default)]
    pub files: Vec<NodeFile>,
    pub created_at: DateTime<Utc>,
}

#[derive(Debug, Clone, Deserialize)]
pub struct NodeFile {
    pub name: String,
    pub size_bytes: u64,
    pub sha256: String,
}

/// What was deleted, and what was not.
#[derive(Debug, Deserialize)]
pub struct Deletion {
    pub dry_run: bool,
    pub num_deleted: u64,
    pub freed_bytes: u64,
    pub deleted: Vec<NodeId>,
    pub refused: Vec<DeletionRefusal>,
}

#[derive(Debug, Deserialize)]
pub struct DeletionRefusal {
    pub message: String,
}

/// Bytes in the store, by what they hold.
#[derive(Debug, Deserialize)]
pub struct Usage {
    pub total_bytes: u64,
    pub datasets_bytes: u64,
    pub tokenizations_bytes: u64,
    pub bases_bytes: u64,
    pub restarts_bytes: u64,
    pub checkpoints_bytes: u64,
    pub states_bytes: u64,
    pub logs_bytes: u64,
}
