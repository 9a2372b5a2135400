//! The HTTP edge: routes, extractors, problem+json, one file per resource. `router` lists what there is.
//!
//! Every handler but those of `health` takes a [`auth::Caller`], and asks the database in its project.

mod auth;
mod bases;
mod body;
mod checkpoints;
mod content;
mod datasets;
mod deletion;
mod document;
mod download;
mod error;
mod events;
mod extract;
mod forks;
mod health;
mod imports;
mod job_commands;
mod jobs;
mod lineage;
mod lineage_tasks;
mod metrics;
mod page;
mod responses;
mod restarts;
mod router;
mod tokenizations;
mod upload;
mod usage;

use std::time::Duration;

use anyhow::Context;
use sqlx::PgPool;
use tokio::net::TcpListener;

pub use router::{openapi, router};

use crate::{
    db::changes::{Changes, JOB_CHANGED},
    shutdown::Shutdown,
    storage::{Key, Store},
};

/// What the server takes.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// Largest content of a dataset, and largest checkpoint from outside.
    pub max_upload_bytes: u64,
}

/// What handlers work with; a clone shares it.
#[derive(Debug, Clone)]
pub struct AppState {
    pool: PgPool,
    store: Store,
    changes: Changes,
    shutdown: Shutdown,
    limits: Limits,
}

impl AppState {
    /// Also begins to listen for changes of jobs, on a connection of its own, until `shutdown`.
    pub fn new(pool: PgPool, store: Store, shutdown: Shutdown, limits: Limits) -> Self {
        let changes = Changes::listen(pool.clone(), JOB_CHANGED, shutdown.clone());
        Self { pool, store, changes, shutdown, limits }
    }

    /// Removes objects that no row names any more. One that stays costs space and nothing else.
    async fn delete_objects(&self, keys: &[String]) {
        let keys: Vec<_> = keys.iter().cloned().map(Key::from).collect();
        if let Err(error) = self.store.delete(&keys).await {
            tracing::warn!(error = %error, num_objects = keys.len(), "objects are left behind in the store");
        }
    }
}

/// Requests that are being answered may take this long once the server stops.
const TIME_TO_FINISH: Duration = Duration::from_secs(10);

/// Serves until `shutdown`, and until every request is answered, within limits; streams end then.
pub async fn serve(listener: TcpListener, state: AppState, shutdown: Shutdown) -> anyhow::Result<()> {
    let (router, _) = router(state);
    let stop = shutdown.clone();
    let serving = axum::serve(listener, router).with_graceful_shutdown(async move { stop.wait().await });
    tokio::select! {
        outcome = serving => outcome.context("serve the API"),
        () = async { shutdown.wait().await; tokio::time::sleep(TIME_TO_FINISH).await } => {
            tracing::warn!("stopped before every request was answered");
            Ok(())
        }
    }
}
