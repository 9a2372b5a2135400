//! Bases: full weights at the moment when the model was wrapped with LoRA factors, in the `transformers` layout.

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
    responses::{CallerErrors, GoneError, NotFoundError, QueryErrors, RangeError},
};
use crate::domain::{ids::NodeId, lineage::NodeKind};

/// List bases
///
/// Full weights at the moment when the model was wrapped with LoRA factors, in the `transformers` layout. The newest first.
#[utoipa::path(get, path = "/v1/bases", tag = "bases", params(ListNodesQuery),
    responses((status = 200, description = "A page of bases", body = NodePage), CallerErrors, QueryErrors))]
pub async fn list_bases(
    caller: Caller,
    State(state): State<AppState>,
    Query(query): Query<ListNodesQuery>,
) -> ApiResult<Json<NodePage>> {
    Ok(Json(lineage::list(&state, &caller, NodeKind::Base, query).await?))
}

/// Look at a base
#[utoipa::path(get, path = "/v1/bases/{base_id}", tag = "bases", params(("base_id" = String, Path)),
    responses((status = 200, description = "The base", body = Node), CallerErrors, NotFoundError))]
pub async fn find_base(caller: Caller, State(state): State<AppState>, Path(id): Path<NodeId>) -> ApiResult<Json<Node>> {
    Ok(Json(lineage::find(&state, &caller, NodeKind::Base, &id).await?))
}

/// List a base's files
#[utoipa::path(get, path = "/v1/bases/{base_id}/files", tag = "bases", params(("base_id" = String, Path)),
    responses((status = 200, description = "Its files", body = NodeFilePage), CallerErrors, NotFoundError))]
pub async fn list_base_files(
    caller: Caller,
    State(state): State<AppState>,
    Path(id): Path<NodeId>,
) -> ApiResult<Json<NodeFilePage>> {
    Ok(Json(lineage::list_files(&state, &caller, NodeKind::Base, &id).await?))
}

/// Download a file of a base
#[utoipa::path(get, path = "/v1/bases/{base_id}/files/{file_name}", tag = "bases",
    params(("base_id" = String, Path), ("file_name" = String, Path), DownloadQuery),
    responses((status = 200, description = "The file", content_type = "application/octet-stream", body = Vec<u8>),
        (status = 206, description = "The range that was asked for", content_type = "application/octet-stream", body = Vec<u8>),
        (status = 304, description = "The client has it already"),
        (status = 307, description = "The file is at this URL for a while"),
        CallerErrors, NotFoundError, GoneError, QueryErrors, RangeError))]
pub async fn download_base_file(
    caller: Caller,
    State(state): State<AppState>,
    Path((node, name)): Path<(NodeId, String)>,
    Query(query): Query<DownloadQuery>,
    method: Method,
    headers: HeaderMap,
) -> ApiResult<Response> {
    let request = FileRequest { kind: NodeKind::Base, node, name, proxy: query.proxy, method, headers };
    lineage::download(&state, &caller, request).await
}
