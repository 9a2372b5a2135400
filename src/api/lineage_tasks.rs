//! Tasks on a lineage: restarts that are checked, and full weights that are rebuilt from them.

use axum::{Json, extract::State, http::StatusCode};
use chrono::{DateTime, Utc};
use serde::{Deserialize, Serialize};
use utoipa::{IntoParams, ToSchema};

use super::{
    AppState,
    auth::Caller,
    error::{ApiError, ApiResult},
    extract::{Path, Query},
    page::{Cursor, Limit},
    responses::{CallerErrors, ConflictError, GoneError, NotFoundError, QueryErrors},
};
use crate::{
    db::lineage_tasks::{self, Creation, LineageTaskFilter, LineageTaskKind, LineageTaskRow, LineageTaskState},
    domain::{
        ids::{JobId, LineageTaskId, NodeId},
        job::Failure,
        verification::Verification,
    },
};

/// Work on a lineage that was asked for.
#[derive(Debug, Serialize, ToSchema)]
pub struct LineageTask {
    id: LineageTaskId,
    kind: LineageTaskKind,
    restart: NodeId,
    /// The job of the restart.
    job: JobId,
    state: LineageTaskState,
    /// What a materialization gave: the checkpoint with the full weights after the restart. Null before. It may have
    /// been deleted since.
    checkpoint: Option<NodeId>,
    /// What a verification found; null before.
    verification: Option<Verification>,
    failure: Option<Failure>,
    created_at: DateTime<Utc>,
    finished_at: Option<DateTime<Utc>>,
}

#[derive(Debug, Serialize, ToSchema)]
pub struct LineageTaskPage {
    data: Vec<LineageTask>,
    /// To be given as `cursor` for the next page; null on the last one.
    next_cursor: Option<String>,
}

#[derive(Debug, Default, Deserialize, IntoParams)]
#[serde(default, deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub struct ListLineageTasksQuery {
    /// Only those on this restart.
    #[param(value_type = String, required = false)]
    restart: Option<NodeId>,
    /// Only those on restarts of this job.
    #[param(value_type = String, required = false)]
    job: Option<JobId>,
    /// How many to a page; 50 by default.
    #[param(value_type = i64, required = false, minimum = 1, maximum = 500)]
    limit: Limit,
    /// The `next_cursor` of the page before.
    #[param(value_type = String, required = false)]
    cursor: Option<Cursor>,
}

/// Rebuild the full weights after a restart
///
/// A worker adds the deltas up to the restart to their base, and stores what that gives as a checkpoint. Where there is
/// a checkpoint with these weights, or a task that makes it, that is the answer.
#[utoipa::path(post, path = "/v1/restarts/{restart_id}/materialize", tag = "restarts", params(("restart_id" = String, Path)),
    responses((status = 202, description = "The task", body = LineageTask),
        CallerErrors, NotFoundError, ConflictError, GoneError))]
pub async fn materialize_restart(
    caller: Caller,
    State(state): State<AppState>,
    Path(restart): Path<NodeId>,
) -> ApiResult<(StatusCode, Json<LineageTask>)> {
    create(&state, &caller, &restart, LineageTaskKind::Materialize).await
}

/// Check a restart
///
/// A worker reads every file of the lineage up to the restart again, adds the deltas to their base, and compares the
/// weights with the checkpoint at the restart's step if there is one.
#[utoipa::path(post, path = "/v1/restarts/{restart_id}/verify", tag = "restarts", params(("restart_id" = String, Path)),
    responses((status = 202, description = "The task", body = LineageTask),
        CallerErrors, NotFoundError, ConflictError, GoneError))]
pub async fn verify_restart(
    caller: Caller,
    State(state): State<AppState>,
    Path(restart): Path<NodeId>,
) -> ApiResult<(StatusCode, Json<LineageTask>)> {
    create(&state, &caller, &restart, LineageTaskKind::Verify).await
}

async fn create(
    state: &AppState,
    caller: &Caller,
    restart: &NodeId,
    kind: LineageTaskKind,
) -> ApiResult<(StatusCode, Json<LineageTask>)> {
    let id = match lineage_tasks::create(&state.pool, &caller.project, restart, kind).await? {
        Creation::Done(id) => id,
        Creation::NoSuchRestart => return Err(ApiError::NotFound("restart")),
        Creation::Deleted => return Err(ApiError::Deleted("restart")),
        Creation::Superseded => return Err(ApiError::Superseded),
    };
    tracing::info!(task.id = %id, restart.id = %restart, ?kind, "lineage task asked for");
    Ok((StatusCode::ACCEPTED, Json(find(state, caller, &id).await?)))
}

/// List lineage tasks
///
/// The newest first.
#[utoipa::path(get, path = "/v1/lineage-tasks", tag = "lineage tasks", params(ListLineageTasksQuery),
    responses((status = 200, description = "A page of tasks", body = LineageTaskPage), CallerErrors, QueryErrors))]
pub async fn list_lineage_tasks(
    caller: Caller,
    State(state): State<AppState>,
    Query(query): Query<ListLineageTasksQuery>,
) -> ApiResult<Json<LineageTaskPage>> {
    let filter = LineageTaskFilter {
        id: None,
        restart: query.restart.map(|restart| restart.to_string()),
        job: query.job.map(|job| job.to_string()),
        cursor: query.cursor.map(Cursor::into_inner),
    };
    let rows = lineage_tasks::list(&state.pool, &caller.project, &filter, query.limit.with_next()).await?;
    let (rows, next_cursor) = query.limit.cut(rows, |row| row.id.as_str());
    Ok(Json(LineageTaskPage { data: rows.into_iter().map(response).collect(), next_cursor }))
}

/// Look at a lineage task
#[utoipa::path(get, path = "/v1/lineage-tasks/{task_id}", tag = "lineage tasks", params(("task_id" = String, Path)),
    responses((status = 200, description = "The task", body = LineageTask), CallerErrors, NotFoundError))]
pub async fn find_lineage_task(
    caller: Caller,
    State(state): State<AppState>,
    Path(id): Path<LineageTaskId>,
) -> ApiResult<Json<LineageTask>> {
    Ok(Json(find(&state, &caller, &id).await?))
}

async fn find(state: &AppState, caller: &Caller, id: &LineageTaskId) -> ApiResult<LineageTask> {
    let row = lineage_tasks::find(&state.pool, &caller.project, id).await?;
    row.map(response).ok_or(ApiError::NotFound("lineage task"))
}

fn response(row: LineageTaskRow) -> LineageTask {
    LineageTask {
        id: row.id,
        kind: row.kind,
        restart: row.restart,
        job: row.job,
        state: row.state,
        checkpoint: row.checkpoint,
        verification: row.verification.map(|verification| verification.0),
        failure: row.failure.map(|failure| failure.0),
        created_at: row.created_at,
        finished_at: row.finished_at,
    }
}
