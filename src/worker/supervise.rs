//! A running trainer: followed to its end, held where it must not go on, and what it makes carried away.

use std::{path::PathBuf, pin::pin, time::Duration};

use anyhow::{Context, Result, anyhow};
use tokio::{
    sync::{mpsc, oneshot, watch},
    task::JoinError,
    time::{Instant, sleep_until},
};
use tokio_util::task::AbortOnDropHandle;
use tracing::Instrument;

use super::{
    Agent,
    lease_keeper::{LeaseKeeper, Orders},
    log_file::LogShipper,
    reporter::{Report, Reporter},
    staging::Staged,
    train::{StopReason, failed, stop_wish},
    trainer::{Exit, Trainer},
    upload_queue::half_of_free_bytes,
    uploader::{FinishedNode, Uploader},
};
use crate::{
    db::{
        leases::{Lease, WriteError},
        training::{Training, TrainingEnd},
    },
    domain::{
        contract::{Event, Fingerprint},
        job::FailureKind,
        memory, offer,
        spec::Choices,
    },
    shutdown::Shutdown,
};

/// What files are given to be stored when a stop has used up its time on the trainer.
const LEAST_STORING: Duration = Duration::from_secs(5);

/// A running trainer and the tasks that carry its results away.
pub struct Run<'a> {
    agent: &'a Agent,
    training: Training,
    trainer: Trainer,
    /// The checkpoint that the run begins with, until it is read.
    weights: Option<PathBuf>,
    reports: Option<mpsc::UnboundedSender<Report>>,
    nodes: Option<mpsc::UnboundedSender<FinishedNode>>,
    /// None once it has ended.
    reporting: Task,
    uploading: Task,
    /// True while more waits to be stored than the disk may hold.
    disk_full: watch::Receiver<bool>,
    log_shipper: LogShipper,
    stop: Option<StopReason>,
    /// By when a worker that has to go leaves, whatever is left to do.
    leaves_at: Option<Instant>,
    hold: Hold,
    /// Whether the trainer got as far as its first step.
    has_begun: bool,
    last_event: Option<Event>,
    oom_kills_before: Option<u64>,
}

/// Why the trainer stands still, with everything that it has in memory, and since when it may be taken to hang.
struct Hold {
    /// Nobody can say whether the lease is still ours.
    is_unsure: bool,
    /// More waits to be stored than the disk may hold.
    is_disk_full: bool,
    /// When the trainer was last heard of, or let go on.
    last_heard: Instant,
}

impl Hold {
    fn is_held(&self) -> bool {
        self.is_unsure || self.is_disk_full
    }
}

impl<'a> Run<'a> {
    pub fn new(agent: &'a Agent, lease: &Lease, training: Training, staged: Staged, trainer: Trainer) -> Self {
        let (reports, reported) = mpsc::unbounded_channel();
        let (nodes, finished_nodes) = mpsc::unbounded_channel();
        let reporter = Reporter { pool: agent.pool.clone(), lease: lease.clone(), job: training.job.clone() };
        // Each slot may fill its part of the disk.
        let (out, num_slots) = (staged.out, agent.slots().len() as u64);
        let uploader = Uploader {
            pool: agent.pool.clone(),
            store: agent.store.clone(),
            lease: lease.clone(),
            project: training.project.clone(),
            job: training.job.clone(),
            stored: staged.stored,
            lag_limit: Duration::from_secs(agent.config.checkpoint_lag_s),
            max_local_bytes: agent.config.max_local_bytes.unwrap_or_else(|| half_of_free_bytes(&out) / num_slots),
            out,
        };
        let (full, disk_full) = watch::channel(false);
        let reporting = tokio::spawn(async { Ok(reporter.run(reported).await?) }.in_current_span());
        let log_shipper = LogShipper::start(agent, lease, &training.job, &trainer.log);
        Self {
            reports: Some(reports),
            nodes: Some(nodes),
            reporting: Some(AbortOnDropHandle::new(reporting)),
            uploading: Some(AbortOnDropHandle::new(tokio::spawn(uploader.run(finished_nodes, full).in_current_span()))),
            disk_full,
            log_shipper,
            weights: staged.weights,
            stop: None,
            leaves_at: None,
            has_begun: false,
            hold: Hold { is_unsure: false, is_disk_full: false, last_heard: Instant::now() },
            last_event: None,
            oom_kills_before: oom_kills(),
            agent,
            training,
            trainer,
        }
    }

