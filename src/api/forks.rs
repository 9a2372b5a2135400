//! Forks: a new job with the spec of an earlier one, changed, that begins with weights which that one left.

use axum::{Json, extract::State, http::StatusCode};
use serde_json::Value;

use super::{
    AppState,
    auth::Caller,
    error::{ApiError, ApiResult},
    extract::{JsonBody, Path},
    jobs::{self, Job},
    responses::{BodyErrors, CallerErrors, ConflictError, GoneError, NotFoundError},
};
use crate::{
    db::lineage,
    domain::{
        ids::NodeId,
        lineage::NodeKind,
        spec::{TrainSpecRequest, fork_of},
    },
};

/// Fork a checkpoint
///
/// A new job begins with these weights: its spec is that of the job which made the checkpoint, with what the body says
/// put over it (a JSON merge patch, RFC 7396). Unless the body says otherwise, it reads on in the data where the
/// checkpoint was made, and makes no warm start where that lies behind it. The optimizer begins anew; a paused or failed
/// job is gone on with exactly by `resume` and `retry`. The lineage of the weights goes across both jobs.
#[utoipa::path(post, path = "/v1/checkpoints/{checkpoint_id}/fork", tag = "checkpoints",
    params(("checkpoint_id" = String, Path)), request_body = TrainSpecRequest,
    responses((status = 201, description = "The new job, queued", body = Job),
        CallerErrors, BodyErrors, NotFoundError, ConflictError, GoneError))]
pub async fn fork_checkpoint(
    caller: Caller,
    State(state): State<AppState>,
    Path(id): Path<NodeId>,
    body: JsonBody,
) -> ApiResult<(StatusCode, Json<Job>)> {
    let node = lineage::find(&state.pool, &caller.project, NodeKind::Checkpoint, &id).await?;
    let node = node.ok_or(ApiError::NotFound("checkpoint"))?;
    if node.deleted_at.is_some() {
        return Err(ApiError::Deleted("checkpoint"));
    }
    if node.superseded {
        return Err(ApiError::Superseded);
    }
    // An import has no job whose spec could be changed.
    let source = node.job.ok_or(ApiError::NoJobToFork)?;
    let source = jobs::find(&state, &caller, &source).await?;
    let spec: Value = fork_of(&source.spec.0, &id, node.step, body.0);
    let job = jobs::submit(&state, &caller, spec).await?;
    Ok((StatusCode::CREATED, Json(job)))
}
