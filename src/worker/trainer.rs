//! The trainer as a child process: commands in, events out, its log aside.

use std::{
    path::{Path, PathBuf},
    process::Stdio,
    time::Duration,
};

use anyhow::{Context, Result, bail};
use rustix::process::{Pid, Signal, kill_process, test_kill_process};
use tokio::{
    io::{AsyncBufReadExt, AsyncWriteExt, BufReader, Lines},
    process::{Child, ChildStdin, ChildStdout},
};

use super::log_file::LogFile;
use crate::domain::contract::{Command, Event, Probe};

/// How to start a trainer.
#[derive(Debug)]
pub struct TrainerArgs<'a> {
    pub program: &'a Path,
    pub spec: PathBuf,
    pub data: PathBuf,
    pub out: PathBuf,
    pub resume: Option<PathBuf>,
    /// The checkpoint to begin with, where there is no state to go on from.
    pub weights: Option<PathBuf>,
    pub threads: usize,
    /// The one GPU that it may see, in the driver's terms; all without.
    pub gpu: Option<String>,
    /// The file for a profile of some updates.
    pub profile: Option<PathBuf>,
}

/// A running trainer. It is killed when dropped.
#[derive(Debug)]
pub struct Trainer {
    child: Child,
    stdin: Option<ChildStdin>,
    events: Lines<BufReader<ChildStdout>>,
    pub log: LogFile,
}

impl Trainer {
    pub async fn spawn(args: &TrainerArgs<'_>, log: &Path) -> Result<Self> {
        let mut command = tokio::process::Command::new(args.program);
        command.arg(&args.spec).arg("--data").arg(&args.data).arg("--out").arg(&args.out);
        command.arg("--threads").arg(args.threads.to_string());
        if let Some(state) = &args.resume {
            command.arg("--resume").arg(state);
        }
        if let Some(weights) = &args.weights {
            command.arg("--weights").arg(weights);
        }
        if let Some(profile) = &args.profile {
            command.arg("--profile").arg(profile);
        }
        if let Some(gpu) = &args.gpu {
            command.env("CUDA_VISIBLE_DEVICES", gpu);
        }
        let mut child = command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            // A Ctrl-C in the terminal is for the agent, which then asks its trainers to stop.
            .process_group(0)
            .kill_on_drop(true)
            .spawn()
            .with_context(|| format!("start the trainer {}", args.program.display()))?;
        let stdout = child.stdout.take().context("take the trainer's stdout")?;
        let stderr = child.stderr.take().context("take the trainer's stderr")?;
        let log = LogFile::capture(stderr, log).await?;
        Ok(Self { stdin: child.stdin.take(), child, events: BufReader::new(stdout).lines(), log })
    }

    pub fn pid(&self) -> Option<u32> {
        self.child.id()
    }

    /// The next event, or `None` once the trainer has closed its stdout. May be dropped and called again.
    pub async fn next_event(&mut self) -> Result<Option<Event>> {
        let Some(line) = self.events.next_line().await.context("read the trainer's events")? else { return Ok(None) };
        let event = serde_json::from_str(&line).with_context(|| format!("understand the trainer's event {line:?}"))?;
        Ok(Some(event))
    }

    /// Sends a command. A trainer that has gone already says so by its events.
    pub async fn send(&mut self, command: Command) {
        let Some(stdin) = &mut self.stdin else { return };
        let mut line = serde_json::to_vec(&command).expect("a command is plain JSON");
        line.push(b'\n');
        if let Err(error) = stdin.write_all(&line).await {
            tracing::debug!(%error, ?command, "the trainer takes no more commands");
        }
    }

    /// Stops the process where it is, with everything that it has in memory, or lets it go on.
    pub fn hold(&self, is_held: bool) {
        let Some(pid) = self.child.id().and_then(|id| Pid::from_raw(id.cast_signed())) else { return };
        let signal = if is_held { Signal::STOP } else { Signal::CONT };
        if let Err(error) = kill_process(pid, signal) {
            tracing::warn!(%error, is_held, "could not hold or release the trainer");
        }
    }

    /// Kills the process.
    pub async fn kill(&mut self) -> Exit {
        if let Err(error) = self.child.start_kill() {
            tracing::warn!(%error, "could not kill the trainer");
        }
        self.end().await
    }

    /// Waits for the process to end, kills it if it does not, and says how it ended.
    pub async fn end(&mut self) -> Exit {
        use std::os::unix::process::ExitStatusExt;
        // Its events are over, or no longer wanted: what is left is to exit.
        self.stdin = None;
        if tokio::time::timeout(TIME_TO_EXIT, self.child.wait()).await.is_err()
            && let Err(error) = self.child.start_kill()
        {
            tracing::warn!(%error, "could not kill the trainer");
        }
        let status = self.child.wait().await;
        self.log.closed().await;
        match status {
            Ok(status) => match status.signal() {
                Some(signal) => Exit::Signal(signal),
                None => Exit::Code(status.code().unwrap_or(-1)),
            },
            Err(error) => {
                tracing::warn!(%error, "could not wait for the trainer");
                Exit::Code(-1)
            }
        }
    }
}

/// Returns when a trainer that was killed is gone, and with it what it held of a GPU's memory.
pub async fn until_gone(pid: Option<&u32>) {
    let Some(pid) = pid.and_then(|pid| Pid::from_raw(pid.cast_signed())) else { return };
    for _ in 0..600 {
        if test_kill_process(pid).is_err() {
            return;
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    tracing::warn!(trainer.pid = pid.as_raw_pid(), "a killed trainer is still there after a minute");
}

/// From the last event, or the end of its stdin, to the end of the process.
const TIME_TO_EXIT: Duration = Duration::from_secs(5);

/// How a process ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Exit {
    Code(i32),
    Signal(i32),
}

/// Asks the trainer what it can use.
pub async fn probe(program: &Path) -> Result<Probe> {
    let output =
        tokio::process::Command::new(program).arg("--probe").stdin(Stdio::null()).output().await.with_context(
            || format!("start the trainer {}: build it, or name it in RELORA_TRAINER", program.display()),
        )?;
    if !output.status.success() {
        let stderr = String::from_utf8_lossy(&output.stderr);
        bail!("the trainer {} does not start: {}", program.display(), stderr.trim_end());
    }
    serde_json::from_slice(&output.stdout)
        .with_context(|| format!("understand what {} --probe prints", program.display()))
}