    /// Follows the trainer to its end, then waits until everything that it made is stored. Only a worker that has to go
    /// sets a deadline to that; whoever pauses or cancels a job is promised what it has trained.
    pub async fn supervise(
        mut self,
        keeper: &LeaseKeeper,
        shutdown: &Shutdown,
        ends_at: Option<Instant>,
    ) -> TrainingEnd {
        let mut wish = pin!(stop_wish(keeper.orders(), shutdown.clone(), ends_at));
        let mut orders = keeper.orders();
        let broken = loop {
            let (stalled_at, leaves_at) = (self.stalled_at(), self.leaves_at);
            tokio::select! {
                event = self.trainer.next_event() => match event {
                    Ok(Some(event)) => self.take(event),
                    Ok(None) => break None,
                    Err(error) => break Some(error.into()),
                },
                reason = &mut wish, if self.stop.is_none() => self.ask_to_stop(reason).await,
                Ok(()) = orders.changed(), if self.stop.is_none() => {
                    let is_unsure = *orders.borrow_and_update() == Orders::Unsure;
                    self.hold(is_unsure, self.hold.is_disk_full);
                }
                Ok(()) = self.disk_full.changed(), if self.stop.is_none() => {
                    let is_disk_full = *self.disk_full.borrow_and_update();
                    self.hold(self.hold.is_unsure, is_disk_full);
                }
                () = sleep_until(stalled_at), if !self.hold.is_held() => break Some(Broken::Stalled),
                () = shutdown.wait(), if leaves_at.is_none() => self.leaves_at = Some(self.grace_from_now()),
                () = until_instant(leaves_at) => {
                    tracing::warn!("the trainer did not stop in time; killed");
                    break Some(Broken::Overdue);
                }
                // While the trainer lives these end only because the database or the disk refused something.
                ended = join(&mut self.reporting) => break Some(cause(ended, "write reports").into()),
                ended = join(&mut self.uploading) => break Some(Broken::of_uploads(cause(ended, "store nodes"))),
            }
        };
        let exit = match broken {
            Some(Broken::Stalled | Broken::Overdue) => self.trainer.kill().await,
            _ => self.trainer.end().await,
        };
        // Whatever came of the trainer: what it has finished is worth keeping.
        let stored = self.carry_away(shutdown).await;
        let end = match (broken, stored) {
            (Some(Broken::Stalled), _) => self.stalled(),
            (Some(Broken::Storage(error)), _) => failed(FailureKind::Storage, format!("{error:#}")),
            (Some(Broken::Contract(error)), _) => failed(FailureKind::Internal, format!("{error:#}")),
            (None | Some(Broken::Overdue), Ok(everything_stored)) => self.end(exit, everything_stored),
            (None | Some(Broken::Overdue), Err(error)) => {
                failed(FailureKind::Storage, format!("could not store the results: {error:#}"))
            }
        };
        self.with_log(end).await
    }

    /// Lets the trainer stand still, or go on: no step is done for nothing, and no disk is filled up.
    fn hold(&mut self, is_unsure: bool, is_disk_full: bool) {
        let was_held = self.hold.is_held();
        self.hold.is_unsure = is_unsure;
        self.hold.is_disk_full = is_disk_full;
        if self.hold.is_held() == was_held {
            return;
        }
        match (is_unsure, is_disk_full) {
            (true, _) => tracing::warn!("trainer held: the lease was not renewed in time, and may be another's"),
            (false, true) => tracing::warn!("trainer held: as much waits for the store as the disk may hold"),
            (false, false) => tracing::info!("the trainer goes on"),
        }
        self.hold.last_heard = Instant::now();
        self.trainer.hold(self.hold.is_held());
    }

