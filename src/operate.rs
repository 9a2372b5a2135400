//! `relora workers …`: what an operator does with workers, in their database.

use anyhow::{Context, Result, ensure};
use clap::Subcommand;
use sqlx::PgPool;

use crate::db::workers::{self, WorkerRow};

#[derive(Debug, Subcommand)]
pub enum Command {
    /// List the workers that are alive, or hold work.
    List,
    /// Give a worker no more work. What it is at goes on to its end.
    Drain {
        /// Its name, or its identifier.
        worker: String,
        /// Have it save and hand back the jobs that it trains, too.
        #[arg(long)]
        hand_back: bool,
    },
    /// Give a worker work again.
    Undrain {
        /// Its name, or its identifier.
        worker: String,
    },
}

pub async fn run(pool: &PgPool, command: Command) -> Result<()> {
    match command {
        Command::List => list(pool).await,
        Command::Drain { worker, hand_back } => set_draining(pool, &worker, true, hand_back).await,
        Command::Undrain { worker } => set_draining(pool, &worker, false, false).await,
    }
}

async fn list(pool: &PgPool) -> Result<()> {
    for worker in workers::list(pool).await.context("list the workers")? {
        let state = state(&worker);
        let WorkerRow { id, name, version, device, num_gpus, num_leases, started_at, .. } = worker;
        let started = started_at.format("%Y-%m-%d %H:%M:%S");
        println!("{id}  {name}  {version}  {device:?} x{num_gpus}  {state}  holds {num_leases}  since {started} UTC");
    }
    Ok(())
}

fn state(worker: &WorkerRow) -> &'static str {
    match (worker.is_alive, worker.is_draining, worker.num_leases) {
        (false, ..) => "silent",
        (true, true, 0) => "drained",
        (true, true, _) => "draining",
        (true, false, _) => "working",
    }
}

async fn set_draining(pool: &PgPool, worker: &str, is_draining: bool, hands_back: bool) -> Result<()> {
    let num_workers = workers::set_draining(pool, worker, is_draining, hands_back).await.context("tell the worker")?;
    ensure!(num_workers > 0, "no living worker has the name or the identifier {worker}: see `relora workers list`");
    println!("{num_workers} worker(s) told");
    Ok(())
}
