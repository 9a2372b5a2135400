//! One attempt on a training job, from the staged files to the settled job.

use std::{
    path::PathBuf,
    pin::{Pin, pin},
    time::Duration,
};

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
    lease_keeper::{LeaseKeeper, Orders, until},
    log_file::LogShipper,
    reporter::{Report, Reporter},
    retry::until_written,
    staging::{self, Staged},
    trainer::{Exit, Trainer, TrainerArgs},
    uploader::{FinishedNode, Uploader},
};
use crate::{
    db::{
        leases::{Desired, Lease, WriteError},
        training::{self, Training, TrainingEnd},
    },
    domain::{
        contract::{Command, Event, Fingerprint},
        job::{Failure, FailureKind},
        memory, offer,
        spec::Choices,
    },
    shutdown::Shutdown,
};

/// What files are given to be stored when a stop has used up its time on the trainer.
const LEAST_STORING: Duration = Duration::from_secs(5);

/// Runs the attempt, on this GPU if on one, and settles the job. A lost lease ends everything at once and writes nothing.
pub async fn run(agent: &Agent, lease: &Lease, training: Training, gpu: Option<&str>, shutdown: &Shutdown) {
    let span = tracing::info_span!("attempt", job.id = %training.job, lease.epoch = lease.lease_epoch);
    run_within(agent, lease, training, gpu, shutdown).instrument(span).await;
}

async fn run_within(agent: &Agent, lease: &Lease, training: Training, gpu: Option<&str>, shutdown: &Shutdown) {
    tracing::info!(start_step = training.resume.as_ref().map_or(0, |resume| resume.step), "job claimed");
    let keeper = LeaseKeeper::start(agent.pool.clone(), lease.clone(), &agent.config);
    let settle = async |end: TrainingEnd| {
        until_written("settle the job", || training::finish(&agent.pool, lease, &end)).await.map(|()| end)
    };
    let work = async {
        let end = attempt(agent, lease, training, gpu, &keeper, shutdown).await;
        settle(end).await
    };
    let outcome = tokio::select! {
        outcome = work => outcome,
        // What was the attempt's is dropped with it: the trainer is killed, its uploads are given up.
        () = until(keeper.orders(), |orders| orders == Orders::Held(Desired::Kill)) => {
            settle(TrainingEnd::Cancelled).await
        }
        () = keeper.lost() => {
            tracing::warn!("lease lost; trainer killed");
            return;
        }
    };
    match outcome {
        Ok(TrainingEnd::Failed(failure)) => tracing::warn!(
            kind = ?failure.kind, failure.message, "attempt failed"
        ),
        Ok(end) => tracing::info!(?end, "attempt ended"),
        Err(error) => {
            tracing::error!(%error, "could not settle the job")
        }
    }
}

async fn attempt(
    agent: &Agent,
    lease: &Lease,
    training: Training,
    gpu: Option<&str>,
    keeper: &LeaseKeeper,
    shutdown: &Shutdown,
) -> TrainingEnd {
    let folder = match agent.work_dir.attempt(&format!("{}-{}", training.job, lease.lease_epoch)) {
        Ok(folder) => folder,
        Err(error) => return failed(FailureKind::Infrastructure, format!("{error:#}")),
    };
    let staged = tokio::select! {
        staged = staging::stage(&agent.pool, &agent.store, &training, folder.path()) => staged,
        reason = stop_wish(keeper.orders(), shutdown.clone(), left_s(&training)) => return reason.end(&training),
    };
    let staged = match staged {
        Ok(staged) => staged,
        Err(error) => return failed(FailureKind::Storage, format!("could not stage the job's files: {error:#}")),
    };
    let args = TrainerArgs {
        program: &agent.config.trainer,
        spec: staged.spec.clone(),
        data: staged.data.clone(),
        out: staged.out.clone(),
        resume: staged.resume.clone(),
        weights: staged.weights.clone(),
        threads: agent.config.trainer_threads,
        gpu: gpu.map(str::to_owned),
        profile: None,
    };
    let trainer = match Trainer::spawn(&args, &folder.path().join("trainer.log")).await {
        Ok(trainer) => trainer,
        Err(error) => return failed(FailureKind::Infrastructure, format!("{error:#}")),
    };
    tracing::info!(trainer.pid = trainer.pid(), "trainer started");
    Run::new(agent, lease, training, staged, trainer).supervise(keeper, shutdown).await
}

