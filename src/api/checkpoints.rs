//! Checkpoints: merged full-rank weights, in the `transformers` layout.

use axum::{
    Json,
    extract::State,
    http::{HeaderMap, Method},
    response::Response,
};

use super::{
    AppState,
    auth::Caller,
    error::ApiResult,
    extract::{Path, Query},
    lineage::{self, DownloadQuery, FileRequest, ListNodesQuery, Node, NodeFilePage, NodePage},
    responses::{CallerErrors, NotFoundError, QueryErrors, RangeError},
};
use crate::domain::{ids::NodeId, lineage::NodeKind};

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
        CallerErrors, NotFoundError, QueryErrors, RangeError))]
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
