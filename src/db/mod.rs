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

use sqlx::{PgPool, migrate::Migrator, postgres::PgPoolOptions};

pub static MIGRATOR: Migrator = sqlx::migrate!();

/// Connects to the database; fails, and says where, if it does not answer within ten seconds.
pub async fn connect(url: &str, max_connections: u32) -> Result<PgPool, sqlx::Error> {
    PgPoolOptions::new().max_connections(max_connections).acquire_timeout(Duration::from_secs(10)).connect(url).await
}
