//! Deleting nodes: what a user asks for, and what the policy of a job lets go. A transaction takes their files and
//! queues the objects; the collector deletes these afterwards, so that a crash in between leaves only orphans.
//!
//! Nodes are locked before it is asked what needs them. Whoever begins to need one holds its row, so that neither is
//! missed by the other.

use sqlx::{PgConnection, PgPool, types::Json};

use super::{nodes, objects::Unnamed};
use crate::domain::{
    ids::{JobId, NodeId, ProjectId},
    job::JobState,
    retention::{self, BlockReason, Blocker, StoredCheckpoint},
    spec::CheckpointsSpec,
};

/// What was deleted, and what was not.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Deletion {
    pub deleted: Vec<NodeId>,
    /// Of the objects that nothing names any more.
    pub freed_bytes: i64,
    /// In the order of the nodes.
    pub blockers: Vec<Blocker>,
}

/// Which checkpoints to delete: those to which all of this applies.
#[derive(Debug, Clone, Default)]
pub struct Selection {
    /// Only these. An import is selected in no other way.
    pub ids: Option<Vec<String>>,
    pub job: Option<JobId>,
    pub older_than_s: Option<f64>,
    /// All but the newest so many of the lineage of each job.
    pub keep_last: Option<i64>,
    pub superseded: Option<bool>,
}

/// Deletes the selected checkpoints that nothing needs; in a dry run it only says what that would come to.
pub async fn delete_checkpoints(
    pool: &PgPool,
    project: &ProjectId,
    selection: &Selection,
    dry_run: bool,
) -> sqlx::Result<Deletion> {
    let mut tx = pool.begin().await?;
    let selected = select_checkpoints(&mut tx, project, selection).await?;
    let mut deletion = delete_unneeded(&mut tx, &selected).await?;
    if let Some(ids) = &selection.ids {
        deletion.blockers.extend(find_missing(&mut tx, project, ids).await?);
        deletion.blockers.sort();
    }
    end(tx, dry_run).await?;
    Ok(deletion)
}

/// A dry run is the same transaction, and leaves nothing of it.
async fn end(tx: sqlx::Transaction<'_, sqlx::Postgres>, dry_run: bool) -> sqlx::Result<()> {
    if dry_run { tx.rollback().await } else { tx.commit().await }
}

async fn select_checkpoints(
    connection: &mut PgConnection,
    project: &ProjectId,
    selection: &Selection,
) -> sqlx::Result<Vec<String>> {
    sqlx::query_scalar!(
        r#"
        -- db::retention::select_checkpoints
        with placed as (
            select *, row_number() over (partition by job_id, superseded order by step desc, id desc) as place
            from nodes
            where project_id = $1 and kind = 'checkpoint' and deleted_at is null
        )
        select id as "id!"
        from placed
        where ($2::text[] is null or id = any($2))
            and (job_id is not null or $2 is not null)
            and ($3::text is null or job_id = $3)
            and ($4::double precision is null or extract(epoch from now() - created_at) > $4)
            and ($5::bigint is null or superseded or place > $5)
            and ($6::boolean is null or superseded = $6)
        "#,
        project.as_str(),
        selection.ids.as_deref(),
        selection.job.as_ref().map(JobId::as_str),
        selection.older_than_s,
        selection.keep_last,
        selection.superseded,
    )
    .fetch_all(connection)
    .await
}

/// Those of the identifiers that name no checkpoint of the project. One that was deleted before is not missing.
async fn find_missing(
    connection: &mut PgConnection,
    project: &ProjectId,
    ids: &[String],
) -> sqlx::Result<Vec<Blocker>> {
    let missing = sqlx::query_scalar!(
        r#"
        -- db::retention::find_missing
        select distinct id as "id!: NodeId" from unnest($2::text[]) as asked (id)
        where not exists (
            select 1 from nodes n where n.id = asked.id and n.project_id = $1 and n.kind = 'checkpoint'
        )
        "#,
        project.as_str(),
        ids,
    )
    .fetch_all(connection)
    .await?;
    Ok(missing.into_iter().map(|node| Blocker { node, reason: BlockReason::NotFound, user: None }).collect())
}