    fn stalled_at(&self) -> Instant {
        self.hold.last_heard + Duration::from_secs(self.training.spec.max_stall_s.unsigned_abs())
    }

    fn stalled(&self) -> TrainingEnd {
        let stall_s = self.training.spec.max_stall_s;
        failed(FailureKind::Stalled, format!("the trainer said nothing for {stall_s} s (max_stall_s) and was killed"))
    }

    fn take(&mut self, event: Event) {
        self.hold.last_heard = Instant::now();
        let report = match event {
            Event::Alive { .. } => return,
            Event::NumericsChanged { before, now, .. } => Report::NumericsChanged { before, now },
            Event::Ready { step, fingerprint, choices, .. } => return self.begin(step, fingerprint, choices),
            Event::Step(step) => Report::Step(step),
            Event::Eval { step, loss, perplexity, num_tokens } => Report::Eval { step, loss, perplexity, num_tokens },
            Event::OptimizerReset { step, reset, cleared_frac } => Report::OptimizerReset { step, reset, cleared_frac },
            Event::Ranks { step, restart, threshold, kinds } => Report::Ranks { step, restart, threshold, kinds },
            Event::Sample { step, prompt, text } => Report::Sample { step, prompt, text },
            Event::Warning { step, message } => Report::Warning { step, message },
            Event::Node(report) => {
                let (written, reported) = oneshot::channel();
                // Whoever has ended early has failed, which ends the attempt.
                let _ = self.nodes.as_ref().map(|nodes| nodes.send(FinishedNode { report, reported }));
                Report::Barrier(written)
            }
            Event::Done { .. } | Event::Stopped { .. } | Event::Failed { .. } => {
                self.last_event = Some(event);
                return;
            }
        };
        self.report(report);
    }

    /// The trainer is about to step.
    fn begin(&mut self, step: i64, fingerprint: Fingerprint, choices: Choices) {
        self.has_begun = true;
        // The trainer has read them.
        if let Some(weights) = self.weights.take() {
            tokio::spawn(async move { tokio::fs::remove_dir_all(weights).await });
        }
        self.training.choices.get_or_insert(choices);
        self.report(Report::Ready { fingerprint, choices });
        if let Some(message) = offer::bf16_warning(&self.training.spec, &[self.agent.offer]) {
            self.report(Report::Warning { step, message });
        }
    }

    fn report(&self, report: Report) {
        if let Some(reports) = &self.reports {
            // Whoever has ended early has failed, which ends the attempt.
            let _ = reports.send(report);
        }
    }

    async fn ask_to_stop(&mut self, reason: StopReason) {
        tracing::info!(?reason, "stopping the trainer");
        self.stop = Some(reason);
        // A trainer that stands still hears nothing. What it writes now is fenced like everything else.
        self.hold(false, false);
        self.trainer.send(reason.command()).await;
    }

    fn grace_from_now(&self) -> Instant {
        Instant::now() + Duration::from_secs(self.agent.config.stop_grace_s)
    }

    /// Waits until everything is stored, or until a worker that has to go can wait no longer. Returns whether it is.
    async fn carry_away(&mut self, shutdown: &Shutdown) -> Result<bool> {
        (self.reports, self.nodes) = (None, None);
        self.leaves_at = self.leaves_at.map(|at| at.max(Instant::now() + LEAST_STORING));
        loop {
            let leaves_at = self.leaves_at;
            tokio::select! {
                stored = all_stored(&mut self.reporting, &mut self.uploading) => return stored.map(|()| true),
                () = shutdown.wait(), if leaves_at.is_none() => self.leaves_at = Some(self.grace_from_now()),
                () = until_instant(leaves_at) => {
                    tracing::warn!("left before everything was stored");
                    return Ok(false);
                }
            }
        }
    }

