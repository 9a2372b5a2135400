//! All SQL. One function per statement or transaction, named as a question or a command.
//!
//! A function that serves a user takes the project as an argument, so that no query can forget it.
//! A function that serves a worker takes its [`leases::Lease`], and writes nothing once that is lost.

pub mod changes;
pub mod datasets;
pub mod events;
pub mod health;
pub mod imports;
pub mod ingestion;
pub mod job_commands;
pub mod jobs;
pub mod keys;
pub mod leases;
pub mod lineage;
pub mod lineage_tasks;
pub mod metrics;
pub mod nodes;
pub mod objects;
pub mod recovery;
pub mod retention;
pub mod tokenizations;
pub mod training;
pub mod upkeep;
pub mod usage;
pub mod workers;

use std::time::Duration;

use sqlx::{
    PgPool,
    migrate::Migrator,
    postgres::{PgConnectOptions, PgPoolOptions},
};

pub static MIGRATOR: Migrator = sqlx::migrate!();

/// Connects to the database; fails, and says where, if it does not answer within ten seconds.
///
/// A transaction in which nothing happens for `max_idle_s` is ended by the database: a process that stands still in the
/// middle of one, with the locks of a lease, would keep everybody from taking over its work.
pub async fn connect(url: &str, max_connections: u32, max_idle_s: u64) -> Result<PgPool, sqlx::Error> {
    let max_idle = format!("{max_idle_s}s");
    let options = url.parse::<PgConnectOptions>()?.options([("idle_in_transaction_session_timeout", max_idle)]);
    let pool = PgPoolOptions::new().max_connections(max_connections).acquire_timeout(Duration::from_secs(10));
    pool.connect_with(options).await
}
