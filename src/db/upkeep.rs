//! What a worker writes about a task on a lineage. Every function is fenced by the lease of its attempt.

use serde_json::json;
use sqlx::{PgConnection, PgPool};

use super::{
    leases::{self, Lease, Next, Outcome, WriteError},
    lineage_tasks::{self, LineageTaskKind},
    nodes::{self, StoredFile},
};
use crate::domain::{
    ids::{JobId, LineageTaskId, NodeId, ProjectId},
    job::Failure,
    lineage::NodeKind,
    verification::Verification,
};

/// A task to do.
#[derive(Debug)]
pub struct Task {
    pub id: LineageTaskId,
    pub kind: LineageTaskKind,
    pub project: ProjectId,
    pub job: JobId,
    pub restart: NodeId,
    /// Updates before the restart.
    pub step: i64,
    /// The restart's number, from 1.
    pub number: i64,
    /// From the root, which should be the base, to the restart.
    pub chain: Vec<ChainNode>,
    /// The checkpoint with the same weights, if there is one.
    pub checkpoint: Option<NodeId>,
}

#[derive(Debug)]
pub struct ChainNode {
    pub id: NodeId,
    pub kind: NodeKind,
    /// Of a restart its number from 1, of a base the restarts before it.
    pub restart: i64,
    /// Not of one that was deleted.
    pub has_files: bool,
}

/// Begins an attempt on the task of a claimed item. Until the task is done its restart and the chain are not deleted.
pub async fn begin_attempt(connection: &mut PgConnection, lease: &Lease) -> Result<Task, WriteError> {
    leases::fence(connection, lease).await?;
    let task = sqlx::query!(
        r#"
        -- db::upkeep::begin_attempt
        update lineage_tasks t
        set state = 'running'
        from nodes n
        where t.work_item_id = $1 and n.id = t.restart_id
        returning t.id as "id: LineageTaskId", t.kind as "kind: LineageTaskKind", t.project_id as "project: ProjectId",
            n.job_id as "job!: JobId", n.id as "restart: NodeId", n.step, n.restart as number
        "#,
        lease.work_item.as_str(),
    )
    .fetch_one(&mut *connection)
    .await?;
    Ok(Task {
        chain: find_chain(connection, &task.restart).await?,
        // What was rebuilt from the same deltas proves nothing of them.
        checkpoint: lineage_tasks::find_checkpoint(connection, &task.restart, false).await?,
        id: task.id,
        kind: task.kind,
        project: task.project,
        job: task.job,
        restart: task.restart,
        step: task.step,
        number: task.number,
    })
}

async fn find_chain(connection: &mut PgConnection, restart: &NodeId) -> sqlx::Result<Vec<ChainNode>> {
    sqlx::query_as!(
        ChainNode,
        r#"
        -- db::upkeep::find_chain
        with recursive chain as (
            select id, parent_id, kind, restart, deleted_at, 0 as distance from nodes where id = $1
            union all
            select n.id, n.parent_id, n.kind, n.restart, n.deleted_at, c.distance + 1
            from chain c
            join nodes n on n.id = c.parent_id
            where c.kind = 'restart'
        )
        select id as "id!: NodeId", kind as "kind!: NodeKind", restart as "restart!",
            deleted_at is null as "has_files!"
        from chain
        order by distance desc
        "#,
        restart.as_str(),
    )
    .fetch_all(connection)
    .await
}

/// Ends an attempt with what a check found.
pub async fn complete_verify(
    pool: &PgPool,
    lease: &Lease,
    task: &Task,
    verification: &Verification,
) -> Result<(), WriteError> {
    let mut tx = pool.begin().await?;
    leases::end_attempt(&mut tx, lease, Outcome::Succeeded, Next::Done).await?;
    sqlx::query!(
        r#"
        -- db::upkeep::complete_verify
        update lineage_tasks set state = 'succeeded', verification = $2, finished_at = now() where id = $1
        "#,
        task.id.as_str(),
        json!(verification),
    )
    .execute(&mut *tx)
    .await?;
    tx.commit().await?;
    Ok(())
}

