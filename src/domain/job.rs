//! The life of a job: its states, why it waits, and how it can fail.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// `queued -> starting -> running -> succeeded | failed | cancelled`, with
/// `pausing -> paused -> queued`, `cancelling -> cancelled`, and `failed | cancelled -> queued` by a retry.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, ToSchema, sqlx::Type)]
#[serde(rename_all = "snake_case")]
#[sqlx(type_name = "text", rename_all = "snake_case")]
pub enum JobState {
    Queued,
    Starting,
    Running,
    Pausing,
    Paused,
    Cancelling,
    Succeeded,
    Failed,
    Cancelled,
}

impl JobState {
    /// No further change will come, unless its owner asks for a retry.
    pub fn is_final(self) -> bool {
        matches!(self, Self::Succeeded | Self::Failed | Self::Cancelled)
    }
}

/// Why a queued or paused job is not running.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema, sqlx::Type)]
#[serde(rename_all = "snake_case")]
#[sqlx(type_name = "text", rename_all = "snake_case")]
pub enum WaitReason {
    /// No worker that takes work is alive.
    NoWorker,
    /// Workers are alive, but none has a free slot that fits.
    NoFittingSlot,
    /// Workers are alive, but none has the memory that the job needs: start a larger one, or fork with smaller settings.
    NotEnoughMemory,
    /// The project uses all that it may.
    Quota,
    /// The last attempt failed; the next one starts after a delay.
    Backoff,
    /// The tokenization that the job trains on is not ready.
    DatasetNotReady,
    Paused,
}

/// What kind of thing went wrong, which decides who has to act and whether another attempt can help.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema, sqlx::Type)]
#[serde(rename_all = "snake_case")]
#[sqlx(type_name = "text", rename_all = "snake_case")]
pub enum FailureKind {
    UserConfig,
    Data,
    OutOfMemory,
    Diverged,
    Infrastructure,
    Storage,
    Stalled,
    Timeout,
    Preempted,
    Internal,
}

impl FailureKind {
    /// Whether the same work, tried again, may succeed without anybody changing anything.
    pub fn is_retryable(self) -> bool {
        matches!(self, Self::Infrastructure | Self::Storage | Self::Stalled | Self::Preempted)
    }
}

/// Why an attempt or a job failed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Failure {
    pub kind: FailureKind,
    /// What happened, where, and what to do.
    pub message: String,
    /// Whether trying the same again can help.
    pub retryable: bool,
    /// The end of the attempt's log.
    pub log_tail: String,
}

impl Failure {
    pub fn new(kind: FailureKind, message: impl Into<String>) -> Self {
        Self { kind, message: message.into(), retryable: kind.is_retryable(), log_tail: String::new() }
    }
}

/// What can be entered in a job's event log. The list is closed: clients may rely on it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema, sqlx::Type)]
#[serde(rename_all = "snake_case")]
#[sqlx(type_name = "text", rename_all = "snake_case")]
pub enum EventType {
    Submitted,
    Claimed,
    Started,
    Eval,
    OptimizerReset,
    Ranks,
    Sample,
    Base,
    Restart,
    Checkpoint,
    State,
    /// What was trained waits for the store, or no longer does.
    CheckpointLag,
    Warning,
    NumericsChanged,
    Requeued,
    Pausing,
    Paused,
    Resumed,
    Retried,
    CancelRequested,
    Succeeded,
    Failed,
    Cancelled,
}
