//! The agent on a host: claims work, keeps the leases, runs trainers, streams their files to the store
//! and writes every result. It holds no tensor; a trainer is a child process.

mod checkpoint_tokenizer;
pub mod documents;
mod ingest;
mod lease_keeper;
pub mod local;
mod log_file;
mod rebuild;
mod reporter;
mod retry;
mod staging;
pub mod tokenize;
mod train;
mod trainer;
mod upkeep;
mod uploader;
mod work_dir;

use std::{sync::Arc, time::Duration};

use anyhow::{Context, Result};
use sqlx::{Connection as _, PgPool};

use crate::{
    config::{AgentConfig, WorkerConfig},
    db::{
        self,
        leases::{self, Lease, WorkKind, WriteError},
        recovery,
        training::{self, TrainingEnd},
        workers,
    },
    domain::{
        contract::Probe,
        ids::WorkerId,
        job::{Failure, FailureKind},
        offer::Offer,
    },
    shutdown::Shutdown,
    storage::Store,
};
use work_dir::WorkDir;

/// How often an idle worker looks for work, and everybody for leases that ran out.
const POLL: Duration = Duration::from_millis(300);

/// What all work of this process shares.
struct Agent {
    id: WorkerId,
    config: AgentConfig,
    pool: PgPool,
    store: Store,
    work_dir: WorkDir,
    offer: Offer,
}

/// `relora worker`: connects to the database and the store, and works until told to stop.
pub async fn run_standalone(config: WorkerConfig, shutdown: Shutdown) -> Result<()> {
    let pool = db::connect(config.database.url.expose(), 2).await.context("connect to the database")?;
    let store = Store::connect(&config.store).await?;
    run(config.agent, pool, store, shutdown).await
}

/// Works until told to stop; running work is handed back with its state saved.
pub async fn run(config: AgentConfig, pool: PgPool, store: Store, shutdown: Shutdown) -> Result<()> {
    let id = WorkerId::new();
    let Probe { offer, gpu_problem } = trainer::probe(&config.trainer).await?;
    if let Some(reason) = gpu_problem {
        tracing::warn!(reason, "no GPU can be used here; the CPU is offered alone");
    }
    let work_dir = WorkDir::open(&config.work_dir, &id)?;
    workers::register(&pool, &id, &config.name, &offer).await.context("register the worker")?;
    tracing::info!(worker.id = %id, worker.name = config.name, ?offer, "worker started");

    let agent = Arc::new(Agent { id, config, pool, store, work_dir, offer });
    tokio::join!(
        lane(&agent, Lane::Train, &shutdown),
        lane(&agent, Lane::Ingest, &shutdown),
        lane(&agent, Lane::Upkeep, &shutdown),
        shutdown.run_until(stay_seen(&agent)),
        shutdown.run_until(take_back_expired(&agent.pool, agent.config.lease_s)),
    );
    workers::mark_gone(&agent.pool, &agent.id).await.context("sign the worker off")?;
    tracing::info!(worker.id = %agent.id, "worker stopped");
    Ok(())
}

/// What a worker does beside each other.
#[derive(Debug, Clone, Copy)]
enum Lane {
    Train,
    Ingest,
    /// Tasks on lineages that are there.
    Upkeep,
}

/// Takes one item after another. Each kind of work has its own lane, so that a training of days does
/// not hold up the tokenization that the next job waits for.
async fn lane(agent: &Arc<Agent>, lane: Lane, shutdown: &Shutdown) {
    while !shutdown.is_triggered() {
        let outcome = match lane {
            Lane::Train => train_next(agent, shutdown).await,
            Lane::Ingest => ingest_next(agent, shutdown).await,
            Lane::Upkeep => upkeep_next(agent, shutdown).await,
        };
        match outcome {
            Ok(true) => continue,
            Ok(false) => {}
            Err(error) => tracing::warn!(error = format!("{error:#}"), ?lane, "could not look for work"),
        }
        shutdown.run_until(tokio::time::sleep(POLL)).await;
    }
}

/// Claims a job and trains it. False if there is none.
async fn train_next(agent: &Agent, shutdown: &Shutdown) -> Result<bool> {
    let mut tx = agent.pool.begin().await?;
    let Some(lease) = agent.claim(&mut tx, WorkKind::Train).await? else { return Ok(false) };
    let mut begin = tx.begin().await?;
    match training::begin_attempt(&mut begin, &lease).await {
        Ok(training) => {
            begin.commit().await?;
            tx.commit().await?;
            train::run(agent, &lease, training, shutdown).await;
        }
        // A job that cannot be read must not stand at the head of the queue for ever.
        Err(WriteError::Database(error @ (sqlx::Error::ColumnDecode { .. } | sqlx::Error::RowNotFound))) => {
            begin.rollback().await?;
            tx.commit().await?;
            let message = format!("the stored job cannot be read: {error}");
            let end = TrainingEnd::Failed(Failure::new(FailureKind::Internal, message));
            training::finish(&agent.pool, &lease, &end).await.context("settle a job that cannot be read")?;
        }
        Err(error) => return Err(error).context("begin the attempt"),
    }
    Ok(true)
}

/// Claims a tokenization and makes it. False if there is none.
async fn ingest_next(agent: &Agent, shutdown: &Shutdown) -> Result<bool> {
    let mut tx = agent.pool.begin().await?;
    let Some(lease) = agent.claim(&mut tx, WorkKind::Ingest).await? else { return Ok(false) };
    let ingestion = db::ingestion::begin_attempt(&mut tx, &lease).await.context("begin the attempt")?;
    tx.commit().await?;
    ingest::run(agent, &lease, ingestion, shutdown).await;
    Ok(true)
}

/// Claims a task on a lineage and does it. False if there is none.
async fn upkeep_next(agent: &Agent, shutdown: &Shutdown) -> Result<bool> {
    let mut tx = agent.pool.begin().await?;
    let mut lease = None;
    for kind in [WorkKind::Materialize, WorkKind::Verify] {
        if lease.is_none() {
            lease = agent.claim(&mut tx, kind).await?;
        }
    }
    let Some(lease) = lease else { return Ok(false) };
    let task = db::upkeep::begin_attempt(&mut tx, &lease).await.context("begin the attempt")?;
    tx.commit().await?;
    if let Some(task) = task {
        upkeep::run(agent, &lease, task, shutdown).await;
    }
    Ok(true)
}

impl Agent {
    async fn claim(&self, connection: &mut sqlx::PgConnection, kind: WorkKind) -> Result<Option<Lease>> {
        let Offer { device, num_gpus, .. } = self.offer;
        let claimed = leases::claim(connection, &self.id, kind, device, num_gpus, self.config.lease_s as f64).await;
        claimed.context("claim work")
    }
}

async fn stay_seen(agent: &Agent) {
    loop {
        tokio::time::sleep(Duration::from_secs(10)).await;
        if let Err(error) = workers::mark_seen(&agent.pool, &agent.id).await {
            tracing::warn!(%error, "could not report to the database; running work goes on");
        }
    }
}

/// Takes back the work of workers that have gone silent, again and again.
pub async fn take_back_expired(pool: &PgPool, lease_s: u64) {
    loop {
        tokio::time::sleep(Duration::from_secs_f64((lease_s as f64 / 10.0).max(0.3))).await;
        match recovery::requeue_expired(pool).await {
            Ok(_) => {}
            Err(error) => {
                tracing::warn!(%error, "could not look for leases that ran out");
                // Nobody could renew a lease while the database was away: everybody gets time for it.
                tokio::time::sleep(Duration::from_secs(lease_s)).await;
            }
        }
    }
}
