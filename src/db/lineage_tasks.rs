//! Tasks on a lineage as their owners see them: asked for, looked at. The work itself is in `upkeep`.

use chrono::{DateTime, Utc};
use serde::{Deserialize, Serialize};
use sqlx::{PgConnection, PgPool, types::Json};
use utoipa::ToSchema;

use crate::domain::{
    ids::{JobId, LineageTaskId, NodeId, ProjectId, WorkItemId},
    job::Failure,
    verification::Verification,
};

/// What is done.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema, sqlx::Type)]
#[serde(rename_all = "snake_case")]
#[sqlx(type_name = "text", rename_all = "snake_case")]
pub enum LineageTaskKind {
    /// The deltas are added to the base and compared with the merged weights, and every file is read again.
    Verify,
    /// The full weights after the restart become a checkpoint.
    Materialize,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema, sqlx::Type)]
#[serde(rename_all = "snake_case")]
#[sqlx(type_name = "text", rename_all = "snake_case")]
pub enum LineageTaskState {
    Queued,
    Running,
    Succeeded,
    Failed,
}

#[derive(Debug)]
pub struct LineageTaskRow {
    pub id: LineageTaskId,
    pub kind: LineageTaskKind,
    pub restart: NodeId,
    pub job: JobId,
    pub state: LineageTaskState,
    pub checkpoint: Option<NodeId>,
    pub verification: Option<Json<Verification>>,
    pub failure: Option<Json<Failure>>,
    pub created_at: DateTime<Utc>,
    pub finished_at: Option<DateTime<Utc>>,
}

/// Which tasks to list.
#[derive(Debug, Default)]
pub struct LineageTaskFilter {
    pub id: Option<String>,
    pub restart: Option<String>,
    pub job: Option<String>,
    /// Of those before this one.
    pub cursor: Option<String>,
}

/// What came of a request for a task.
#[derive(Debug)]
pub enum Creation {
    Done(LineageTaskId),
    NoSuchRestart,
    /// Its files are gone.
    Deleted,
    /// A later attempt went on from before the restart.
    Superseded,
}

/// Queues a task on a restart, or finds the one that does the same already. A checkpoint that is there is not made
/// again: then the task is done from the start.
pub async fn create(
    pool: &PgPool,
    project: &ProjectId,
    restart: &NodeId,
    kind: LineageTaskKind,
) -> sqlx::Result<Creation> {
    let mut tx = pool.begin().await?;
    // One at a time for each restart, beside whoever commits nodes after it.
    let found = sqlx::query!(
        r#"
        -- db::lineage_tasks::create: restart
        select superseded, deleted_at is not null as "is_deleted!" from nodes
        where project_id = $1 and id = $2 and kind = 'restart'
        for no key update
        "#,
        project.as_str(),
        restart.as_str(),
    )
    .fetch_optional(&mut *tx)
    .await?;
    match found {
        None => return Ok(Creation::NoSuchRestart),
        Some(restart) if restart.is_deleted => return Ok(Creation::Deleted),
        Some(restart) if restart.superseded => return Ok(Creation::Superseded),
        Some(_) => {}
    }
    if let Some(open) = find_open(&mut tx, restart, kind).await? {
        return Ok(Creation::Done(open));
    }
    let id = match kind {
        LineageTaskKind::Verify => queue(&mut tx, project, restart, kind).await?,
        LineageTaskKind::Materialize => match find_checkpoint(&mut tx, restart, true).await? {
            Some(checkpoint) => find_or_insert_done(&mut tx, project, restart, &checkpoint).await?,
            None => queue(&mut tx, project, restart, kind).await?,
        },
    };
    tx.commit().await?;
    Ok(Creation::Done(id))
}

async fn find_open(
    connection: &mut PgConnection,
    restart: &NodeId,
    kind: LineageTaskKind,
) -> sqlx::Result<Option<LineageTaskId>> {
    sqlx::query_scalar!(
        r#"
        -- db::lineage_tasks::find_open
        select id as "id: LineageTaskId" from lineage_tasks
        where restart_id = $1 and kind = $2 and state in ('queued', 'running')
        "#,
        restart.as_str(),
        kind as LineageTaskKind,
    )
    .fetch_optional(connection)
    .await
}