/// Ends an attempt with the weights stored: makes the checkpoint visible. It is superseded if its restart is by now.
pub async fn complete_materialize(
    pool: &PgPool,
    lease: &Lease,
    task: &Task,
    files: &[StoredFile],
) -> Result<(), WriteError> {
    let mut tx = pool.begin().await?;
    leases::end_attempt(&mut tx, lease, Outcome::Succeeded, Next::Done).await?;
    let checkpoint = NodeId::new();
    let superseded = sqlx::query_scalar!(
        r#"
        -- db::upkeep::complete_materialize: restart
        select superseded from nodes where id = $1 for share
        "#,
        task.restart.as_str(),
    )
    .fetch_one(&mut *tx)
    .await?;
    sqlx::query!(
        r#"
        -- db::upkeep::complete_materialize: checkpoint
        insert into nodes (id, project_id, job_id, parent_id, kind, step, restart, superseded, materialized)
        values ($1, $2, $3, $4, 'checkpoint', $5, $6, $7, true)
        "#,
        checkpoint.as_str(),
        task.project.as_str(),
        task.job.as_str(),
        task.restart.as_str(),
        task.step,
        task.number,
        superseded,
    )
    .execute(&mut *tx)
    .await?;
    nodes::insert_files(&mut tx, &checkpoint, files).await?;
    sqlx::query!(
        r#"
        -- db::upkeep::complete_materialize
        update lineage_tasks set state = 'succeeded', checkpoint_id = $2, finished_at = now() where id = $1
        "#,
        task.id.as_str(),
        checkpoint.as_str(),
    )
    .execute(&mut *tx)
    .await?;
    tx.commit().await?;
    Ok(())
}

/// Ends an attempt that failed: for another try if that can help, else for good.
pub async fn fail(pool: &PgPool, lease: &Lease, failure: &Failure) -> Result<(), WriteError> {
    let mut tx = pool.begin().await?;
    settle(&mut tx, lease, failure, Outcome::Failed).await?;
    tx.commit().await?;
    Ok(())
}

/// Whether a lease's work item is for a task on a lineage.
pub(super) async fn owns(connection: &mut PgConnection, lease: &Lease) -> sqlx::Result<bool> {
    let kind = sqlx::query_scalar!(
        "-- db::upkeep::owns\nselect kind from work_items where id = $1",
        lease.work_item.as_str(),
    )
    .fetch_one(connection)
    .await?;
    Ok(["verify", "materialize"].contains(&kind.as_str()))
}

pub(super) async fn settle(
    connection: &mut PgConnection,
    lease: &Lease,
    failure: &Failure,
    outcome: Outcome,
) -> Result<(), WriteError> {
    leases::fence(connection, lease).await?;
    let failures = leases::count_infra_failure(connection, &lease.work_item).await?;
    if failure.retryable && failures <= leases::MAX_INFRA_FAILURES {
        return requeue(connection, lease, outcome, failures as f64).await;
    }
    leases::end_attempt(connection, lease, outcome, Next::Done).await?;
    sqlx::query!(
        r#"
        -- db::upkeep::settle
        update lineage_tasks set state = 'failed', failure = $2, finished_at = now() where work_item_id = $1
        "#,
        lease.work_item.as_str(),
        json!(failure),
    )
    .execute(connection)
    .await?;
    Ok(())
}

/// Gives the work back unharmed, because the worker has to go.
pub async fn release(pool: &PgPool, lease: &Lease) -> Result<(), WriteError> {
    let mut tx = pool.begin().await?;
    requeue(&mut tx, lease, Outcome::Released, 0.0).await?;
    tx.commit().await?;
    Ok(())
}

async fn requeue(
    connection: &mut PgConnection,
    lease: &Lease,
    outcome: Outcome,
    delay_s: f64,
) -> Result<(), WriteError> {
    leases::end_attempt(connection, lease, outcome, Next::QueuedAfter { delay_s }).await?;
    sqlx::query!(
        "-- db::upkeep::requeue\nupdate lineage_tasks set state = 'queued' where work_item_id = $1",
        lease.work_item.as_str(),
    )
    .execute(connection)
    .await?;
    Ok(())
}