async fn delete_unneeded(connection: &mut PgConnection, nodes: &[String]) -> sqlx::Result<Deletion> {
    let locked = lock(connection, nodes).await?;
    let blockers = find_blockers(connection, &locked).await?;
    let is_needed = |id: &String| blockers.iter().any(|blocker| blocker.node.as_str() == id);
    let unneeded: Vec<_> = locked.into_iter().filter(|id| !is_needed(id)).collect();
    let freed_bytes = freed_bytes(nodes::forget(connection, &unneeded).await?);
    Ok(Deletion { deleted: unneeded.into_iter().map(NodeId::from).collect(), freed_bytes, blockers })
}

fn freed_bytes(objects: Vec<Unnamed>) -> i64 {
    objects.into_iter().map(|object| object.size_bytes).sum()
}

/// Those of the nodes that are still there. Nobody begins to need one until the transaction ends.
async fn lock(connection: &mut PgConnection, nodes: &[String]) -> sqlx::Result<Vec<String>> {
    sqlx::query_scalar!(
        r#"
        -- db::retention::lock
        select id from nodes where id = any($1) and deleted_at is null order by id for update
        "#,
        nodes,
    )
    .fetch_all(connection)
    .await
}

/// What keeps these nodes from being deleted.
async fn find_blockers(connection: &mut PgConnection, nodes: &[String]) -> sqlx::Result<Vec<Blocker>> {
    sqlx::query_as!(
        Blocker,
        r#"
        -- db::retention::find_blockers
        select id as "node!: NodeId", 'pinned' as "reason!: BlockReason", null::text as "user"
        from nodes
        where id = any($1) and pinned
        union all
        select init_node_id, 'begins_job', id
        from jobs
        where init_node_id = any($1) and state not in ('succeeded', 'failed', 'cancelled')
        union all
        select tokenizer_node_id, 'tokenizes', id
        from tokenizations
        where tokenizer_node_id = any($1) and state in ('queued', 'running')
        union all
        select restart_id, 'has_task', id
        from lineage_tasks
        where restart_id = any($1) and state in ('queued', 'running')
        union all
        -- What the deltas are compared with.
        select c.id, 'has_task', t.id
        from nodes c
        join lineage_tasks t on t.restart_id = c.parent_id
        where c.id = any($1) and c.kind = 'checkpoint' and t.kind = 'verify' and t.state in ('queued', 'running')
        union all
        -- A checkpoint is whole by itself; a base or a delta is part of what a descendant was made of.
        select parent.id, 'has_descendant', child.id
        from nodes parent
        join nodes child on child.parent_id = parent.id and child.job_id <> parent.job_id
        where parent.id = any($1) and parent.kind in ('base', 'restart') and child.deleted_at is null
        order by 1, 2, 3
        "#,
        nodes,
    )
    .fetch_all(connection)
    .await
}

/// What came of the deletion of a lineage.
#[derive(Debug, PartialEq, Eq)]
pub enum LineageDeletion {
    Done(Deletion),
    NotFound,
    /// The job goes on from what it has stored.
    NotFinished(JobState),
    /// All of it stays.
    Needed(Vec<Blocker>),
}

/// Deletes the bases, restarts and states of a job that is finished, or none of them. Its checkpoints are whole by
/// themselves, and stay.
pub async fn delete_lineage(
    pool: &PgPool,
    project: &ProjectId,
    job: &JobId,
    dry_run: bool,
) -> sqlx::Result<LineageDeletion> {
    let mut tx = pool.begin().await?;
    let state = sqlx::query_scalar!(
        r#"
        -- db::retention::delete_lineage: job
        select state as "state: JobState" from jobs where project_id = $1 and id = $2 for no key update
        "#,
        project.as_str(),
        job.as_str(),
    )
    .fetch_optional(&mut *tx)
    .await?;
    match state {
        None => return Ok(LineageDeletion::NotFound),
        Some(state) if !state.is_final() => return Ok(LineageDeletion::NotFinished(state)),
        Some(_) => {}
    }
    let lineage = sqlx::query_scalar!(
        r#"
        -- db::retention::delete_lineage: nodes
        select id from nodes
        where job_id = $1 and kind in ('base', 'restart', 'state') and deleted_at is null
        "#,
        job.as_str(),
    )
    .fetch_all(&mut *tx)
    .await?;
    let deletion = delete_unneeded(&mut tx, &lineage).await?;
    if !deletion.blockers.is_empty() {
        return Ok(LineageDeletion::Needed(deletion.blockers));
    }
    end(tx, dry_run).await?;
    Ok(LineageDeletion::Done(deletion))
}

