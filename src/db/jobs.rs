//! Jobs as their owners see them: submitted and looked at.

use chrono::{DateTime, Utc};
use serde_json::json;
use sqlx::{PgConnection, PgPool, types::Json};

use super::{
    events::{self, NewEvent},
    workers::WORKER_ALIVE_S,
};
use crate::domain::{
    ids::{DatasetId, JobId, NodeId, ProjectId, WorkItemId},
    job::{EventType, Failure, JobState, WaitReason},
    memory,
    spec::{Choices, Device, TrainSpec},
};

#[derive(Debug)]
pub struct JobRow {
    pub id: JobId,
    pub name: String,
    pub state: JobState,
    pub wait_reason: Option<WaitReason>,
    pub queue_position: Option<i64>,
    pub spec: Json<TrainSpec>,
    pub choices: Option<Json<Choices>>,
    pub warnings: Vec<String>,
    pub failure: Option<Json<Failure>>,
    pub lease_epoch: i64,
    pub is_exact: bool,
    pub eligible_at: DateTime<Utc>,
    pub last_event_seq: i64,
    pub created_at: DateTime<Utc>,
    pub started_at: Option<DateTime<Utc>>,
    pub finished_at: Option<DateTime<Utc>>,
    pub step: Option<i64>,
    pub loss: Option<f64>,
    pub learning_rate: Option<f64>,
    pub tokens_per_s: Option<f64>,
    pub num_tokens: Option<i64>,
    pub num_restarts: Option<i64>,
    pub stored_bytes: i64,
}

/// Queues a job and returns its identifier. Commits nothing: the caller's transaction holds the data
/// that the spec was checked against.
pub async fn create(
    connection: &mut PgConnection,
    project: &ProjectId,
    spec: &TrainSpec,
    warnings: &[String],
) -> sqlx::Result<JobId> {
    let (id, work_item) = (JobId::new(), WorkItemId::new());
    sqlx::query!(
        r#"
        -- db::jobs::create
        with queued as (
            insert into work_items (id, project_id, kind, priority, device, num_gpus, cpu_bytes, gpu_bytes)
            values ($1, $2, 'train', $3, $4, $5, $13, $14)
            returning id
        )
        insert into jobs (id, project_id, work_item_id, dataset_id, tokenization_id, init_node_id, name, spec, warnings)
        select $6, $2, queued.id, $7, $8, $9, $10, $11, $12 from queued
        "#,
        work_item.as_str(),
        project.as_str(),
        spec.priority,
        spec.resources.device as Device,
        spec.resources.num_gpus,
        id.as_str(),
        spec.dataset.as_str(),
        spec.tokenization.as_str(),
        spec.init_checkpoint.as_ref().map(NodeId::as_str),
        spec.name,
        json!(spec),
        warnings,
        memory::needed_bytes(spec, 0, Device::Cpu),
        memory::needed_bytes(spec, 0, Device::Cuda),
    )
    .execute(&mut *connection)
    .await?;
    let event = NewEvent { kind: EventType::Submitted, lease_epoch: None, message: "submitted", data: json!({}) };
    events::append(connection, &id, event).await?;
    Ok(id)
}

/// Notes what a job needs from its last state on, for whoever may claim it. What its trainer has just chosen counts where
/// an earlier one has not.
pub(super) async fn note_needs(
    connection: &mut PgConnection,
    id: &JobId,
    chosen: Option<&Choices>,
) -> sqlx::Result<()> {
    let job = sqlx::query!(
        r#"
        -- db::jobs::note_needs: job
        select work_item_id, spec as "spec: Json<TrainSpec>", choices as "choices: Json<Choices>",
            (select max(step) from nodes where job_id = j.id and kind = 'state' and not superseded) as last_step
        from jobs j
        where id = $1
        "#,
        id.as_str(),
    )
    .fetch_one(&mut *connection)
    .await?;
    let spec = match job.choices.as_deref().or(chosen) {
        Some(choices) => job.spec.with_choices(choices),
        None => job.spec.0,
    };
    let needed = |device| memory::needed_bytes(&spec, job.last_step.unwrap_or(0), device);
    sqlx::query!(
        r#"
        -- db::jobs::note_needs
        update work_items
        set cpu_bytes = $2, gpu_bytes = $3
        -- Seldom anything new: after a warm start, or where the trainer chose.
        where id = $1 and (cpu_bytes, gpu_bytes) is distinct from ($2, $3)
        "#,
        job.work_item_id,
        needed(Device::Cpu),
        needed(Device::Cuda),
    )
    .execute(connection)
    .await?;
    Ok(())
}

