//! What the owner of a job asks of it.

use axum::{Json, extract::State, http::StatusCode};
use serde::Deserialize;
use utoipa::IntoParams;

use super::{
    AppState,
    auth::Caller,
    error::{ApiError, ApiResult},
    extract::{Path, Query},
    jobs::{self, Job},
    responses::{CallerErrors, ConflictError, NotFoundError, QueryErrors},
};
use crate::{
    db::job_commands::{self, Answer, JobCommand},
    domain::ids::JobId,
};

#[derive(Debug, Default, Deserialize, IntoParams)]
#[serde(default, deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub struct CancelJobQuery {
    /// End it at once, without a last checkpoint.
    #[param(required = false)]
    force: bool,
}

/// Cancel a job
///
/// A queued job is cancelled at once; a running one leaves a checkpoint of what it has trained, as soon as its worker has
/// heard of it. What it has stored stays. Cancelling a job twice is no mistake.
#[utoipa::path(post, path = "/v1/jobs/{job_id}/cancel", tag = "jobs",
    params(("job_id" = String, Path), CancelJobQuery),
    responses((status = 202, description = "The job, cancelled or cancelling", body = Job),
        CallerErrors, NotFoundError, ConflictError, QueryErrors))]
pub async fn cancel_job(
    caller: Caller,
    State(state): State<AppState>,
    Path(id): Path<JobId>,
    Query(query): Query<CancelJobQuery>,
) -> ApiResult<(StatusCode, Json<Job>)> {
    let command = if query.force { JobCommand::Kill } else { JobCommand::Cancel };
    give(&state, &caller, &id, command).await
}

/// Pause a job
///
/// A running job saves a state and frees its worker; a queued one is no longer taken. Nothing is lost by it.
#[utoipa::path(post, path = "/v1/jobs/{job_id}/pause", tag = "jobs", params(("job_id" = String, Path)),
    responses((status = 202, description = "The job, paused or pausing", body = Job),
        CallerErrors, NotFoundError, ConflictError))]
pub async fn pause_job(
    caller: Caller,
    State(state): State<AppState>,
    Path(id): Path<JobId>,
) -> ApiResult<(StatusCode, Json<Job>)> {
    give(&state, &caller, &id, JobCommand::Pause).await
}

/// Resume a paused job
///
/// It is queued again, and goes on to the bit as if it had not been paused.
#[utoipa::path(post, path = "/v1/jobs/{job_id}/resume", tag = "jobs", params(("job_id" = String, Path)),
    responses((status = 202, description = "The job, queued", body = Job),
        CallerErrors, NotFoundError, ConflictError))]
pub async fn resume_job(
    caller: Caller,
    State(state): State<AppState>,
    Path(id): Path<JobId>,
) -> ApiResult<(StatusCode, Json<Job>)> {
    give(&state, &caller, &id, JobCommand::Resume).await
}

/// Retry a job that failed or was cancelled
///
/// It is queued again, and goes on from its last state. Its retries and its maximum runtime begin anew.
#[utoipa::path(post, path = "/v1/jobs/{job_id}/retry", tag = "jobs", params(("job_id" = String, Path)),
    responses((status = 202, description = "The job, queued", body = Job),
        CallerErrors, NotFoundError, ConflictError))]
pub async fn retry_job(
    caller: Caller,
    State(state): State<AppState>,
    Path(id): Path<JobId>,
) -> ApiResult<(StatusCode, Json<Job>)> {
    give(&state, &caller, &id, JobCommand::Retry).await
}

async fn give(
    state: &AppState,
    caller: &Caller,
    id: &JobId,
    command: JobCommand,
) -> ApiResult<(StatusCode, Json<Job>)> {
    match job_commands::give(&state.pool, &caller.project, id, command).await? {
        Answer::Accepted => {
            tracing::info!(job.id = %id, ?command, "command given");
            Ok((StatusCode::ACCEPTED, Json(jobs::find(state, caller, id).await?.into())))
        }
        Answer::NotFound => Err(ApiError::NotFound("job")),
        Answer::TokensFailed => Err(ApiError::TokensFailed),
        Answer::NothingToGoOnFrom => Err(ApiError::NothingToGoOnFrom),
        Answer::Refused(state) if state.is_final() && command != JobCommand::Retry => Err(ApiError::JobFinished(state)),
        Answer::Refused(state) => Err(ApiError::WrongJobState(state)),
    }
}
