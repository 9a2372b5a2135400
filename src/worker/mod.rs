//! The agent on a host: claims work, keeps the leases, runs trainers, streams their files to the store
//! and writes every result. It holds no tensor; a trainer is a child process.

mod checkpoint_tokenizer;
pub mod collect;
pub mod documents;
mod ingest;
mod lease_keeper;
pub mod local;
mod log_file;
mod rebuild;
mod reporter;
mod retry;
mod staging;
mod supervise;
pub mod tokenize;
mod train;
mod trainer;
mod upkeep;
mod upload_queue;
pub mod uploader;
mod work_dir;

use std::{sync::Arc, time::Duration};

use anyhow::{Context, Result};
use futures_util::future::join_all;
use sqlx::{Connection as _, PgPool};

use crate::{
    config::{AgentConfig, WorkerConfig},
    db::{
        self,
        changes::{Changes, WORK_QUEUED},
        leases::{self, Lease, WorkKind, WriteError},
        recovery,
        training::{self, TrainingEnd},
        workers,
    },
    domain::{
        contract::{Numerics, Probe},
        ids::WorkerId,
        job::{Failure, FailureKind},
        offer::Offer,
    },
    shutdown::Shutdown,
    storage::Store,
};
use work_dir::WorkDir;

/// How often an idle lane looks for work that nobody told it of.
const LOOK_EVERY: Duration = Duration::from_secs(2);

/// What all work of this process shares.
struct Agent {
    id: WorkerId,
    config: AgentConfig,
    pool: PgPool,
    store: Store,
    work_dir: WorkDir,
    offer: Offer,
    news: Changes,
}

/// Two to work with, and one that listens.
const MAX_DATABASE_CONNECTIONS: u32 = 3;

/// `relora worker`: connects to the database and the store, and works until told to stop.
pub async fn run_standalone(config: WorkerConfig, shutdown: Shutdown) -> Result<()> {
    let (url, lease_s) = (config.database.url.expose(), config.agent.lease_s);
    let pool = db::connect(url, MAX_DATABASE_CONNECTIONS, lease_s).await.context("connect to the database")?;
    let store = Store::connect(&config.store).await?;
    run(config.agent, pool, store, shutdown).await
}

/// Works until told to stop; running work is handed back with its state saved.
pub async fn run(config: AgentConfig, pool: PgPool, store: Store, shutdown: Shutdown) -> Result<()> {
    let id = WorkerId::new();
    let Probe { offer, numerics, gpu_problem } = trainer::probe(&config.trainer).await?;
    let numerics = Numerics { num_threads: config.trainer_threads as i64, ..numerics };
    if let Some(reason) = gpu_problem {
        tracing::warn!(reason, "no GPU can be used here; the CPU is offered alone");
    }
    let work_dir = WorkDir::open(&config.work_dir, &id)?;
    workers::register(&pool, &id, &config.name, &offer, &numerics).await.context("register the worker")?;
    tracing::info!(worker.id = %id, worker.name = config.name, ?offer, "worker started");

    let news = Changes::listen(pool.clone(), WORK_QUEUED, shutdown.clone());
    let agent = Arc::new(Agent { id, config, pool, store, work_dir, offer, news });
    tokio::join!(
        join_all(agent.lanes().into_iter().map(|lane| run_lane(&agent, lane, &shutdown))),
        shutdown.run_until(stay_seen(&agent)),
        shutdown.run_until(take_back_expired(&agent.pool, agent.config.lease_s)),
        shutdown.run_until(collect::run(&agent.pool, &agent.store)),
    );
    workers::mark_gone(&agent.pool, &agent.id).await.context("sign the worker off")?;
    tracing::info!(worker.id = %agent.id, "worker stopped");
    Ok(())
}

/// What takes one item after another. Each kind of work has its own, so that a training of days does not hold up the
/// tokenization that the next job waits for; and every GPU has one.
enum Lane {
    Train {
        /// In the driver's terms; none on a machine without.
        gpu: Option<String>,
    },
    Ingest,
    /// Tasks on lineages that are there, of this kind.
    Upkeep(WorkKind),
}

impl Lane {
    fn kind(&self) -> WorkKind {
        match self {
            Self::Train { .. } => WorkKind::Train,
            Self::Ingest => WorkKind::Ingest,
            Self::Upkeep(kind) => *kind,
        }
    }
}

