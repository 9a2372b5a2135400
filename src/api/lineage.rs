//! Bases, restarts and checkpoints: three collections of one kind of thing, the nodes of a lineage.

use std::{collections::BTreeMap, time::Duration};

use axum::{
    http::{HeaderMap, Method},
    response::{IntoResponse, Redirect, Response},
};
use chrono::{DateTime, Utc};
use serde::{Deserialize, Serialize};
use utoipa::{IntoParams, ToSchema};

use super::{
    AppState,
    auth::Caller,
    download::{self, Download},
    error::{ApiError, ApiResult},
    page::{Cursor, Limit},
};
use crate::{
    db::lineage::{self, NodeFileRow, NodeFilter, NodeRow},
    domain::{
        ids::{JobId, NodeId},
        lineage::NodeKind,
        spec::Linear,
    },
    storage::Key,
};

/// How long a presigned URL lives; the stable URL gives a new one at any time.
const PRESIGNED_TTL: Duration = Duration::from_secs(15 * 60);

/// A node of a lineage. It is there once all of its files are durable.
#[derive(Debug, Serialize, ToSchema)]
pub struct Node {
    id: NodeId,
    kind: NodeKind,
    /// The job that made it; null for a checkpoint that came from outside.
    job: Option<JobId>,
    /// What it was given at its import.
    name: Option<String>,
    /// Null at the root of a lineage.
    parent: Option<NodeId>,
    /// Updates done before it.
    step: i64,
    /// Of a restart its number from 1, of other nodes the restarts before it.
    restart: i64,
    /// Null for a checkpoint that came from outside or was materialized.
    lease_epoch: Option<i64>,
    /// A later attempt went on from an earlier state: it is no part of the lineage any more.
    superseded: bool,
    /// It is not deleted until it is unpinned.
    pinned: bool,
    /// A checkpoint that was rebuilt from a restart, its parent, when somebody asked for it.
    materialized: bool,
    /// Of a restart: the Frobenius norm of the update that it merged, by kind of matrix.
    update_norms: Option<BTreeMap<Linear, f64>>,
    created_at: DateTime<Utc>,
    /// Since then it has no files, and lists leave it out; null for a node that is there.
    deleted_at: Option<DateTime<Utc>>,
    /// Of all files together.
    size_bytes: i64,
    files: Vec<NodeFile>,
}

#[derive(Debug, Serialize, ToSchema)]
pub struct NodeFile {
    name: String,
    size_bytes: i64,
    sha256: String,
    /// Where to download it, relative to the server.
    url: String,
}

#[derive(Debug, Serialize, ToSchema)]
pub struct NodePage {
    data: Vec<Node>,
    /// To be given as `cursor` for the next page; null on the last one.
    next_cursor: Option<String>,
}

#[derive(Debug, Serialize, ToSchema)]
pub struct NodeFilePage {
    data: Vec<NodeFile>,
    /// Always null: all files are on one page.
    next_cursor: Option<String>,
}

#[derive(Debug, Default, Deserialize, IntoParams)]
#[serde(default, deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub struct ListNodesQuery {
    /// Only those of this job.
    #[param(value_type = String, required = false)]
    job: Option<JobId>,
    /// How many to a page; 50 by default.
    #[param(value_type = i64, required = false, minimum = 1, maximum = 500)]
    limit: Limit,
    /// The `next_cursor` of the page before.
    #[param(value_type = String, required = false)]
    cursor: Option<Cursor>,
    /// Also those that are no part of the lineage any more.
    #[param(required = false)]
    include_superseded: bool,
}

#[derive(Debug, Default, Deserialize, IntoParams)]
#[serde(default, deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub struct DownloadQuery {
    /// Sends the bytes through this server, where it would redirect to the store.
    #[param(required = false)]
    pub proxy: bool,
}

pub async fn list(state: &AppState, caller: &Caller, kind: NodeKind, query: ListNodesQuery) -> ApiResult<NodePage> {
    let filter = NodeFilter {
        id: None,
        job: query.job.map(|job| job.to_string()),
        cursor: query.cursor.map(Cursor::into_inner),
        include_superseded: query.include_superseded,
    };
    let rows = lineage::list(&state.pool, &caller.project, kind, &filter, query.limit.with_next()).await?;
    let (rows, next_cursor) = query.limit.cut(rows, |row| row.id.as_str());
    Ok(NodePage { data: with_files(state, caller, rows).await?, next_cursor })
}

