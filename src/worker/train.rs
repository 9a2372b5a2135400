//! One attempt on a training job, from the staged files to the settled job.

use std::time::Duration;

use anyhow::{Context, Result};
use tokio::{
    sync::mpsc,
    time::{Instant, sleep_until},
};
use tokio_util::task::AbortOnDropHandle;

use super::{
    Agent,
    lease_keeper::{LeaseKeeper, Orders},
    log_file::LogShipper,
    reporter::{Report, Reporter},
    retry::until_written,
    staging::{self, Staged},
    trainer::{Exit, Trainer, TrainerArgs},
    uploader::Uploader,
};
use crate::{
    db::{
        leases::{Desired, Lease},
        training::{self, Training, TrainingEnd},
    },
    domain::{
        contract::{Command, Event, NodeReport},
        job::{Failure, FailureKind},
    },
    shutdown::Shutdown,
};

/// Runs the attempt and settles the job. A lost lease ends everything at once and writes nothing.
pub async fn run(agent: &Agent, lease: &Lease, training: Training, shutdown: &Shutdown) {
    let (job, start_step) = (training.job.clone(), training.resume.as_ref().map_or(0, |resume| resume.step));
    tracing::info!(job.id = %job, lease.epoch = lease.lease_epoch, start_step, "job claimed");
    let keeper = LeaseKeeper::start(agent.pool.clone(), lease.clone(), agent.config.lease_s);
    let work = async {
        let end = attempt(agent, lease, training, &keeper, shutdown).await;
        until_written("settle the job", || training::finish(&agent.pool, lease, &end)).await.map(|()| end)
    };
    let outcome = tokio::select! {
        outcome = work => outcome,
        () = keeper.lost() => {
            tracing::warn!(job.id = %job, lease.epoch = lease.lease_epoch, "lease lost; trainer killed");
            return;
        }
    };
    match outcome {
        Ok(TrainingEnd::Failed(failure)) => tracing::warn!(
            job.id = %job, lease.epoch = lease.lease_epoch, kind = ?failure.kind, failure.message, "attempt failed"
        ),
        Ok(end) => tracing::info!(job.id = %job, lease.epoch = lease.lease_epoch, ?end, "attempt ended"),
        Err(error) => {
            tracing::error!(job.id = %job, lease.epoch = lease.lease_epoch, %error, "could not settle the job")
        }
    }
}

async fn attempt(
    agent: &Agent,
    lease: &Lease,
    training: Training,
    keeper: &LeaseKeeper,
    shutdown: &Shutdown,
) -> TrainingEnd {
    let folder = match agent.work_dir.attempt(&format!("{}-{}", training.job, lease.lease_epoch)) {
        Ok(folder) => folder,
        Err(error) => return failed(FailureKind::Infrastructure, format!("{error:#}")),
    };
    let stage = staging::stage(&agent.pool, &agent.store, &training, folder.path());
    let staged = match shutdown.run_until(stage).await {
        Some(Ok(staged)) => staged,
        Some(Err(error)) => return failed(FailureKind::Storage, format!("could not stage the job's files: {error:#}")),
        None => return TrainingEnd::Released,
    };
    let args = TrainerArgs {
        program: &agent.config.trainer,
        spec: staged.spec.clone(),
        data: staged.data.clone(),
        out: staged.out.clone(),
        resume: staged.resume.clone(),
        threads: agent.config.trainer_threads,
    };
    let trainer = match Trainer::spawn(&args, &folder.path().join("trainer.log")).await {
        Ok(trainer) => trainer,
        Err(error) => return failed(FailureKind::Infrastructure, format!("{error:#}")),
    };
    tracing::info!(job.id = %training.job, lease.epoch = lease.lease_epoch, trainer.pid = trainer.pid(), "trainer started");
    Run::new(agent, lease, training, staged, trainer).supervise(keeper, shutdown).await
}

