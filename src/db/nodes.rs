//! Committing nodes of the lineage: the row is the commit, written when every file is durable.

use serde_json::json;
use sqlx::{PgConnection, PgPool};

use super::{
    events::{self, NewEvent},
    jobs,
    leases::{self, Lease, WriteError},
    objects,
    training::{self, Metric},
};
use crate::domain::{
    contract::NodeReport,
    ids::{JobId, NodeId, ProjectId},
    job::EventType,
    lineage::NodeKind,
};

/// A file of a node, as it lies in the bucket.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StoredFile {
    pub name: String,
    pub object_key: String,
    pub size_bytes: i64,
    pub sha256: String,
}

impl StoredFile {
    /// What a manifest says of it.
    pub fn facts(&self) -> (&str, i64, &str) {
        (&self.name, self.size_bytes, &self.sha256)
    }
}

/// The files of a node, by name.
pub async fn files(pool: &PgPool, node: &NodeId) -> sqlx::Result<Vec<StoredFile>> {
    sqlx::query_as!(
        StoredFile,
        r#"
        -- db::nodes::files
        select name, object_key, size_bytes, sha256 from node_files where node_id = $1 order by name
        "#,
        node.as_str(),
    )
    .fetch_all(pool)
    .await
}

/// Makes a node visible. Its parent is the job's latest base or restart, or before those the checkpoint that the job
/// began with. A repeated commit changes nothing. `lag_s` is how long the node has been complete on the worker's disk.
pub async fn commit(
    pool: &PgPool,
    lease: &Lease,
    project: &ProjectId,
    job: &JobId,
    report: &NodeReport,
    files: &[StoredFile],
    lag_s: f64,
) -> Result<(), WriteError> {
    let mut tx = pool.begin().await?;
    leases::fence(&mut tx, lease).await?;
    let id = NodeId::new();
    let update_norms = (!report.update_norms.is_empty()).then(|| json!(report.update_norms));
    let node = sqlx::query_scalar!(
        r#"
        -- db::nodes::commit
        insert into nodes (id, project_id, job_id, kind, lease_epoch, step, restart, update_norms, parent_id)
        values ($1, $2, $3, $4, $5, $6, $7, $8, coalesce(
            (
                select id from nodes
                where job_id = $3 and kind in ('base', 'restart') and not superseded
                order by step desc, restart desc
                limit 1
            ),
            (select init_node_id from jobs where id = $3)
        ))
        on conflict (job_id, lease_epoch, kind, step) do nothing
        returning id as "id: NodeId"
        "#,
        id.as_str(),
        project.as_str(),
        job.as_str(),
        report.kind as NodeKind,
        lease.lease_epoch,
        report.step,
        report.restart,
        update_norms,
    )
    .fetch_optional(&mut *tx)
    .await?;
    let Some(node) = node else { return Ok(()) };
    insert_files(&mut tx, &node, files).await?;
    if report.kind == NodeKind::State {
        forget_infra_failures(&mut tx, lease).await?;
        jobs::note_needs(&mut tx, job, None).await?;
    }
    training::insert_metrics(&mut tx, lease, job, &metrics(report, lag_s)).await?;
    let (kind, message) = announcement(report);
    let mut data = json!({
        "id": node,
        "step": report.step,
        "restart": report.restart,
        "stall_ms": report.stall_ms,
        "lag_s": lag_s,
    });
    if let Some(norms) = update_norms {
        data["update_norms"] = norms;
    }
    events::append(&mut tx, job, NewEvent { kind, lease_epoch: Some(lease.lease_epoch), message: &message, data })
        .await?;
    tx.commit().await?;
    Ok(())
}

fn metrics(report: &NodeReport, lag_s: f64) -> Vec<Metric> {
    let mut metrics =
        vec![(report.step, "checkpoint_stall_ms", report.stall_ms as f64), (report.step, "checkpoint_lag_s", lag_s)];
    if !report.update_norms.is_empty() {
        let norm = report.update_norms.values().map(|norm| norm * norm).sum::<f64>().sqrt();
        metrics.push((report.step, "update_norm", norm));
    }
    metrics
}

