//! What a project has in the store.

use axum::{Json, extract::State};
use serde::Serialize;
use utoipa::ToSchema;

use super::{AppState, auth::Caller, error::ApiResult, responses::CallerErrors};
use crate::db::usage;

/// Bytes in the store. An object that several nodes name counts once.
#[derive(Debug, Serialize, ToSchema)]
pub struct Usage {
    total_bytes: i64,
    datasets_bytes: i64,
    tokenizations_bytes: i64,
    bases_bytes: i64,
    restarts_bytes: i64,
    /// Also those from outside.
    checkpoints_bytes: i64,
    /// What jobs go on from.
    states_bytes: i64,
    logs_bytes: i64,
}

/// Look at what is stored
///
/// What was deleted does not count, although the store may hold it for some minutes yet.
#[utoipa::path(get, path = "/v1/usage", tag = "usage",
    responses((status = 200, description = "Bytes by what they hold", body = Usage), CallerErrors))]
pub async fn find_usage(caller: Caller, State(state): State<AppState>) -> ApiResult<Json<Usage>> {
    let usage = usage::find(&state.pool, &caller.project).await?;
    let of_nodes = usage.bases_bytes + usage.restarts_bytes + usage.checkpoints_bytes + usage.states_bytes;
    Ok(Json(Usage {
        total_bytes: usage.datasets_bytes + usage.tokenizations_bytes + of_nodes + usage.logs_bytes,
        datasets_bytes: usage.datasets_bytes,
        tokenizations_bytes: usage.tokenizations_bytes,
        bases_bytes: usage.bases_bytes,
        restarts_bytes: usage.restarts_bytes,
        checkpoints_bytes: usage.checkpoints_bytes,
        states_bytes: usage.states_bytes,
        logs_bytes: usage.logs_bytes,
    }))
}
