//! What the owner of a job asks of it: cancel, pause, resume, retry. At once while nobody works on it, else through the
//! heartbeat of its worker.

use serde_json::json;
use sqlx::{PgConnection, PgPool};

use super::{
    events::{self, NewEvent},
    jobs,
    leases::Desired,
};
use crate::domain::{
    ids::{JobId, ProjectId, WorkItemId},
    job::{EventType, JobState},
};

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum JobCommand {
    /// Leaves a checkpoint of what is trained so far.
    Cancel,
    /// At once, whatever is lost by it.
    Kill,
    Pause,
    Resume,
    /// Goes on from the last state of a job that is over.
    Retry,
}

/// What came of a command.
#[derive(Debug, PartialEq, Eq)]
pub enum Answer {
    /// It is done, was done before, or will be as soon as the worker has heard of it.
    Accepted,
    NotFound,
    /// It makes no sense for a job in this state.
    Refused(JobState),
    /// What the job began with was deleted, and it has no state to go on from.
    NothingToGoOnFrom,
    /// The tokens that it trains on could not be made, and will not be.
    TokensFailed,
}

/// What a command does to a job.
struct Effect {
    job: JobState,
    /// The new state of the work item, where nobody holds it.
    item: Option<&'static str>,
    /// What the holder is told.
    desired: Desired,
    event: EventType,
    message: &'static str,
}

/// Gives a command to a job of this project. Giving it twice is no mistake.
pub async fn give(pool: &PgPool, project: &ProjectId, id: &JobId, command: JobCommand) -> sqlx::Result<Answer> {
    let mut tx = pool.begin().await?;
    let have_tokens_failed = have_tokens_failed(&mut tx, project, id).await?;
    let Some((work_item, state)) = lock(&mut tx, project, id).await? else { return Ok(Answer::NotFound) };
    let effect = match effect(command, state) {
        Ok(Some(effect)) => effect,
        Ok(None) => return Ok(Answer::Accepted),
        Err(NoSense) => return Ok(Answer::Refused(state)),
    };
    if effect.item == Some("queued") && have_tokens_failed {
        return Ok(Answer::TokensFailed);
    }
    apply(&mut tx, id, &work_item, &effect).await?;
    if command == JobCommand::Retry {
        if !has_a_beginning(&mut tx, id).await? {
            return Ok(Answer::NothingToGoOnFrom);
        }
        start_over(&mut tx, id, &work_item).await?;
    }
    tx.commit().await?;
    Ok(Answer::Accepted)
}

struct NoSense;

/// `None` where there is nothing left to do.
fn effect(command: JobCommand, state: JobState) -> Result<Option<Effect>, NoSense> {
    use JobState::{Cancelled, Cancelling, Failed, Paused, Pausing, Queued, Running, Starting, Succeeded};
    let idle = |job, item, event, message| Effect { job, item: Some(item), desired: Desired::Run, event, message };
    let told = |job, desired, event, message| Effect { job, item: None, desired, event, message };
    let effect = match (command, state) {
        (JobCommand::Cancel | JobCommand::Kill, Queued | Paused) => {
            idle(Cancelled, "done", EventType::Cancelled, "cancelled while no worker was busy with it")
        }
        (JobCommand::Cancel, Starting | Running | Pausing) => {
            told(Cancelling, Desired::Cancel, EventType::CancelRequested, "cancellation requested")
        }
        (JobCommand::Kill, Starting | Running | Pausing | Cancelling) => {
            told(Cancelling, Desired::Kill, EventType::CancelRequested, "cancellation requested, at once")
        }
        (JobCommand::Cancel, Cancelling) | (JobCommand::Cancel | JobCommand::Kill, Cancelled) => return Ok(None),

        (JobCommand::Pause, Queued) => idle(Paused, "paused", EventType::Paused, "paused while queued"),
        (JobCommand::Pause, Starting | Running) => {
            told(Pausing, Desired::Pause, EventType::Pausing, "the worker is asked to save a state and stop")
        }
        (JobCommand::Pause, Pausing | Paused) => return Ok(None),

        (JobCommand::Resume, Paused) => idle(Queued, "queued", EventType::Resumed, "queued again"),
        (JobCommand::Resume, Queued | Starting | Running) => return Ok(None),

        (JobCommand::Retry, Failed | Cancelled) => {
            idle(Queued, "queued", EventType::Retried, "queued again, to go on from its last state")
        }

        (JobCommand::Cancel | JobCommand::Kill, Succeeded | Failed)
        | (JobCommand::Pause, Cancelling | Succeeded | Failed | Cancelled)
        | (JobCommand::Resume, Pausing | Cancelling | Succeeded | Failed | Cancelled)
        | (JobCommand::Retry, Queued | Starting | Running | Pausing | Paused | Cancelling | Succeeded) => {
            return Err(NoSense);
        }
    };
    Ok(Some(effect))
}

