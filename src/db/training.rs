//! What a worker writes about a training job. Every function is fenced by the lease of its attempt.

use serde_json::json;
use sqlx::{PgConnection, PgPool};

use super::{
    events::{self, NewEvent},
    jobs,
    leases::{self, Lease, Next, Outcome, WriteError},
};
use crate::domain::{
    contract::{Fingerprint, StepReport},
    ids::{JobId, NodeId, ProjectId, TokenizationId},
    job::{EventType, Failure, FailureKind, JobState},
    spec::{Choices, TrainSpec},
};

/// A step, the name of what was measured after it, and its value.
pub type Metric = (i64, &'static str, f64);

/// A job whose attempt has begun.
#[derive(Debug)]
pub struct Training {
    pub job: JobId,
    pub project: ProjectId,
    pub tokenization: TokenizationId,
    pub spec: TrainSpec,
    /// What the first attempt chose where the spec says `auto`; none before it did.
    pub choices: Option<Choices>,
    /// Seconds that earlier attempts ran.
    pub runtime_s: f64,
    /// The state that this attempt goes on from.
    pub resume: Option<ResumePoint>,
}

#[derive(Debug)]
pub struct ResumePoint {
    pub node: NodeId,
    pub step: i64,
    /// Restarts done before the state.
    pub restart: i64,
}

impl Training {
    /// The spec with what an earlier attempt chose in the place of every `auto`.
    pub fn settled_spec(&self) -> TrainSpec {
        self.choices.as_ref().map_or_else(|| self.spec.clone(), |choices| self.spec.with_choices(choices))
    }
}

/// Begins an attempt on the job of a claimed item: names the state that it goes on from, and takes
/// out of the lineage what an earlier attempt did after that state.
pub async fn begin_attempt(connection: &mut PgConnection, lease: &Lease) -> Result<Training, WriteError> {
    leases::fence(connection, lease).await?;
    let job = sqlx::query!(
        r#"
        -- db::training::begin_attempt: job
        update jobs
        set state = case when state = 'cancelling' then state else 'starting' end
        where work_item_id = $1
        returning id as "id: JobId", project_id as "project: ProjectId", tokenization_id as "tokenization: TokenizationId",
            spec as "spec: sqlx::types::Json<TrainSpec>", choices as "choices: sqlx::types::Json<Choices>",
            (select coalesce(sum(extract(epoch from ended_at - started_at)), 0)::double precision
             from attempts
             where work_item_id = $1 and started_at >= coalesce(retried_at, '-infinity')) as "runtime_s!"
        "#,
        lease.work_item.as_str(),
    )
    .fetch_one(&mut *connection)
    .await?;
    // In the order of everybody who locks several nodes, and before the statement that decides what is superseded.
    sqlx::query!(
        "-- db::training::begin_attempt: lock\nselect id from nodes where job_id = $1 order by id for no key update",
        job.id.as_str()
    )
    .fetch_all(&mut *connection)
    .await?;
    let resume = sqlx::query_as!(
        ResumePoint,
        r#"
        -- db::training::begin_attempt: state
        select id as "node: NodeId", step, restart from nodes
        where job_id = $1 and kind = 'state' and not superseded
        order by step desc limit 1
        "#,
        job.id.as_str(),
    )
    .fetch_optional(&mut *connection)
    .await?;
    let start_step = resume.as_ref().map_or(0, |resume| resume.step);
    sqlx::query!(
        r#"
        -- db::training::begin_attempt: supersede
        with started as (
            update attempts set start_step = $3 where work_item_id = $4 and lease_epoch = $5
        )
        update nodes set superseded = true
        where job_id = $1 and not superseded and (step > $3 or not $2)
        "#,
        job.id.as_str(),
        resume.is_some(),
        start_step,
        lease.work_item.as_str(),
        lease.lease_epoch,
    )
    .execute(&mut *connection)
    .await?;
    let message = match &resume {
        Some(resume) => format!("claimed; goes on from the state after step {}", resume.step),
        None => "claimed; starts from the beginning".to_string(),
    };
    let event = NewEvent {
        kind: EventType::Claimed,
        lease_epoch: Some(lease.lease_epoch),
        message: &message,
        data: json!({"start_step": start_step}),
    };
    events::append(connection, &job.id, event).await?;
    Ok(Training {
        job: job.id,
        project: job.project,
        tokenization: job.tokenization,
        spec: job.spec.0,
        choices: job.choices.map(|choices| choices.0),
        runtime_s: job.runtime_s,
        resume,
    })
}

/// The trainer is ready and begins to step. What the first one chose is kept for those that go on.
pub async fn mark_running(
    pool: &PgPool,
    lease: &Lease,
    job: &JobId,
    fingerprint: &Fingerprint,
    choices: &Choices,
) -> Result<(), WriteError> {
    let mut tx = pool.begin().await?;
    leases::fence(&mut tx, lease).await?;
    // The work item comes before the job.
    jobs::note_needs(&mut tx, job, Some(choices)).await?;
    sqlx::query!(
        r#"
        -- db::training::mark_running
        update jobs
        set state = case when state = 'starting' then 'running' else state end,
            started_at = coalesce(started_at, now()),
            numerics = $2,
            choices = coalesce(choices, $3)
        where id = $1
        "#,
        job.as_str(),
        json!(fingerprint),
        json!(choices),
    )
    .execute(&mut *tx)
    .await?;
    let event = NewEvent {
        kind: EventType::Started,
        lease_epoch: Some(lease.lease_epoch),
        message: &format!("training on {}", fingerprint.numerics.device),
        data: json!({"fingerprint": fingerprint, "choices": choices}),
    };
    events::append(&mut tx, job, event).await?;
    tx.commit().await?;
    Ok(())
}

/// The state that an attempt goes on from was written where the same work gives other bits.
pub async fn mark_inexact(
    pool: &PgPool,
    lease: &Lease,
    job: &JobId,
    before: &Fingerprint,
    now: &Fingerprint,
) -> Result<(), WriteError> {
    let mut tx = pool.begin().await?;
    leases::fence(&mut tx, lease).await?;
    sqlx::query!("-- db::training::mark_inexact\nupdate jobs set is_exact = false where id = $1", job.as_str())
        .execute(&mut *tx)
        .await?;
    let event = NewEvent {
        kind: EventType::NumericsChanged,
        lease_epoch: Some(lease.lease_epoch),
        message: "the numerics changed: the result is no longer to the bit that of an uninterrupted run",
        data: json!({"before": before, "now": now}),
    };
    events::append(&mut tx, job, event).await?;
    tx.commit().await?;
    Ok(())
}

/// Enters the reports of several steps at once; a step that is there already is left as it is.
pub async fn append_steps(pool: &PgPool, lease: &Lease, job: &JobId, steps: &[StepReport]) -> Result<(), WriteError> {
    let Some(last) = steps.last() else { return Ok(()) };
    let mut metrics = Vec::with_capacity(4 * steps.len());
    for step in steps {
        metrics.extend([
            (step.step, "loss", step.loss),
            (step.step, "grad_norm", step.grad_norm),
            (step.step, "learning_rate", step.learning_rate),
            (step.step, "tokens_per_s", step.tokens_per_s),
        ]);
    }
    let mut tx = pool.begin().await?;
    leases::fence(&mut tx, lease).await?;
    insert_metrics(&mut tx, lease, job, &metrics).await?;
    sqlx::query!(
        r#"
        -- db::training::append_steps: progress
        insert into job_progress as p
            (job_id, lease_epoch, step, loss, learning_rate, tokens_per_s, num_tokens, num_restarts)
        values ($1, $2, $3, $4, $5, $6, $7, $8)
        on conflict (job_id) do update
        set lease_epoch = excluded.lease_epoch, step = excluded.step, loss = excluded.loss,
            learning_rate = excluded.learning_rate, tokens_per_s = excluded.tokens_per_s,
            num_tokens = excluded.num_tokens, num_restarts = excluded.num_restarts, updated_at = now()
        "#,
        job.as_str(),
        lease.lease_epoch,
        last.step,
        last.loss,
        last.learning_rate,
        last.tokens_per_s,
        last.num_tokens,
        last.num_restarts,
    )
    .execute(&mut *tx)
    .await?;
    tx.commit().await?;
    Ok(())
}

/// Enters an event, and the metrics that belong to it.
pub async fn append_event(
    pool: &PgPool,
    lease: &Lease,
    job: &JobId,
    event: NewEvent<'_>,
    metrics: &[Metric],
) -> Result<(), WriteError> {
    let mut tx = pool.begin().await?;
    leases::fence(&mut tx, lease).await?;
    insert_metrics(&mut tx, lease, job, metrics).await?;
    events::append(&mut tx, job, event).await?;
    tx.commit().await?;
    Ok(())
}

/// Enters metrics; what is there already is left as it is.
pub(super) async fn insert_metrics(
    connection: &mut PgConnection,
    lease: &Lease,
    job: &JobId,
    metrics: &[Metric],
) -> sqlx::Result<()> {
    let steps: Vec<i64> = metrics.iter().map(|(step, _, _)| *step).collect();
    let names: Vec<String> = metrics.iter().map(|(_, name, _)| (*name).to_owned()).collect();
    let values: Vec<f64> = metrics.iter().map(|(_, _, value)| *value).collect();
    sqlx::query!(
        r#"
        -- db::training::insert_metrics
        insert into job_metrics (job_id, lease_epoch, step, name, value)
        select $1, $2, step, name, value
        from unnest($3::bigint[], $4::text[], $5::double precision[]) as m (step, name, value)
        on conflict do nothing
        "#,
        job.as_str(),
        lease.lease_epoch,
        &steps,
        &names,
        &values,
    )
    .execute(connection)
    .await?;
    Ok(())
}

/// Names the object that holds the attempt's log.
pub async fn set_log(pool: &PgPool, lease: &Lease, key: &str, size_bytes: i64) -> Result<(), WriteError> {
    let mut tx = pool.begin().await?;
    leases::fence(&mut tx, lease).await?;
    sqlx::query!(
        r#"
        -- db::training::set_log
        update attempts set log_key = $3, log_bytes = $4 where work_item_id = $1 and lease_epoch = $2
        "#,
        lease.work_item.as_str(),
        lease.lease_epoch,
        key,
        size_bytes,
    )
    .execute(&mut *tx)
    .await?;
    tx.commit().await?;
    Ok(())
}

/// How a training attempt ended.
#[derive(Debug, Clone)]
pub enum TrainingEnd {
    Succeeded,
    Cancelled,
    /// As its owner asked, with its state saved.
    Paused,
    /// The worker gives the job back unharmed, because it has to go.
    Released,
    Failed(Failure),
}

/// Ends an attempt and moves the job to where that leaves it.
pub async fn finish(pool: &PgPool, lease: &Lease, end: &TrainingEnd) -> Result<(), WriteError> {
    let outcome = match end {
        TrainingEnd::Succeeded => Outcome::Succeeded,
        TrainingEnd::Cancelled => Outcome::Cancelled,
        TrainingEnd::Paused => Outcome::Paused,
        TrainingEnd::Released => Outcome::Released,
        TrainingEnd::Failed(_) => Outcome::Failed,
    };
    let mut tx = pool.begin().await?;
    settle(&mut tx, lease, end, outcome).await?;
    tx.commit().await?;
    Ok(())
}

pub(super) async fn settle(
    connection: &mut PgConnection,
    lease: &Lease,
    end: &TrainingEnd,
    outcome: Outcome,
) -> Result<(), WriteError> {
    leases::fence(connection, lease).await?;
    let Some(job) = find_job(connection, lease).await? else { return Err(sqlx::Error::RowNotFound.into()) };
    let (state, kind, message, next) = match (end, job.state) {
        (TrainingEnd::Succeeded, _) => {
            (JobState::Succeeded, EventType::Succeeded, "all steps done".to_string(), Next::Done)
        }
        // Nobody waits for another attempt of a job that is being cancelled.
        (TrainingEnd::Cancelled, _) | (_, JobState::Cancelling) => {
            (JobState::Cancelled, EventType::Cancelled, "cancelled".to_string(), Next::Done)
        }
        (TrainingEnd::Failed(failure), _) => match retry(connection, lease, &job, failure).await? {
            Some(_) if job.state == JobState::Pausing => paused(),
            Some(delay_s) => {
                let message = format!("{}; another attempt in {delay_s} s", failure.message);
                (JobState::Queued, EventType::Requeued, message, Next::QueuedAfter { delay_s })
            }
            None => (JobState::Failed, EventType::Failed, failure.message.clone(), Next::Done),
        },
        (TrainingEnd::Paused, _) | (TrainingEnd::Released, JobState::Pausing) => paused(),
        (TrainingEnd::Released, _) => {
            let message = "the worker is going; the job waits for another".to_string();
            (JobState::Queued, EventType::Requeued, message, Next::QueuedAfter { delay_s: 0.0 })
        }
    };
    let failure = match end {
        TrainingEnd::Failed(failure) => Some(json!(failure)),
        _ => None,
    };
    leases::end_attempt(connection, lease, outcome, next).await?;
    sqlx::query!(
        r#"
        -- db::training::settle
        update jobs
        set state = $2, failure = $3, finished_at = case when $4 then now() end
        where id = $1
        "#,
        job.id.as_str(),
        state as JobState,
        failure.clone().filter(|_| state == JobState::Failed),
        state.is_final(),
    )
    .execute(&mut *connection)
    .await?;
    let data = failure.map_or_else(|| json!({}), |failure| json!({"failure": failure}));
    let event = NewEvent { kind, lease_epoch: Some(lease.lease_epoch), message: &message, data };
    events::append(connection, &job.id, event).await?;
    Ok(())
}

fn paused() -> (JobState, EventType, String, Next) {
    (JobState::Paused, EventType::Paused, "paused".to_string(), Next::Paused)
}

/// After how many seconds the job is tried again; `None` if its budget for such failures is spent.
async fn retry(
    connection: &mut PgConnection,
    lease: &Lease,
    job: &SettledJob,
    failure: &Failure,
) -> sqlx::Result<Option<f64>> {
    // The time of the job is used up, however often it is tried.
    if failure.kind == FailureKind::Timeout {
        return Ok(None);
    }
    let (failures, budget) = match failure.retryable {
        true => (leases::count_infra_failure(connection, &lease.work_item).await?, job.infra_retries),
        false => (leases::count_user_failure(connection, &lease.work_item).await?, job.user_retries),
    };
    let delay_s = 2f64.powi(failures.min(MAX_DOUBLINGS) as i32 - 1) - 1.0;
    Ok((failures <= budget).then_some(delay_s))
}

/// Of the delay between attempts, which so ends at a quarter of an hour.
const MAX_DOUBLINGS: i64 = 11;

/// What of a job decides how it goes on.
struct SettledJob {
    id: JobId,
    state: JobState,
    infra_retries: i64,
    user_retries: i64,
}

/// The job of a lease's work item, if it has one. Locks both, the work item first, as everybody does.
async fn find_job(connection: &mut PgConnection, lease: &Lease) -> sqlx::Result<Option<SettledJob>> {
    sqlx::query!(
        "-- db::training::find_job: lock\nselect id from work_items where id = $1 for no key update",
        lease.work_item.as_str()
    )
    .fetch_optional(&mut *connection)
    .await?;
    sqlx::query_as!(
        SettledJob,
        r#"
        -- db::training::find_job
        select id as "id: JobId", state as "state: JobState",
            coalesce((spec #>> '{retries,infrastructure}')::bigint, 0) as "infra_retries!",
            coalesce((spec #>> '{retries,user}')::bigint, 0) as "user_retries!"
        from jobs where work_item_id = $1 for no key update
        "#,
        lease.work_item.as_str(),
    )
    .fetch_optional(connection)
    .await
}
