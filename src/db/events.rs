//! What happened to a job, in order.

use chrono::{DateTime, Utc};
use serde_json::Value;
use sqlx::{PgConnection, PgPool};

use crate::domain::{
    ids::{JobId, ProjectId},
    job::EventType,
};

#[derive(Debug)]
pub struct EventRow {
    pub seq: i64,
    pub at: DateTime<Utc>,
    pub kind: EventType,
    pub lease_epoch: Option<i64>,
    pub message: String,
    pub data: Value,
}

/// An event to enter in a job's log.
#[derive(Debug, Clone)]
pub struct NewEvent<'a> {
    pub kind: EventType,
    /// `None` for what a user did.
    pub lease_epoch: Option<i64>,
    pub message: &'a str,
    /// A JSON object.
    pub data: Value,
}

/// Enters an event and returns its number. To be called within the transaction that makes it true.
pub async fn append(connection: &mut PgConnection, job: &JobId, event: NewEvent<'_>) -> sqlx::Result<i64> {
    let seq = sqlx::query_scalar!(
        r#"
        -- db::events::append
        with numbered as (
            update jobs set last_event_seq = last_event_seq + 1 where id = $1 returning id, last_event_seq
        )
        insert into job_events (job_id, seq, type, lease_epoch, message, data)
        select id, last_event_seq, $2, $3, $4, $5 from numbered
        returning seq
        "#,
        job.as_str(),
        event.kind as EventType,
        event.lease_epoch,
        event.message,
        event.data,
    )
    .fetch_one(&mut *connection)
    .await?;
    sqlx::query!("-- db::events::append: notify\nselect pg_notify('job_changed', $1)", job.as_str())
        .execute(connection)
        .await?;
    Ok(seq)
}

/// The events of a job with a number above `after`, in order.
pub async fn list(
    pool: &PgPool,
    project: &ProjectId,
    job: &JobId,
    after: i64,
    limit: i64,
) -> sqlx::Result<Vec<EventRow>> {
    sqlx::query_as!(
        EventRow,
        r#"
        -- db::events::list
        select e.seq, e.at, e.type as "kind: EventType", e.lease_epoch, e.message, e.data
        from job_events e
        join jobs j on j.id = e.job_id
        where j.project_id = $1 and j.id = $2 and e.seq > $3
        order by e.seq
        limit $4
        "#,
        project.as_str(),
        job.as_str(),
        after,
        limit,
    )
    .fetch_all(pool)
    .await
}