    fn end(&self, exit: Exit, everything_stored: bool) -> TrainingEnd {
        match (&self.last_event, self.stop) {
            (Some(Event::Done { .. }), _) if everything_stored => TrainingEnd::Succeeded,
            (Some(Event::Failed { kind, message }), _) => failed(*kind, message),
            (_, Some(reason)) => reason.end(&self.training),
            (_, None) if !everything_stored => TrainingEnd::Released,
            (_, None) => self.crash(exit),
        }
    }

    fn crash(&self, exit: Exit) -> TrainingEnd {
        const SIGKILL: i32 = 9;
        let out_of_memory = oom_kills() > self.oom_kills_before;
        match exit {
            Exit::Signal(SIGKILL) if out_of_memory => failed(
                FailureKind::OutOfMemory,
                format!("the kernel killed the trainer for want of memory: {}", self.too_large()),
            ),
            Exit::Signal(signal) => {
                failed(FailureKind::Infrastructure, format!("the trainer was ended by signal {signal}"))
            }
            // A trainer that cannot even begin is the fault of this host.
            Exit::Code(code) if !self.has_begun => failed(
                FailureKind::Infrastructure,
                format!("the trainer ended with status {code} before it began: see its log"),
            ),
            Exit::Code(code) => {
                failed(FailureKind::Internal, format!("the trainer ended with status {code} and without a reason"))
            }
        }
    }

    /// What was too large for the memory here.
    fn too_large(&self) -> String {
        let (spec, offer) = (self.training.settled_spec(), &self.agent.offer);
        memory::too_large(&spec, offer.device_for(&spec), offer.memory_for(&spec))
    }

    /// Stores what the trainer logged and enters its end in a failure.
    async fn with_log(self, mut end: TrainingEnd) -> TrainingEnd {
        if let TrainingEnd::Failed(failure) = &mut end {
            failure.log_tail = self.trainer.log.tail();
        }
        self.log_shipper.finish().await;
        end
    }
}

/// Why a trainer is no longer followed that has not ended.
enum Broken {
    Stalled,
    /// The worker has to go.
    Overdue,
    /// The disk here, which may be full now and not later.
    Storage(anyhow::Error),
    Contract(anyhow::Error),
}

impl Broken {
    /// Uploads give up where the database refuses what they enter, or where the disk fails.
    fn of_uploads(error: anyhow::Error) -> Self {
        match error.is::<WriteError>() {
            true => Self::Contract(error),
            false => Self::Storage(error),
        }
    }
}

impl From<anyhow::Error> for Broken {
    fn from(error: anyhow::Error) -> Self {
        Self::Contract(error)
    }
}

/// Waits for both, and may be dropped and called again.
async fn all_stored(reporting: &mut Task, uploading: &mut Task) -> Result<()> {
    join(reporting).await.context("write reports")??;
    join(uploading).await.context("store nodes")?
}

type Task = Option<AbortOnDropHandle<Result<()>>>;

/// What came of a task; nothing more once it has been told. May be dropped and called again.
async fn join(task: &mut Task) -> Result<Result<()>, JoinError> {
    let Some(running) = task else { return Ok(Ok(())) };
    let ended = running.await;
    *task = None;
    ended
}

/// Never without an instant.
async fn until_instant(at: Option<Instant>) {
    match at {
        Some(at) => sleep_until(at).await,
        None => std::future::pending().await,
    }
}

/// Why a task ended that should not have.
fn cause(ended: Result<Result<()>, JoinError>, what: &'static str) -> anyhow::Error {
    match ended {
        Ok(Err(error)) => error.context(what),
        Ok(Ok(())) => anyhow!("{what}: ended early"),
        Err(error) => anyhow!(error).context(what),
    }
}

/// Processes that the kernel has killed for want of memory, on this host or in this container.
fn oom_kills() -> Option<u64> {
    let counter = |path: &str| {
        let text = std::fs::read_to_string(path).ok()?;
        text.lines().find_map(|line| line.strip_prefix("oom_kill ")?.trim().parse().ok())
    };
    counter("/sys/fs/cgroup/memory.events").or_else(|| counter("/proc/vmstat"))
}
