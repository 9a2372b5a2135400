//! The lineage of jobs' weights as their owners see it.

use std::collections::BTreeMap;

use chrono::{DateTime, Utc};
use sqlx::{PgPool, types::Json};

use crate::domain::{
    ids::{JobId, NodeId, ProjectId},
    lineage::NodeKind,
    spec::Linear,
};

#[derive(Debug)]
pub struct NodeRow {
    pub id: NodeId,
    pub kind: NodeKind,
    /// Null for an import.
    pub job: Option<JobId>,
    pub name: Option<String>,
    pub parent: Option<NodeId>,
    pub step: i64,
    pub restart: i64,
    pub lease_epoch: Option<i64>,
    pub superseded: bool,
    /// Rebuilt from a restart, after its job had merged it.
    pub materialized: bool,
    pub update_norms: Option<Json<BTreeMap<Linear, f64>>>,
    pub pinned: bool,
    pub created_at: DateTime<Utc>,
    pub deleted_at: Option<DateTime<Utc>>,
}

#[derive(Debug, Clone)]
pub struct NodeFileRow {
    pub node: NodeId,
    pub name: String,
    pub object_key: String,
    pub size_bytes: i64,
    pub sha256: String,
}

/// Which nodes of a kind to list.
#[derive(Debug, Default)]
pub struct NodeFilter {
    pub id: Option<String>,
    pub job: Option<String>,
    /// Of those before this one.
    pub cursor: Option<String>,
    pub include_superseded: bool,
}

/// The newest nodes of a kind first; without those that were deleted, unless one is asked for by its identifier.
pub async fn list(
    pool: &PgPool,
    project: &ProjectId,
    kind: NodeKind,
    filter: &NodeFilter,
    limit: i64,
) -> sqlx::Result<Vec<NodeRow>> {
    sqlx::query_as!(
        NodeRow,
        r#"
        -- db::lineage::list
        select id as "id: NodeId", kind as "kind: NodeKind", job_id as "job: JobId", name,
            parent_id as "parent: NodeId", step, restart, lease_epoch, superseded, materialized, pinned, created_at,
            deleted_at,
            update_norms as "update_norms: Json<BTreeMap<Linear, f64>>"
        from nodes
        where project_id = $1 and kind = $2
            and ($3::text is null or id = $3)
            and ($4::text is null or job_id = $4)
            and ($5::text is null or id < $5)
            and ($6 or not superseded)
            and (deleted_at is null or $3 is not null)
        order by id desc
        limit $7
        "#,
        project.as_str(),
        kind as NodeKind,
        filter.id.as_deref(),
        filter.job.as_deref(),
        filter.cursor.as_deref(),
        filter.include_superseded,
        limit,
    )
    .fetch_all(pool)
    .await
}

/// A node of this kind, also if it was superseded or deleted.
pub async fn find(pool: &PgPool, project: &ProjectId, kind: NodeKind, id: &NodeId) -> sqlx::Result<Option<NodeRow>> {
    let filter = NodeFilter { id: Some(id.as_str().to_owned()), include_superseded: true, ..NodeFilter::default() };
    let mut found = list(pool, project, kind, &filter, 1).await?;
    Ok(found.pop())
}

/// The files of all of these nodes.
pub async fn list_files(pool: &PgPool, project: &ProjectId, nodes: &[String]) -> sqlx::Result<Vec<NodeFileRow>> {
    sqlx::query_as!(
        NodeFileRow,
        r#"
        -- db::lineage::list_files
        select f.node_id as "node: NodeId", f.name, f.object_key, f.size_bytes, f.sha256
        from node_files f
        join nodes n on n.id = f.node_id
        where n.project_id = $1 and n.id = any($2)
        order by f.node_id, f.name
        "#,
        project.as_str(),
        nodes,
    )
    .fetch_all(pool)
    .await
}