/// Pins a checkpoint, or takes the pin out. False if it is not there.
pub async fn set_pinned(pool: &PgPool, project: &ProjectId, id: &NodeId, pinned: bool) -> sqlx::Result<bool> {
    let result = sqlx::query!(
        r#"
        -- db::retention::set_pinned
        update nodes set pinned = $3
        where project_id = $1 and id = $2 and kind = 'checkpoint' and deleted_at is null
        "#,
        project.as_str(),
        id.as_str(),
        pinned,
    )
    .execute(pool)
    .await?;
    Ok(result.rows_affected() == 1)
}

/// A job whose checkpoints do not all stay.
#[derive(Debug)]
pub struct Policy {
    pub job: JobId,
    pub policy: Json<CheckpointsSpec>,
}

/// The jobs that have a policy and more checkpoints than the newest.
pub async fn list_policies(pool: &PgPool) -> sqlx::Result<Vec<Policy>> {
    sqlx::query_as!(
        Policy,
        r#"
        -- db::retention::list_policies
        select j.id as "job: JobId", j.spec -> 'checkpoints' as "policy!: Json<CheckpointsSpec>"
        from jobs j
        where (j.spec #> '{checkpoints,keep_last}' <> 'null' or j.spec #> '{checkpoints,ttl_s}' <> 'null')
            and (
                select count(*) from nodes n
                where n.job_id = j.id and n.kind = 'checkpoint' and n.deleted_at is null and not n.materialized
            ) > 1
        order by j.id
        "#,
    )
    .fetch_all(pool)
    .await
}

/// Deletes the checkpoints of a job that its policy lets go and that nothing needs.
pub async fn apply_policy(pool: &PgPool, job: &JobId, policy: &CheckpointsSpec) -> sqlx::Result<Deletion> {
    let mut tx = pool.begin().await?;
    let checkpoints = list_checkpoints(&mut tx, job).await?;
    let expendable = retention::expendable(policy, &checkpoints);
    let ids: Vec<_> = expendable.iter().map(|(id, _)| id.to_string()).collect();
    let deletion = delete_unneeded(&mut tx, &ids).await?;
    tx.commit().await?;
    for (id, reason) in expendable.iter().filter(|(id, _)| deletion.deleted.contains(id)) {
        tracing::info!(job.id = %job, checkpoint.id = %id, ?reason, "checkpoint deleted by its job's policy");
    }
    Ok(deletion)
}

/// Locks them, so that none is superseded or pinned before it is decided on. A loss is taken from the latest attempt that
/// evaluated at the step.
async fn list_checkpoints(connection: &mut PgConnection, job: &JobId) -> sqlx::Result<Vec<StoredCheckpoint>> {
    sqlx::query_as!(
        StoredCheckpoint,
        r#"
        -- db::retention::list_checkpoints
        select n.id as "id: NodeId", n.step, extract(epoch from now() - n.created_at)::double precision as "age_s!",
            (
                select m.value from job_metrics m
                where m.job_id = n.job_id and m.name = 'eval_loss' and m.step = n.step
                order by m.lease_epoch desc
                limit 1
            ) as eval_loss,
            n.pinned, n.superseded
        from nodes n
        where n.job_id = $1 and n.kind = 'checkpoint' and n.deleted_at is null and not n.materialized
        order by n.id
        for update of n
        "#,
        job.as_str(),
    )
    .fetch_all(connection)
    .await
}