pub async fn find(state: &AppState, caller: &Caller, kind: NodeKind, id: &NodeId) -> ApiResult<Node> {
    let row = lineage::find(&state.pool, &caller.project, kind, id).await?;
    let mut found = with_files(state, caller, row.into_iter().collect()).await?;
    found.pop().ok_or(ApiError::NotFound(name(kind)))
}

pub async fn list_files(state: &AppState, caller: &Caller, kind: NodeKind, id: &NodeId) -> ApiResult<NodeFilePage> {
    let node = find(state, caller, kind, id).await?;
    Ok(NodeFilePage { data: node.files, next_cursor: None })
}

/// A request for one file of a node.
pub struct FileRequest {
    pub kind: NodeKind,
    pub node: NodeId,
    pub name: String,
    pub proxy: bool,
    pub method: Method,
    pub headers: HeaderMap,
}

/// The file itself, or a redirect to the store where clients reach it.
pub async fn download(state: &AppState, caller: &Caller, request: FileRequest) -> ApiResult<Response> {
    let node = lineage::find(&state.pool, &caller.project, request.kind, &request.node).await?;
    let node = node.ok_or(ApiError::NotFound(name(request.kind)))?;
    if node.deleted_at.is_some() {
        return Err(ApiError::Deleted(name(request.kind)));
    }
    let files = lineage::list_files(&state.pool, &caller.project, &[node.id.to_string()]).await?;
    let file = files.into_iter().find(|file| file.name == request.name).ok_or(ApiError::NotFound("file"))?;

    let file = Download {
        content_type: if file.name.ends_with(".json") { "application/json" } else { "application/octet-stream" },
        object_key: file.object_key,
        name: file.name,
        size_bytes: file.size_bytes,
        sha256: file.sha256,
    };
    // A presigned URL is good for GET alone, and the store does not know our validators.
    if request.method == Method::GET && !request.proxy && !file.is_known(&request.headers) {
        let key = Key::from(file.object_key.clone());
        if let Some(url) = state.store.presigned_get(&key, PRESIGNED_TTL, &file.name).await? {
            return Ok(Redirect::temporary(&url).into_response());
        }
    }
    download::answer(&state.store, file, &request.method, &request.headers).await
}

async fn with_files(state: &AppState, caller: &Caller, rows: Vec<NodeRow>) -> ApiResult<Vec<Node>> {
    let ids: Vec<_> = rows.iter().map(|row| row.id.to_string()).collect();
    let files = lineage::list_files(&state.pool, &caller.project, &ids).await?;
    Ok(rows.into_iter().map(|row| response(row, &files)).collect())
}

fn response(row: NodeRow, files: &[NodeFileRow]) -> Node {
    let files = files.iter().filter(|file| file.node == row.id).map(|file| NodeFile {
        name: file.name.clone(),
        size_bytes: file.size_bytes,
        sha256: file.sha256.clone(),
        url: format!("/v1/{}/{}/files/{}", collection(row.kind), row.id, file.name),
    });
    let files: Vec<_> = files.collect();
    Node {
        size_bytes: files.iter().map(|file| file.size_bytes).sum(),
        files,
        id: row.id,
        kind: row.kind,
        job: row.job,
        name: row.name,
        parent: row.parent,
        step: row.step,
        restart: row.restart,
        lease_epoch: row.lease_epoch,
        superseded: row.superseded,
        pinned: row.pinned,
        deleted_at: row.deleted_at,
        materialized: row.materialized,
        update_norms: row.update_norms.map(|norms| norms.0),
        created_at: row.created_at,
    }
}

fn name(kind: NodeKind) -> &'static str {
    match kind {
        NodeKind::Base => "base",
        NodeKind::Restart => "restart",
        NodeKind::Checkpoint => "checkpoint",
        NodeKind::State => "state",
    }
}

fn collection(kind: NodeKind) -> &'static str {
    match kind {
        NodeKind::Base => "bases",
        _ => kind.folder(),
    }
}