fn failed(kind: FailureKind, message: impl Into<String>) -> TrainingEnd {
    TrainingEnd::Failed(Failure::new(kind, message))
}

/// Why the attempt was asked to stop.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum StopReason {
    Cancelled,
    Paused,
    Released,
    TimedOut,
}

impl StopReason {
    fn end(self, training: &Training) -> TrainingEnd {
        match self {
            Self::Cancelled => TrainingEnd::Cancelled,
            Self::Paused => TrainingEnd::Paused,
            Self::Released => TrainingEnd::Released,
            Self::TimedOut => {
                let limit_s = training.spec.max_runtime_s.unwrap_or(0);
                let message = format!("the job ran for its max_runtime_s of {limit_s} s; its state is kept");
                failed(FailureKind::Timeout, message)
            }
        }
    }

    /// What the trainer is asked for. A run that nobody is going to continue leaves its weights.
    fn command(self) -> Command {
        match self {
            Self::Cancelled | Self::TimedOut => Command::Finish,
            Self::Paused | Self::Released => Command::Stop,
        }
    }
}

/// What is left of the job's time, if that is limited.
fn left_s(training: &Training) -> Option<f64> {
    training.spec.max_runtime_s.map(|max_s| (max_s as f64 - training.runtime_s).max(0.0))
}

/// A wish to stop, and until when the trainer and its files may take for that.
#[derive(Debug, Clone, Copy)]
struct Stop {
    reason: StopReason,
    deadline: Instant,
}

/// Returns when the attempt is to stop, for whatever reason comes first.
async fn stop_wish(orders: watch::Receiver<Orders>, shutdown: Shutdown, left_s: Option<f64>) -> StopReason {
    let ordered = |desired| until(orders.clone(), move |orders| orders == Orders::Held(desired));
    let timed_out = async {
        match left_s {
            Some(left_s) => tokio::time::sleep(Duration::from_secs_f64(left_s)).await,
            None => std::future::pending().await,
        }
    };
    tokio::select! {
        () = ordered(Desired::Cancel) => StopReason::Cancelled,
        () = ordered(Desired::Pause) => StopReason::Paused,
        () = ordered(Desired::Drain) => StopReason::Released,
        () = shutdown.wait() => StopReason::Released,
        () = timed_out => StopReason::TimedOut,
    }
}

/// Returns at the deadline of a stop; never without one.
async fn overdue(stop: Option<Stop>) {
    match stop {
        Some(stop) => sleep_until(stop.deadline).await,
        None => std::future::pending().await,
    }
}

impl Hold {
    fn is_held(&self) -> bool {
        self.is_unsure || self.is_disk_full
    }
}

/// A running trainer and the tasks that carry its results away.
struct Run<'a> {
    agent: &'a Agent,
    training: Training,
    trainer: Trainer,
    /// The checkpoint that the run begins with, until it is read.
    weights: Option<PathBuf>,
    reports: Option<mpsc::UnboundedSender<Report>>,
    nodes: Option<mpsc::UnboundedSender<FinishedNode>>,
    reporting: AbortOnDropHandle<Result<()>>,
    uploading: AbortOnDropHandle<Result<()>>,
    /// True while more waits to be stored than the disk may hold.
    disk_full: watch::Receiver<bool>,
    log_shipper: LogShipper,
    stop: Option<Stop>,
    hold: Hold,
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

impl<'a> Run<'a> {
    fn new(agent: &'a Agent, lease: &Lease, training: Training, staged: Staged, trainer: Trainer) -> Self {
        let (reports, reported) = mpsc::unbounded_channel();
        let (nodes, finished_nodes) = mpsc::unbounded_channel();
        let reporter = Reporter { pool: agent.pool.clone(), lease: lease.clone(), job: training.job.clone() };
        let uploader = Uploader {
            pool: agent.pool.clone(),
            store: agent.store.clone(),
            lease: lease.clone(),
            project: training.project.clone(),
            job: training.job.clone(),
            out: staged.out,
            stored: staged.stored,
            lag_limit: Duration::from_secs(agent.config.checkpoint_lag_s),
            max_local_bytes: agent.config.max_local_bytes,
        };
        let (full, disk_full) = watch::channel(false);
        let reporting = tokio::spawn(async { Ok(reporter.run(reported).await?) }.in_current_span());
        let log_shipper = LogShipper::start(agent, lease, &training.job, &trainer.log);
        Self {
            reports: Some(reports),
            nodes: Some(nodes),
            reporting: AbortOnDropHandle::new(reporting),
            uploading: AbortOnDropHandle::new(tokio::spawn(uploader.run(finished_nodes, full).in_current_span())),
            disk_full,
            log_shipper,
            weights: staged.weights,
            stop: None,
            hold: Hold { is_unsure: false, is_disk_full: false, last_heard: Instant::now() },
            last_event: None,
            oom_kills_before: oom_kills(),
            agent,
            training,
            trainer,
        }
    }