fn failed(kind: FailureKind, message: impl Into<String>) -> TrainingEnd {
    TrainingEnd::Failed(Failure::new(kind, message))
}

/// Why the trainer was asked to stop.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum StopReason {
    Cancelled,
    Released,
    TimedOut,
}

/// A running trainer and the tasks that carry its results away.
struct Run<'a> {
    agent: &'a Agent,
    lease: &'a Lease,
    training: Training,
    trainer: Trainer,
    reports: Option<mpsc::UnboundedSender<Report>>,
    nodes: Option<mpsc::UnboundedSender<NodeReport>>,
    reporting: AbortOnDropHandle<Result<()>>,
    uploading: AbortOnDropHandle<Result<()>>,
    log_shipper: LogShipper,
    stop_reason: Option<StopReason>,
    last_event: Option<Event>,
    oom_kills_before: Option<u64>,
}

impl<'a> Run<'a> {
    fn new(agent: &'a Agent, lease: &'a Lease, training: Training, staged: Staged, trainer: Trainer) -> Self {
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
        };
        let reporting = tokio::spawn(async { Ok(reporter.run(reported).await?) });
        let log_shipper = LogShipper::start(agent, lease, &training.job, &trainer.log);
        Self {
            reports: Some(reports),
            nodes: Some(nodes),
            reporting: AbortOnDropHandle::new(reporting),
            uploading: AbortOnDropHandle::new(tokio::spawn(uploader.run(finished_nodes))),
            stop_reason: None,
            last_event: None,
            oom_kills_before: oom_kills(),
            log_shipper,
            agent,
            lease,
            training,
            trainer,
        }
    }

    /// Follows the trainer to its end, then waits until everything that it made is stored.
    async fn supervise(mut self, keeper: &LeaseKeeper, shutdown: &Shutdown) -> TrainingEnd {
        let mut orders = keeper.orders();
        let far = Instant::now() + Duration::from_secs(100 * 365 * 86_400);
        let left_s = self.training.spec.max_runtime_s.map(|max_s| (max_s as f64 - self.training.runtime_s).max(0.0));
        let mut times_out = left_s.map_or(far, |left_s| Instant::now() + Duration::from_secs_f64(left_s));
        let mut kill_at = far;
        let grace = Duration::from_secs(self.agent.config.stop_grace_s);
        loop {
            let asked_before = self.stop_reason.is_some();
            tokio::select! {
                event = self.trainer.next_event() => match event {
                    Ok(Some(event)) => self.take(event),
                    Ok(None) => break,
                    Err(error) => {
                        self.trainer.kill().await;
                        return self.with_log(failed(FailureKind::Internal, format!("{error:#}"))).await;
                    }
                },
                Ok(()) = orders.changed() => {
                    if *orders.borrow_and_update() == Orders::Held(Desired::Cancel) {
                        self.stop(StopReason::Cancelled).await;
                    }
                }
                () = shutdown.wait(), if self.stop_reason.is_none() => self.stop(StopReason::Released).await,
                () = sleep_until(times_out) => {
                    times_out = far;
                    self.stop(StopReason::TimedOut).await;
                }
                () = sleep_until(kill_at) => {
                    tracing::warn!(job.id = %self.training.job, "trainer did not stop in time; killed");
                    self.trainer.kill().await;
                    break;
                }
                ended = &mut self.uploading => {
                    // Before the trainer's end it ends only because the database refused a node.
                    self.trainer.kill().await;
                    let error = ended.map_err(Into::into).and_then(|ended| ended).err();
                    let why = error.map_or_else(String::new, |error| format!("{error:#}"));
                    return self.with_log(failed(FailureKind::Internal, format!("could not store a node: {why}"))).await;
                }
            }
            if !asked_before && self.stop_reason.is_some() {
                kill_at = Instant::now() + grace;
            }
        }
        let exit = self.trainer.wait().await;
        let carried_away = self.carry_away(kill_at.max(Instant::now() + Duration::from_secs(5))).await;
        let end = match carried_away {
            Ok(()) => self.end(exit),
            Err(error) => failed(FailureKind::Storage, format!("could not store the results: {error:#}")),
        };
        self.with_log(end).await
    }

    fn take(&mut self, event: Event) {
        let report = match event {
            Event::Ready { fingerprint, .. } => Report::Ready(fingerprint),
            Event::Step(step) => Report::Step(step),
            Event::Eval { step, loss, perplexity, num_tokens } => Report::Eval { step, loss, perplexity, num_tokens },
            Event::Sample { step, prompt, text } => Report::Sample { step, prompt, text },
            Event::Warning { step, message } => Report::Warning { step, message },
            Event::Node(node) => {
                // The uploader ends early only with an error, which `carry_away` returns.
                let _ = self.nodes.as_ref().map(|nodes| nodes.send(node));
                return;
            }
            Event::Done { .. } | Event::Stopped { .. } | Event::Failed { .. } => {
                self.last_event = Some(event);
                return;
            }
        };
        let _ = self.reports.as_ref().map(|reports| reports.send(report));
    }

    async fn stop(&mut self, reason: StopReason) {
        tracing::info!(job.id = %self.training.job, lease.epoch = self.lease.lease_epoch, ?reason, "stopping the trainer");
        self.stop_reason.get_or_insert(reason);
        self.trainer.send(Command::Stop).await;
    }

    /// Waits until everything is stored; until `deadline` if the attempt was asked to stop.
    async fn carry_away(&mut self, deadline: Instant) -> Result<()> {
        (self.reports, self.nodes) = (None, None);
        let (reporting, uploading) = (&mut self.reporting, &mut self.uploading);
        let stored = async {
            reporting.await.context("write reports")??;
            uploading.await.context("upload files")?
        };
        if self.stop_reason.is_none() {
            return stored.await;
        }
        tokio::time::timeout_at(deadline, stored).await.unwrap_or_else(|_| {
            tracing::warn!(job.id = %self.training.job, "stopped before everything was stored");
            Ok(())
        })
    }

    fn end(&self, exit: Exit) -> TrainingEnd {
        match (&self.last_event, self.stop_reason) {
            (Some(Event::Done { .. }), _) => TrainingEnd::Succeeded,
            (Some(Event::Failed { kind, message }), _) => failed(*kind, message),
            (_, Some(StopReason::Cancelled)) => TrainingEnd::Cancelled,
            (_, Some(StopReason::Released)) => TrainingEnd::Released,
            (_, Some(StopReason::TimedOut)) => {
                let limit_s = self.training.spec.max_runtime_s.unwrap_or(0);
                failed(
                    FailureKind::Timeout,
                    format!("the job ran for its max_runtime_s of {limit_s} s; its state is kept"),
                )
            }
            (_, None) => self.crash(exit),
        }
    }

    fn crash(&self, exit: Exit) -> TrainingEnd {
        const SIGKILL: i32 = 9;
        let out_of_memory = oom_kills() > self.oom_kills_before;
        match exit {
            Exit::Signal(SIGKILL) if out_of_memory => failed(
                FailureKind::OutOfMemory,
                "the kernel killed the trainer for want of memory: use a smaller model or micro_batch_seqs",
            ),
            Exit::Signal(signal) => {
                failed(FailureKind::Infrastructure, format!("the trainer was ended by signal {signal}"))
            }
            Exit::Code(code) => {
                failed(FailureKind::Internal, format!("the trainer ended with status {code} and without a reason"))
            }
        }
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

/// Processes that the kernel has killed for want of memory, on this host or in this container.
fn oom_kills() -> Option<u64> {
    let counter = |path: &str| {
        let text = std::fs::read_to_string(path).ok()?;
        text.lines().find_map(|line| line.strip_prefix("oom_kill ")?.trim().parse().ok())
    };
    counter("/sys/fs/cgroup/memory.events").or_else(|| counter("/proc/vmstat"))
}