pub async fn find(pool: &PgPool, project: &ProjectId, id: &JobId) -> sqlx::Result<Option<JobRow>> {
    let mut found = select(pool, project, Some(id), None, None, 1).await?;
    Ok(found.pop())
}

/// The newest jobs first, in one state or all, from before `cursor`.
pub async fn list(
    pool: &PgPool,
    project: &ProjectId,
    state: Option<JobState>,
    cursor: Option<&str>,
    limit: i64,
) -> sqlx::Result<Vec<JobRow>> {
    select(pool, project, None, state, cursor, limit).await
}

async fn select(
    pool: &PgPool,
    project: &ProjectId,
    id: Option<&JobId>,
    state: Option<JobState>,
    cursor: Option<&str>,
    limit: i64,
) -> sqlx::Result<Vec<JobRow>> {
    sqlx::query_as!(
        JobRow,
        r#"
        -- db::jobs::select
        select j.id as "id: JobId", j.name, j.state as "state: JobState", j.spec as "spec: Json<TrainSpec>",
            j.choices as "choices: Json<Choices>", j.warnings, j.failure as "failure: Json<Failure>", w.lease_epoch, w.eligible_at,
            j.is_exact, j.last_event_seq,
            j.created_at, j.started_at, j.finished_at,
            case
                when j.state = 'paused' then 'paused'
                when j.state <> 'queued' then null
                when t.state <> 'ready' then 'dataset_not_ready'
                when w.eligible_at > now() then 'backoff'
                when not exists (
                    select 1 from workers
                    where last_seen_at > now() - make_interval(secs => $6) and not is_draining
                ) then 'no_worker'
                -- Of the living ones that have its device; see db::leases::claim.
                when not (
                    select bool_or(coalesce(
                        case when device = 'cpu' then w.cpu_bytes when w.device <> 'cpu' then w.gpu_bytes end
                            <= memory_bytes,
                        true
                    ))
                    from workers
                    where last_seen_at > now() - make_interval(secs => $6) and not is_draining
                        and (w.device in ('auto', 'cpu') or (w.device = device and w.num_gpus <= num_gpus))
                ) then 'not_enough_memory'
                else 'no_fitting_slot'
            end as "wait_reason: WaitReason",
            case when j.state = 'queued' then (
                select 1 + count(*)
                from work_items before
                where before.state = 'queued' and before.kind = 'train'
                    and (-before.priority, before.created_at, before.id) < (-w.priority, w.created_at, w.id)
            ) end as queue_position,
            p.step as "step?", p.loss, p.learning_rate, p.tokens_per_s, p.num_tokens as "num_tokens?",
            p.num_restarts as "num_restarts?",
            (
                select coalesce(sum(o.size_bytes), 0)::bigint
                from (
                    select distinct on (f.object_key) f.size_bytes
                    from nodes n
                    join node_files f on f.node_id = n.id
                    where n.job_id = j.id
                ) o
            ) as "stored_bytes!"
        from jobs j
        join work_items w on w.id = j.work_item_id
        join tokenizations t on t.id = j.tokenization_id
        left join job_progress p on p.job_id = j.id
        where j.project_id = $1
            and ($2::text is null or j.id = $2)
            and ($3::text is null or j.state = $3)
            and ($4::text is null or j.id < $4)
        order by j.id desc
        limit $5
        "#,
        project.as_str(),
        id.map(JobId::as_str),
        state as Option<JobState>,
        cursor,
        limit,
        WORKER_ALIVE_S,
    )
    .fetch_all(pool)
    .await
}

pub async fn dataset_exists(
    connection: &mut PgConnection,
    project: &ProjectId,
    dataset: &DatasetId,
) -> sqlx::Result<bool> {
    sqlx::query_scalar!(
        r#"
        -- db::jobs::dataset_exists
        select exists (select 1 from datasets where project_id = $1 and id = $2) as "exists!"
        "#,
        project.as_str(),
        dataset.as_str(),
    )
    .fetch_one(connection)
    .await
}

/// Where the logs of a job's attempts lie, in order.
pub async fn find_log_keys(pool: &PgPool, project: &ProjectId, id: &JobId) -> sqlx::Result<Vec<String>> {
    sqlx::query_scalar!(
        r#"
        -- db::jobs::find_log_keys
        select a.log_key as "log_key!"
        from jobs j
        join attempts a on a.work_item_id = j.work_item_id
        where j.project_id = $1 and j.id = $2 and a.log_key is not null
        order by a.lease_epoch
        "#,
        project.as_str(),
        id.as_str(),
    )
    .fetch_all(pool)
    .await
}
