//! Checkpoints: merged full-rank weights, in the `transformers` layout.

use axum::{
    Json,
    extract::State,
    http::{HeaderMap, Method, StatusCode},
    response::Response,
};

use super::{
    AppState,
    auth::Caller,
    error::{ApiError, ApiResult},
    extract::{Path, Query},
    lineage::{self, DownloadQuery, FileRequest, ListNodesQuery, Node, NodeFilePage, NodePage},
    responses::{CallerErrors, ConflictError, GoneError, NotFoundError, QueryErrors, RangeError},
};
use crate::{
    db::retention::{self, Selection},
    domain::{ids::NodeId, lineage::NodeKind, retention::BlockReason},
};

/// List checkpoints
///
/// Merged full-rank weights, in the `transformers` layout. The newest first.
#[utoipa::path(get, path = "/v1/checkpoints", tag = "checkpoints", params(ListNodesQuery),
    responses((status = 200, description = "A page of checkpoints", body = NodePage), CallerErrors, QueryErrors))]
pub async fn list_checkpoints(
    caller: Caller,
    State(state): State<AppState>,
    Query(query): Query<ListNodesQuery>,
) -> ApiResult<Json<NodePage>> {
    Ok(Json(lineage::list(&state, &caller, NodeKind::Checkpoint, query).await?))
}

/// Look at a checkpoint
#[utoipa::path(get, path = "/v1/checkpoints/{checkpoint_id}", tag = "checkpoints", params(("checkpoint_id" = String, Path)),
    responses((status = 200, description = "The checkpoint", body = Node), CallerErrors, NotFoundError))]
pub async fn find_checkpoint(
    caller: Caller,
    State(state): State<AppState>,
    Path(id): Path<NodeId>,
) -> ApiResult<Json<Node>> {
    Ok(Json(lineage::find(&state, &caller, NodeKind::Checkpoint, &id).await?))
}

/// Delete a checkpoint
///
/// Of a job or from outside. What a job that is not finished begins with, a tokenization still reads, or a user has pinned
/// is not deleted. Deleting it twice is no mistake.
#[utoipa::path(delete, path = "/v1/checkpoints/{checkpoint_id}", tag = "checkpoints", params(("checkpoint_id" = String, Path)),
    responses((status = 204, description = "It is deleted"), CallerErrors, NotFoundError, ConflictError))]
pub async fn delete_checkpoint(
    caller: Caller,
    State(state): State<AppState>,
    Path(id): Path<NodeId>,
) -> ApiResult<StatusCode> {
    let selection = Selection { ids: Some(vec![id.to_string()]), ..Selection::default() };
    let deletion = retention::delete_checkpoints(&state.pool, &caller.project, &selection, false).await?;
    match deletion.blockers.first() {
        None => {
            tracing::info!(checkpoint.id = %id, "checkpoint deleted");
            Ok(StatusCode::NO_CONTENT)
        }
        Some(blocker) if blocker.reason == BlockReason::NotFound => Err(ApiError::NotFound("checkpoint")),
        Some(_) => Err(ApiError::Needed(deletion.blockers)),
    }
}

/// Pin a checkpoint
///
/// It is kept, whatever the policy of its job says, and nobody deletes it, until it is unpinned.
#[utoipa::path(put, path = "/v1/checkpoints/{checkpoint_id}/pin", tag = "checkpoints", params(("checkpoint_id" = String, Path)),
    responses((status = 200, description = "The checkpoint, pinned", body = Node), CallerErrors, NotFoundError, GoneError))]
pub async fn pin_checkpoint(
    caller: Caller,
    State(state): State<AppState>,
    Path(id): Path<NodeId>,
) -> ApiResult<Json<Node>> {
    set_pinned(&state, &caller, &id, true).await
}

/// Unpin a checkpoint
#[utoipa::path(delete, path = "/v1/checkpoints/{checkpoint_id}/pin", tag = "checkpoints", params(("checkpoint_id" = String, Path)),
    responses((status = 200, description = "The checkpoint, not pinned", body = Node), CallerErrors, NotFoundError, GoneError))]
pub async fn unpin_checkpoint(
    caller: Caller,
    State(state): State<AppState>,
    Path(id): Path<NodeId>,
) -> ApiResult<Json<Node>> {
    set_pinned(&state, &caller, &id, false).await
}

async fn set_pinned(state: &AppState, caller: &Caller, id: &NodeId, pinned: bool) -> ApiResult<Json<Node>> {
    let is_there = retention::set_pinned(&state.pool, &caller.project, id, pinned).await?;
    let node = lineage::find(state, caller, NodeKind::Checkpoint, id).await?;
    if is_there { Ok(Json(node)) } else { Err(ApiError::Deleted("checkpoint")) }
}

/// List a checkpoint's files
#[utoipa::path(get, path = "/v1/checkpoints/{checkpoint_id}/files", tag = "checkpoints", params(("checkpoint_id" = String, Path)),
    responses((status = 200, description = "Its files", body = NodeFilePage), CallerErrors, NotFoundError))]
pub async fn list_checkpoint_files(
    caller: Caller,
    State(state): State<AppState>,
    Path(id): Path<NodeId>,
) -> ApiResult<Json<NodeFilePage>> {
    Ok(Json(lineage::list_files(&state, &caller, NodeKind::Checkpoint, &id).await?))
}

/// Download a file of a checkpoint
#[utoipa::path(get, path = "/v1/checkpoints/{checkpoint_id}/files/{file_name}", tag = "checkpoints",
    params(("checkpoint_id" = String, Path), ("file_name" = String, Path), DownloadQuery),
    responses((status = 200, description = "The file", content_type = "application/octet-stream", body = Vec<u8>),
        (status = 206, description = "The range that was asked for", content_type = "application/octet-stream", body = Vec<u8>),
        (status = 304, description = "The client has it already"),
        (status = 307, description = "The file is at this URL for a while"),
        CallerErrors, NotFoundError, GoneError, QueryErrors, RangeError))]
pub async fn download_checkpoint_file(
    caller: Caller,
    State(state): State<AppState>,
    Path((node, name)): Path<(NodeId, String)>,
    Query(query): Query<DownloadQuery>,
    method: Method,
    headers: HeaderMap,
) -> ApiResult<Response> {
    let request = FileRequest { kind: NodeKind::Checkpoint, node, name, proxy: query.proxy, method, headers };
    lineage::download(&state, &caller, request).await
}