/// The work item and the state of a job. Both stay as they are until the transaction ends; the work item comes first, as
/// in every transaction that locks both: a claim starts there. Neither lock is one that the foreign key of an event or of
/// a node waits for: whoever commits a node has such a key before it changes the work item.
async fn lock(
    connection: &mut PgConnection,
    project: &ProjectId,
    id: &JobId,
) -> sqlx::Result<Option<(WorkItemId, JobState)>> {
    let work_item = sqlx::query_scalar!(
        r#"
        -- db::job_commands::lock: work item
        select w.id as "id: WorkItemId"
        from work_items w
        where w.id = (select work_item_id from jobs where project_id = $1 and id = $2)
        for no key update
        "#,
        project.as_str(),
        id.as_str(),
    )
    .fetch_optional(&mut *connection)
    .await?;
    let Some(work_item) = work_item else { return Ok(None) };
    let state = sqlx::query_scalar!(
        r#"
        -- db::job_commands::lock: job
        select state as "state: JobState" from jobs where id = $1 for no key update
        "#,
        id.as_str(),
    )
    .fetch_one(connection)
    .await?;
    Ok(Some((work_item, state)))
}

async fn apply(connection: &mut PgConnection, id: &JobId, work_item: &WorkItemId, effect: &Effect) -> sqlx::Result<()> {
    sqlx::query!(
        r#"
        -- db::job_commands::apply
        with told as (
            update work_items
            set state = coalesce($3, state), desired = $4,
                eligible_at = case when $3 = 'queued' then now() else eligible_at end
            where id = $2
        )
        update jobs set state = $5, finished_at = case when $6 then now() end where id = $1
        "#,
        id.as_str(),
        work_item.as_str(),
        effect.item,
        effect.desired as Desired,
        effect.job as JobState,
        effect.job.is_final(),
    )
    .execute(&mut *connection)
    .await?;
    let event = NewEvent { kind: effect.event, lease_epoch: None, message: effect.message, data: json!({}) };
    events::append(connection, id, event).await?;
    Ok(())
}

/// Whether the tokens of a job have failed for good. They stay as they are until the transaction ends: whoever ends a
/// tokenization holds it before the jobs that wait for it.
async fn have_tokens_failed(connection: &mut PgConnection, project: &ProjectId, id: &JobId) -> sqlx::Result<bool> {
    let state = sqlx::query_scalar!(
        r#"
        -- db::job_commands::have_tokens_failed
        select state from tokenizations
        where id = (select tokenization_id from jobs where project_id = $1 and id = $2)
        for share
        "#,
        project.as_str(),
        id.as_str(),
    )
    .fetch_optional(connection)
    .await?;
    Ok(state.is_some_and(|state| state == "failed"))
}

/// Whether there is a state to go on from, or what the job began with.
async fn has_a_beginning(connection: &mut PgConnection, id: &JobId) -> sqlx::Result<bool> {
    // Nobody deletes it from here on without seeing the job.
    sqlx::query!(
        r#"
        -- db::job_commands::has_a_beginning: hold
        select id from nodes where id = (select init_node_id from jobs where id = $1) for key share
        "#,
        id.as_str(),
    )
    .fetch_optional(&mut *connection)
    .await?;
    sqlx::query_scalar!(
        r#"
        -- db::job_commands::has_a_beginning
        select init.deleted_at is null
            or exists (select 1 from nodes where job_id = j.id and kind = 'state' and not superseded) as "has!"
        from jobs j
        left join nodes init on init.id = j.init_node_id
        where j.id = $1
        "#,
        id.as_str(),
    )
    .fetch_one(connection)
    .await
}

/// Budgets and the clock of the maximum runtime begin anew. Without a state to go on from so does everything: the trainer
/// chooses again, perhaps on a worker with more memory.
async fn start_over(connection: &mut PgConnection, id: &JobId, work_item: &WorkItemId) -> sqlx::Result<()> {
    sqlx::query!(
        r#"
        -- db::job_commands::start_over
        with refilled as (
            update work_items set infra_failures = 0, user_failures = 0 where id = $2
        )
        update jobs j set failure = null, retried_at = now(),
            choices = case when exists (
                select 1 from nodes where job_id = j.id and kind = 'state' and not superseded
            ) then choices end
        where id = $1
        "#,
        id.as_str(),
        work_item.as_str(),
    )
    .execute(&mut *connection)
    .await?;
    jobs::note_needs(connection, id, None).await
}