fn announcement(report: &NodeReport) -> (EventType, String) {
    let (step, restart) = (report.step, report.restart);
    match report.kind {
        NodeKind::Base => (EventType::Base, format!("base stored after step {step}")),
        NodeKind::Restart => (EventType::Restart, format!("restart {restart} merged and stored after step {step}")),
        NodeKind::Checkpoint => (EventType::Checkpoint, format!("checkpoint stored after step {step}")),
        NodeKind::State => (EventType::State, format!("state stored after step {step}")),
    }
}

pub(super) async fn insert_files(
    connection: &mut PgConnection,
    node: &NodeId,
    files: &[StoredFile],
) -> sqlx::Result<()> {
    for file in files {
        sqlx::query!(
            r#"
            -- db::nodes::insert_files
            insert into node_files (node_id, name, object_key, size_bytes, sha256) values ($1, $2, $3, $4, $5)
            "#,
            node.as_str(),
            file.name,
            file.object_key,
            file.size_bytes,
            file.sha256,
        )
        .execute(&mut *connection)
        .await?;
    }
    Ok(())
}

/// A newer state is progress: what failed before it no longer counts.
async fn forget_infra_failures(connection: &mut PgConnection, lease: &Lease) -> sqlx::Result<()> {
    sqlx::query!(
        "-- db::nodes::forget_infra_failures\nupdate work_items set infra_failures = 0 where id = $1",
        lease.work_item.as_str(),
    )
    .execute(connection)
    .await?;
    Ok(())
}

/// Takes a state out of the lineage that cannot be used.
pub async fn give_up_state(pool: &PgPool, lease: &Lease, state: &NodeId) -> Result<(), WriteError> {
    let mut tx = pool.begin().await?;
    leases::fence(&mut tx, lease).await?;
    sqlx::query!("-- db::nodes::give_up_state\nupdate nodes set superseded = true where id = $1", state.as_str())
        .execute(&mut *tx)
        .await?;
    tx.commit().await?;
    Ok(())
}

/// Forgets all states of a job but the newest `keep`, and returns the objects that nothing names any more. They are
/// queued for deletion.
pub async fn drop_old_states(pool: &PgPool, lease: &Lease, job: &JobId, keep: i64) -> Result<Vec<String>, WriteError> {
    let mut tx = pool.begin().await?;
    leases::fence(&mut tx, lease).await?;
    let old = sqlx::query_scalar!(
        r#"
        -- db::nodes::drop_old_states
        select id from nodes
        where job_id = $1 and kind = 'state'
        order by superseded, step desc
        offset $2
        "#,
        job.as_str(),
        keep,
    )
    .fetch_all(&mut *tx)
    .await?;
    let unnamed = forget(&mut tx, &old).await?;
    tx.commit().await?;
    Ok(unnamed.into_iter().map(|object| object.key).collect())
}

/// Takes the files from nodes, and queues for deletion what nothing names then, which is returned. The rows stay, marked
/// as deleted, but for those of states, which nothing refers to.
pub(super) async fn forget(connection: &mut PgConnection, nodes: &[String]) -> sqlx::Result<Vec<objects::Unnamed>> {
    let files = sqlx::query_as!(
        objects::Unnamed,
        r#"
        -- db::nodes::forget: files
        delete from node_files where node_id = any($1) returning object_key as key, size_bytes
        "#,
        nodes,
    )
    .fetch_all(&mut *connection)
    .await?;
    sqlx::query!(
        r#"
        -- db::nodes::forget
        with dropped as (
            delete from nodes where id = any($1) and kind = 'state'
        )
        update nodes set deleted_at = now() where id = any($1) and kind <> 'state' and deleted_at is null
        "#,
        nodes,
    )
    .execute(&mut *connection)
    .await?;
    objects::queue(connection, files).await
}