/// The checkpoint with the full weights after a restart, merged by its job or, where that will do, materialized.
pub(super) async fn find_checkpoint(
    connection: &mut PgConnection,
    restart: &NodeId,
    may_be_materialized: bool,
) -> sqlx::Result<Option<NodeId>> {
    sqlx::query_scalar!(
        r#"
        -- db::lineage_tasks::find_checkpoint
        select c.id as "id: NodeId"
        from nodes c
        join nodes r on r.id = c.parent_id
        where r.id = $1 and c.kind = 'checkpoint' and c.step = r.step and not c.superseded
            and c.deleted_at is null and ($2 or not c.materialized)
        order by c.materialized, c.id
        limit 1
        "#,
        restart.as_str(),
        may_be_materialized,
    )
    .fetch_optional(connection)
    .await
}

async fn find_or_insert_done(
    connection: &mut PgConnection,
    project: &ProjectId,
    restart: &NodeId,
    checkpoint: &NodeId,
) -> sqlx::Result<LineageTaskId> {
    let done = sqlx::query_scalar!(
        r#"
        -- db::lineage_tasks::find_or_insert_done: find
        select id as "id: LineageTaskId" from lineage_tasks
        where restart_id = $1 and checkpoint_id = $2 and kind = 'materialize'
        order by id limit 1
        "#,
        restart.as_str(),
        checkpoint.as_str(),
    )
    .fetch_optional(&mut *connection)
    .await?;
    if let Some(done) = done {
        return Ok(done);
    }
    let id = LineageTaskId::new();
    sqlx::query!(
        r#"
        -- db::lineage_tasks::find_or_insert_done: insert
        insert into lineage_tasks (id, project_id, kind, restart_id, checkpoint_id, state, finished_at)
        values ($1, $2, 'materialize', $3, $4, 'succeeded', now())
        "#,
        id.as_str(),
        project.as_str(),
        restart.as_str(),
        checkpoint.as_str(),
    )
    .execute(connection)
    .await?;
    Ok(id)
}

async fn queue(
    connection: &mut PgConnection,
    project: &ProjectId,
    restart: &NodeId,
    kind: LineageTaskKind,
) -> sqlx::Result<LineageTaskId> {
    let (id, work_item) = (LineageTaskId::new(), WorkItemId::new());
    sqlx::query!(
        r#"
        -- db::lineage_tasks::queue
        with queued as (
            insert into work_items (id, project_id, kind) values ($1, $2, $3) returning id
        )
        insert into lineage_tasks (id, project_id, kind, restart_id, work_item_id)
        select $4, $2, $3, $5, queued.id from queued
        "#,
        work_item.as_str(),
        project.as_str(),
        kind as LineageTaskKind,
        id.as_str(),
        restart.as_str(),
    )
    .execute(connection)
    .await?;
    Ok(id)
}

/// The newest tasks first.
pub async fn list(
    pool: &PgPool,
    project: &ProjectId,
    filter: &LineageTaskFilter,
    limit: i64,
) -> sqlx::Result<Vec<LineageTaskRow>> {
    sqlx::query_as!(
        LineageTaskRow,
        r#"
        -- db::lineage_tasks::list
        select t.id as "id: LineageTaskId", t.kind as "kind: LineageTaskKind", t.restart_id as "restart: NodeId",
            n.job_id as "job!: JobId", t.state as "state: LineageTaskState", t.checkpoint_id as "checkpoint: NodeId",
            t.verification as "verification: Json<Verification>", t.failure as "failure: Json<Failure>",
            t.created_at, t.finished_at
        from lineage_tasks t
        join nodes n on n.id = t.restart_id
        where t.project_id = $1
            and ($2::text is null or t.id = $2)
            and ($3::text is null or t.restart_id = $3)
            and ($4::text is null or n.job_id = $4)
            and ($5::text is null or t.id < $5)
        order by t.id desc
        limit $6
        "#,
        project.as_str(),
        filter.id.as_deref(),
        filter.restart.as_deref(),
        filter.job.as_deref(),
        filter.cursor.as_deref(),
        limit,
    )
    .fetch_all(pool)
    .await
}

pub async fn find(pool: &PgPool, project: &ProjectId, id: &LineageTaskId) -> sqlx::Result<Option<LineageTaskRow>> {
    let filter = LineageTaskFilter { id: Some(id.as_str().to_owned()), ..LineageTaskFilter::default() };
    let mut found = list(pool, project, &filter, 1).await?;
    Ok(found.pop())
}
