//! One attempt on a training job, from the staged files to the settled job.

use std::{path::Path, sync::OnceLock, time::Duration};

use tokio::{
    sync::watch,
    time::{Instant, sleep_until},
};
use tracing::Instrument;

use super::{
    Agent,
    lease_keeper::{LeaseKeeper, Orders, until},
    retry::{SETTLING, long_after, until_written},
    staging::{self, UnusableState},
    supervise::Run,
    trainer::{Trainer, TrainerArgs, until_gone},
};
use crate::{
    db::{
        leases::{Desired, Lease},
        nodes,
        training::{self, Training, TrainingEnd},
    },
    domain::{
        contract::Command,
        job::{Failure, FailureKind},
    },
    shutdown::Shutdown,
};

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
    // Both outlive the work: the folder goes, and the next job comes, when the trainer is gone.
    let folder = agent.work_dir.attempt(&format!("{}-{}", training.job, lease.lease_epoch));
    let trainer_pid = OnceLock::new();
    let work = async {
        let end = match &folder {
            Ok(folder) => {
                let slot = Slot { folder: folder.path(), gpu, trainer_pid: &trainer_pid };
                attempt(agent, lease, training, &slot, &keeper, shutdown).await
            }
            Err(error) => failed(FailureKind::Infrastructure, format!("{error:#}")),
        };
        settle(end).await
    };
    let outcome = tokio::select! {
        outcome = work => outcome,
        // What was the attempt's is dropped with it: the trainer is killed, its uploads are given up.
        () = until(keeper.orders(), |orders| orders == Orders::Held(Desired::Kill)) => {
            until_gone(trainer_pid.get()).await;
            settle(TrainingEnd::Cancelled).await
        }
        () = keeper.lost() => {
            tracing::warn!("lease lost; trainer killed");
            return until_gone(trainer_pid.get()).await;
        }
        () = long_after(shutdown, Duration::from_secs(2 * agent.config.stop_grace_s) + SETTLING) => {
            return tracing::warn!("left without having settled the job: its lease has to run out");
        }
    };
    match outcome {
        Ok(TrainingEnd::Failed(failure)) => tracing::warn!(
            kind = ?failure.kind, failure.message, "attempt failed"
        ),
        Ok(end) => tracing::info!(?end, "attempt ended"),
        Err(error) => tracing::error!(%error, "could not settle the job"),
    }
}

/// Where an attempt runs.
struct Slot<'a> {
    folder: &'a Path,
    gpu: Option<&'a str>,
    /// Set once the trainer is started.
    trainer_pid: &'a OnceLock<u32>,
}

async fn attempt(
    agent: &Agent,
    lease: &Lease,
    training: Training,
    slot: &Slot<'_>,
    keeper: &LeaseKeeper,
    shutdown: &Shutdown,
) -> TrainingEnd {
    let ends_at = left(&training).map(|left| Instant::now() + left);
    let staged = tokio::select! {
        staged = staging::stage(&agent.pool, &agent.store, &training, slot.folder) => staged,
        reason = stop_wish(keeper.orders(), shutdown.clone(), ends_at) => return reason.end(&training),
    };
    let staged = match staged {
        Ok(staged) => staged,
        Err(error) => {
            give_up_state(agent, lease, &training, &error).await;
            return failed(FailureKind::Storage, format!("could not stage the job's files: {error:#}"));
        }
    };
    let args = TrainerArgs {
        program: &agent.config.trainer,
        spec: staged.spec.clone(),
        data: staged.data.clone(),
        out: staged.out.clone(),
        resume: staged.resume.clone(),
        weights: staged.weights.clone(),
        threads: agent.config.trainer_threads,
        gpu: slot.gpu.map(str::to_owned),
        profile: None,
    };
    let trainer = match Trainer::spawn(&args, &slot.folder.join("trainer.log")).await {
        Ok(trainer) => trainer,
        Err(error) => return failed(FailureKind::Infrastructure, format!("{error:#}")),
    };
    tracing::info!(trainer.pid = trainer.pid(), "trainer started");
    if let Some(pid) = trainer.pid() {
        slot.trainer_pid.get_or_init(|| pid);
    }
    Run::new(agent, lease, training, staged, trainer).supervise(keeper, shutdown, ends_at).await
}

/// A state whose objects are gone or damaged stays so: the next attempt goes on from the one before it.
async fn give_up_state(agent: &Agent, lease: &Lease, training: &Training, error: &anyhow::Error) {
    let Some(resume) = training.resume.as_ref().filter(|_| error.is::<UnusableState>()) else {
        return;
    };
    let give_up = || nodes::give_up_state(&agent.pool, lease, &resume.node);
    if let Err(error) = until_written("give up a state", give_up).await {
        tracing::warn!(%error, node.id = %resume.node, "could not give up a state that cannot be used");
    }
}

pub fn failed(kind: FailureKind, message: impl Into<String>) -> TrainingEnd {
    TrainingEnd::Failed(Failure::new(kind, message))
}

/// Why the attempt was asked to stop.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum StopReason {
    Cancelled,
    Paused,
    Released,
    TimedOut,
}

impl StopReason {
    pub fn end(self, training: &Training) -> TrainingEnd {
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
    pub fn command(self) -> Command {
        match self {
            Self::Cancelled | Self::TimedOut => Command::Finish,
            Self::Paused | Self::Released => Command::Stop,
        }
    }
}

/// What is left of the job's time, if that is limited.
fn left(training: &Training) -> Option<Duration> {
    let max_s = training.spec.max_runtime_s?;
    Some(Duration::from_secs_f64((max_s as f64 - training.runtime_s).max(0.0)))
}

/// Returns when the attempt is to stop, for whatever reason comes first.
pub async fn stop_wish(orders: watch::Receiver<Orders>, shutdown: Shutdown, ends_at: Option<Instant>) -> StopReason {
    let ordered = |desired| until(orders.clone(), move |orders| orders == Orders::Held(desired));
    let timed_out = async {
        match ends_at {
            Some(at) => sleep_until(at).await,
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
