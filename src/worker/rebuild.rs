//! The trainer as a child process that rebuilds weights: folders in, one report out.

use std::{
    os::unix::process::ExitStatusExt,
    path::{Path, PathBuf},
    process::Stdio,
};

use anyhow::{Context, Result};
use tokio::process::Command;

use crate::domain::{
    contract::RebuildReport,
    job::{Failure, FailureKind},
    verification::Differences,
};

/// What to rebuild, and what to do with it.
#[derive(Debug)]
pub struct RebuildArgs<'a> {
    pub program: &'a Path,
    pub base: PathBuf,
    /// In the order of their restarts.
    pub deltas: Vec<PathBuf>,
    /// The folder for the checkpoint.
    pub out: Option<PathBuf>,
    /// The folder of a checkpoint to compare with.
    pub compare: Option<PathBuf>,
}

/// Lines of the trainer's log that a failure carries.
const TAIL_LINES: usize = 40;

/// Rebuilds the weights after the last of the deltas. The trainer is killed when this is dropped.
pub async fn rebuild(args: RebuildArgs<'_>) -> Result<Differences, Failure> {
    let output = run(&args).await.map_err(|error| Failure::new(FailureKind::Infrastructure, format!("{error:#}")))?;
    let failed = |kind, message: String| {
        let log = String::from_utf8_lossy(&output.stderr).replace('\0', "");
        let lines: Vec<_> = log.trim_end().lines().collect();
        Failure { log_tail: lines[lines.len().saturating_sub(TAIL_LINES)..].join("\n"), ..Failure::new(kind, message) }
    };
    match (serde_json::from_slice(&output.stdout), output.status.signal()) {
        (Ok(RebuildReport::Done { differences }), _) if output.status.success() => Ok(differences),
        (Ok(RebuildReport::Failed { kind, message }), _) => Err(failed(kind, message)),
        (_, Some(signal)) => {
            Err(failed(FailureKind::Infrastructure, format!("the trainer was ended by signal {signal}")))
        }
        _ => Err(failed(FailureKind::Internal, format!("the trainer ended without a report: {}", output.status))),
    }
}

async fn run(args: &RebuildArgs<'_>) -> Result<std::process::Output> {
    let mut command = Command::new(args.program);
    // One thread: the training beside it needs the others, and what is computed is little beside what is read.
    command.arg("--rebuild").arg(&args.base).args(&args.deltas).args(["--threads", "1"]);
    for (flag, folder) in [("--out", &args.out), ("--compare", &args.compare)] {
        if let Some(folder) = folder {
            command.arg(flag).arg(folder);
        }
    }
    command.stdin(Stdio::null()).process_group(0).kill_on_drop(true);
    command.output().await.with_context(|| format!("start the trainer {}", args.program.display()))
}