    /// Follows the trainer to its end, then waits until everything that it made is stored.
    async fn supervise(mut self, keeper: &LeaseKeeper, shutdown: &Shutdown) -> TrainingEnd {
        let mut wish = pin!(stop_wish(keeper.orders(), shutdown.clone(), left_s(&self.training)));
        let mut orders = keeper.orders();
        let broken = loop {
            let stalled_at = self.stalled_at();
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
                () = overdue(self.stop) => {
                    tracing::warn!("trainer did not stop in time; killed");
                    break None;
                }
                // While the trainer lives these end only because the database refused something.
                ended = &mut self.reporting => break Some(cause(ended, "write reports").into()),
                ended = &mut self.uploading => break Some(Broken::of_uploads(cause(ended, "store nodes"))),
            }
        };
        let exit = match broken {
            Some(Broken::Stalled) => self.trainer.kill().await,
            _ => self.trainer.end().await,
        };
        let end = match broken {
            Some(Broken::Stalled) => self.stalled(),
            Some(Broken::Storage(error)) => failed(FailureKind::Storage, format!("{error:#}")),
            Some(Broken::Contract(error)) => failed(FailureKind::Internal, format!("{error:#}")),
            None => match self.carry_away(wish).await {
                Ok(everything_stored) => self.end(exit, everything_stored),
                Err(error) => failed(FailureKind::Storage, format!("could not store the results: {error:#}")),
            },
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
        self.stop = Some(self.begin_stop(reason));
        // A trainer that stands still hears nothing. What it writes now is fenced like everything else.
        self.hold(false, false);
        self.trainer.send(reason.command()).await;
    }

    fn begin_stop(&self, reason: StopReason) -> Stop {
        Stop { reason, deadline: Instant::now() + Duration::from_secs(self.agent.config.stop_grace_s) }
    }

    /// Waits until everything is stored, or until a stop can wait no longer. Returns whether it is.
    async fn carry_away(&mut self, mut wish: Pin<&mut impl Future<Output = StopReason>>) -> Result<bool> {
        (self.reports, self.nodes) = (None, None);
        if let Some(stop) = &mut self.stop {
            stop.deadline = stop.deadline.max(Instant::now() + LEAST_STORING);
        }
        loop {
            tokio::select! {
                stored = all_stored(&mut self.reporting, &mut self.uploading) => return stored.map(|()| true),
                reason = &mut wish, if self.stop.is_none() => self.stop = Some(self.begin_stop(reason)),
                () = overdue(self.stop) => {
                    tracing::warn!("stopped before everything was stored");
                    return Ok(false);
                }
            }
        }
    }

    fn end(&self, exit: Exit, everything_stored: bool) -> TrainingEnd {
        match (&self.last_event, self.stop.map(|stop| stop.reason)) {
            (Some(Event::Done { .. }), _) if everything_stored => TrainingEnd::Succeeded,
            (Some(Event::Failed { kind, message }), _) => failed(*kind, message),
            (_, Some(reason)) => reason.end(&self.training),
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
    /// The disk here, which may be full now and not later.
    Storage(anyhow::Error),
    Contract(anyhow::Error),
}

impl Broken {
    /// Uploads give up where the database refuses what they enter, or where the disk fails.
    fn of_uploads(error: anyhow::Error) -> Self {
        match error.chain().any(|cause| cause.is::<WriteError>()) {
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

/// Waits for both, and may be dropped and called again as long as neither has ended.
async fn all_stored(
    reporting: &mut AbortOnDropHandle<Result<()>>,
    uploading: &mut AbortOnDropHandle<Result<()>>,
) -> Result<()> {
    if !reporting.is_finished() {
        reporting.await.context("write reports")??;
    }
    uploading.await.context("store nodes")?
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
