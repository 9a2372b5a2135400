//! Whether the process lives, and whether it can serve.

use std::time::Duration;

use axum::{Json, extract::State, http::StatusCode};
use serde::Serialize;
use tokio::time::timeout;
use utoipa::ToSchema;

use super::AppState;
use crate::{db, storage::Key};

const PATIENCE: Duration = Duration::from_secs(3);

#[derive(Debug, Serialize, ToSchema)]
pub struct Health {
    /// `ok`.
    status: String,
    version: String,
}

#[derive(Debug, Serialize, ToSchema)]
pub struct Readiness {
    ready: bool,
    /// `ok`, or that it does not answer.
    database: String,
    /// `ok`, or that it does not answer.
    store: String,
}

/// Whether the process lives
#[utoipa::path(get, path = "/healthz", tag = "health", security(()),
    responses((status = 200, description = "It does", body = Health)))]
pub async fn get_health() -> Json<Health> {
    Json(Health { status: "ok".into(), version: env!("CARGO_PKG_VERSION").into() })
}

/// Whether the service can serve
#[utoipa::path(get, path = "/readyz", tag = "health", security(()),
    responses((status = 200, description = "It can", body = Readiness),
        (status = 503, description = "The database or the store does not answer", body = Readiness)))]
pub async fn get_readiness(State(state): State<AppState>) -> (StatusCode, Json<Readiness>) {
    let probe = Key::from("readiness-probe".to_owned());
    let (database, store) =
        tokio::join!(timeout(PATIENCE, db::health::ping(&state.pool)), timeout(PATIENCE, state.store.head(&probe)));

    let database = verdict("database", database);
    let store = verdict("store", store);
    let ready = database == "ok" && store == "ok";
    let status = if ready { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
    (status, Json(Readiness { ready, database, store }))
}

fn verdict<T, E: std::fmt::Display>(what: &str, outcome: Result<Result<T, E>, tokio::time::error::Elapsed>) -> String {
    match outcome {
        Ok(Ok(_)) => return "ok".into(),
        Ok(Err(error)) => tracing::warn!(probe = what, error = %error, "not ready"),
        Err(_) => tracing::warn!(probe = what, "not ready: no answer in time"),
    }
    "does not answer".into()
}