async fn run_lane(agent: &Agent, lane: Lane, shutdown: &Shutdown) {
    let kind = lane.kind();
    while !shutdown.is_triggered() {
        // What is queued after the look is news.
        let mut news = agent.news.subscribe();
        let outcome = match &lane {
            Lane::Train { gpu } => train_next(agent, gpu.as_deref(), shutdown).await,
            Lane::Ingest => ingest_next(agent, shutdown).await,
            Lane::Upkeep(kind) => upkeep_next(agent, *kind, shutdown).await,
        };
        match outcome {
            Ok(true) => continue,
            Ok(false) => {}
            Err(error) => tracing::warn!(error = format!("{error:#}"), ?kind, "could not look for work"),
        }
        let at_most = agent.look_again_after(kind).await;
        shutdown.run_until(news.wait(kind.name(), at_most)).await;
    }
}

/// Claims a job and trains it. False if there is none.
async fn train_next(agent: &Agent, gpu: Option<&str>, shutdown: &Shutdown) -> Result<bool> {
    let mut tx = agent.pool.begin().await?;
    let Some(lease) = agent.claim(&mut tx, WorkKind::Train).await? else { return Ok(false) };
    let mut begin = tx.begin().await?;
    match training::begin_attempt(&mut begin, &lease).await {
        Ok(training) => {
            begin.commit().await?;
            tx.commit().await?;
            train::run(agent, &lease, training, gpu, shutdown).await;
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
async fn upkeep_next(agent: &Agent, kind: WorkKind, shutdown: &Shutdown) -> Result<bool> {
    let mut tx = agent.pool.begin().await?;
    let Some(lease) = agent.claim(&mut tx, kind).await? else { return Ok(false) };
    let task = db::upkeep::begin_attempt(&mut tx, &lease).await.context("begin the attempt")?;
    tx.commit().await?;
    upkeep::run(agent, &lease, task, shutdown).await;
    Ok(true)
}

impl Agent {
    fn lanes(&self) -> Vec<Lane> {
        let mut lanes: Vec<_> = self.slots().into_iter().map(|gpu| Lane::Train { gpu }).collect();
        lanes.extend([Lane::Ingest, Lane::Upkeep(WorkKind::Materialize), Lane::Upkeep(WorkKind::Verify)]);
        lanes
    }

    /// A slot for each GPU, which a trainer has to itself; without GPUs one, with all threads.
    fn slots(&self) -> Vec<Option<String>> {
        let num_gpus = usize::try_from(self.offer.num_gpus).unwrap_or(0);
        if num_gpus == 0 {
            return vec![None];
        }
        let visible = self.config.visible_gpus.as_deref().unwrap_or_default();
        let named: Vec<_> = visible.split(',').map(str::trim).filter(|gpu| !gpu.is_empty()).collect();
        let name = |index: usize| named.get(index).map_or_else(|| index.to_string(), |gpu| (*gpu).to_owned());
        (0..num_gpus).map(|index| Some(name(index))).collect()
    }

    /// One item for one free slot.
    async fn claim(&self, connection: &mut sqlx::PgConnection, kind: WorkKind) -> Result<Option<Lease>> {
        let Offer { device, num_gpus, .. } = self.offer;
        let lease_s = self.config.lease_s as f64;
        leases::claim(connection, &self.id, kind, device, num_gpus.min(1), lease_s).await.context("claim work")
    }

    /// When the next item may be claimed that is known of, and before long in any case. Workers do not look all at once.
    async fn look_again_after(&self, kind: WorkKind) -> Duration {
        let next_s = leases::next_eligible_s(&self.pool, kind).await.ok().flatten().unwrap_or(f64::INFINITY);
        let jitter = f64::from(std::time::UNIX_EPOCH.elapsed().map_or(0, |now| now.subsec_nanos())) / 1e9;
        Duration::from_secs_f64(next_s.max(0.0).min(LOOK_EVERY.as_secs_f64() * (0.75 + 0.5 * jitter)))
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
        match recovery::requeue_expired(pool, lease_s as f64).await {
            Ok(_) => {}
            Err(error) => {
                tracing::warn!(%error, "could not look for leases that ran out");
                // Nobody could renew a lease while the database was away: everybody gets time for it.
                tokio::time::sleep(Duration::from_secs(lease_s)).await;
            }
        }
    }
}
