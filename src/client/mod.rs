//! The command-line client. It speaks HTTP alone, so that it works against any server, and holds one
//! file per resource, each with its commands and what they do.

pub mod checkpoint;
pub mod dataset;
pub mod job;
pub mod node;
pub mod restart;
pub mod usage;

mod deletion;
mod download;
mod folder;
mod http;
mod print;
mod resources;
mod sse;
mod upload;
mod watch;

pub use http::{Http, HttpError, Refusal};

use crate::domain::job::JobState;

/// What a command came to, as the exit code of the process says it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    Done,
    JobFailed,
    JobCancelled,
    /// The user pressed Ctrl-C while watching; the job goes on.
    StoppedWatching,
}

impl Outcome {
    /// The outcome that a watched job's final state stands for.
    fn of(state: JobState) -> Self {
        match state {
            JobState::Failed => Self::JobFailed,
            JobState::Cancelled => Self::JobCancelled,
            _ => Self::Done,
        }
    }

    pub fn exit_code(self) -> u8 {
        match self {
            Self::Done => 0,
            Self::JobFailed => 1,
            Self::JobCancelled => 3,
            Self::StoppedWatching => 130,
        }
    }
}
