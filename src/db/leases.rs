//! Claims, leases and fences: who may write what a work item produces.
//!
//! The lease epoch rises with every claim and never falls. Whoever writes for a work item names the
//! epoch of its claim, and the write happens only while a lease with that epoch exists: a worker that
//! was taken for dead can change nothing any more. Time is the database's `now()` alone.

use serde::{Deserialize, Serialize};
use sqlx::{PgConnection, PgPool};

use super::workers::WORKER_ALIVE_S;
use crate::domain::{
    contract,
    ids::{WorkItemId, WorkerId},
    spec::Device,
};

/// The right to work on an item, and to write its results, until somebody else claims it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Lease {
    pub work_item: WorkItemId,
    pub lease_epoch: i64,
}

/// Why a write of a worker did not happen.
#[derive(Debug, thiserror::Error)]
pub enum WriteError {
    #[error("the lease was lost: the work item was claimed again, requeued or finished")]
    LeaseLost,
    #[error(transparent)]
    Database(#[from] sqlx::Error),
}

/// What kind of work an item is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, sqlx::Type)]
#[sqlx(type_name = "text", rename_all = "snake_case")]
pub enum WorkKind {
    Train,
    Ingest,
    Verify,
    Materialize,
}

impl WorkKind {
    /// As the database has it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Train => "train",
            Self::Ingest => "ingest",
            Self::Verify => "verify",
            Self::Materialize => "materialize",
        }
    }
}

/// What the holder of a lease is told to do with it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, sqlx::Type)]
#[serde(rename_all = "snake_case")]
#[sqlx(type_name = "text", rename_all = "snake_case")]
pub enum Desired {
    Run,
    Pause,
    /// Leave a checkpoint, and end.
    Cancel,
    /// End at once.
    Kill,
    /// Hand the work back.
    Drain,
}

/// How an attempt ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, sqlx::Type)]
#[sqlx(type_name = "text", rename_all = "snake_case")]
pub enum Outcome {
    Succeeded,
    Failed,
    Released,
    Paused,
    Cancelled,
    LeaseExpired,
}

/// What becomes of a work item when an attempt on it has ended.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Next {
    Done,
    /// Nobody takes it until it is queued again.
    Paused,
    QueuedAfter {
        delay_s: f64,
    },
}

/// For how long an item is left to workers that compute the same bits as the one that began it.
const SAME_NUMERICS_FIRST_S: f64 = 5.0;

/// Takes the next item that fits, by priority and then age, and gives the worker a lease on it. A worker that computes
/// other bits than the one that began an item leaves it for a while to those that compute the same.
pub async fn claim(
    connection: &mut PgConnection,
    worker: &WorkerId,
    kind: WorkKind,
    device: Device,
    num_gpus: i64,
    lease_s: f64,
) -> sqlx::Result<Option<Lease>> {
    let row = sqlx::query!(
        r#"
        -- db::leases::claim
        with me as (
            -- Held, so that whoever sets it to drain comes before this claim, or sees it.
            select id, memory_bytes, coalesce(numerics, '{}') as numerics
            from workers where id = $1 and not is_draining
            for share
        ), next as (
            select w.id
            from work_items w, me
            where w.state = 'queued'
                and w.kind = $2
                and w.eligible_at <= now()
                and w.format_version <= $6
                -- Every worker has a CPU; without one of its GPUs num_gpus means nothing.
                and (w.device in ('auto', 'cpu') or (w.device = $3 and w.num_gpus <= $4))
                -- Nothing is known of the memory beside a GPU.
                and coalesce(
                    case when $3 = 'cpu' then w.cpu_bytes when w.device <> 'cpu' then w.gpu_bytes end
                        <= me.memory_bytes,
                    true
                )
                and (
                    w.kind <> 'train'
                    or exists (
                        select 1
                        from jobs j
                        join tokenizations t on t.id = j.tokenization_id
                        where j.work_item_id = w.id and t.state = 'ready'
                            and (
                                j.numerics is null
                                or j.numerics @> me.numerics
                                or w.eligible_at < now() - make_interval(secs => $7)
                                or not exists (
                                    select 1 from workers other
                                    where other.last_seen_at > now() - make_interval(secs => $8)
                                        and not other.is_draining and j.numerics @> other.numerics
                                )
                            )
                    )
                )
            order by w.priority desc, w.created_at, w.id
            limit 1
            for no key update of w skip locked
        ), taken as (
            update work_items w
            set state = 'leased', lease_epoch = w.lease_epoch + 1, desired = 'run'
            from next
            where w.id = next.id
            returning w.id, w.lease_epoch
        ), leased as (
            insert into leases (work_item_id, lease_epoch, worker_id, expires_at)
            select id, lease_epoch, $1, now() + make_interval(secs => $5) from taken
        ), attempted as (
            insert into attempts (work_item_id, lease_epoch, worker_id)
            select id, lease_epoch, $1 from taken
        )
        select id as "id: WorkItemId", lease_epoch from taken
        "#,
        worker.as_str(),
        kind as WorkKind,
        device as Device,
        num_gpus,
        lease_s,
        contract::FORMAT_VERSION,
        SAME_NUMERICS_FIRST_S,
        WORKER_ALIVE_S,
    )
    .fetch_optional(connection)
    .await?;
    Ok(row.map(|row| Lease { work_item: row.id, lease_epoch: row.lease_epoch }))
}

/// Seconds until the next queued item of a kind may be claimed that may not be claimed yet, if there is one.
pub async fn next_eligible_s(pool: &PgPool, kind: WorkKind) -> sqlx::Result<Option<f64>> {
    sqlx::query_scalar!(
        r#"
        -- db::leases::next_eligible_s
        select extract(epoch from min(eligible_at) - now())::double precision
        from work_items
        where state = 'queued' and kind = $1 and eligible_at > now()
        "#,
        kind as WorkKind,
    )
    .fetch_one(pool)
    .await
}

/// Renews a lease and returns what its holder is to do. An expired lease that nobody has taken yet is
/// as good as a valid one: an outage of the database harms no healthy run.
pub async fn heartbeat(pool: &PgPool, lease: &Lease, lease_s: f64) -> Result<Desired, WriteError> {
    sqlx::query_scalar!(
        r#"
        -- db::leases::heartbeat
        with renewed as (
            update leases
            set expires_at = now() + make_interval(secs => $3)
            where work_item_id = $1 and lease_epoch = $2
            returning work_item_id
        )
        select w.desired as "desired: Desired" from work_items w join renewed on renewed.work_item_id = w.id
        "#,
        lease.work_item.as_str(),
        lease.lease_epoch,
        lease_s,
    )
    .fetch_optional(pool)
    .await?
    .ok_or(WriteError::LeaseLost)
}

/// Makes the surrounding transaction a write of this lease: it fails if the lease is lost, and
/// nobody can take the item until the transaction ends.
pub async fn fence(connection: &mut PgConnection, lease: &Lease) -> Result<(), WriteError> {
    sqlx::query_scalar!(
        "-- db::leases::fence\nselect lease_epoch from leases where work_item_id = $1 and lease_epoch = $2 for no key update",
        lease.work_item.as_str(),
        lease.lease_epoch,
    )
    .fetch_optional(connection)
    .await?
    .map(|_| ())
    .ok_or(WriteError::LeaseLost)
}

/// Gives up a lease at the end of an attempt.
pub async fn end_attempt(
    connection: &mut PgConnection,
    lease: &Lease,
    outcome: Outcome,
    next: Next,
) -> Result<(), WriteError> {
    fence(connection, lease).await?;
    let (state, delay_s) = match next {
        Next::Done => ("done", 0.0),
        Next::Paused => ("paused", 0.0),
        Next::QueuedAfter { delay_s } => ("queued", delay_s),
    };
    sqlx::query!(
        r#"
        -- db::leases::end_attempt
        with given_up as (
            delete from leases where work_item_id = $1
        ), ended as (
            update attempts set ended_at = now(), outcome = $3 where work_item_id = $1 and lease_epoch = $2
        )
        update work_items
        set state = $4, eligible_at = now() + make_interval(secs => $5), desired = 'run'
        where id = $1
        "#,
        lease.work_item.as_str(),
        lease.lease_epoch,
        outcome as Outcome,
        state,
        delay_s,
    )
    .execute(connection)
    .await?;
    Ok(())
}

/// Picks one lease that ran out and is not to be left alone, and keeps others from picking it until the transaction ends. None within `grace_s` of
/// the database's start: while it was away nobody could renew a lease.
pub async fn find_expired(
    connection: &mut PgConnection,
    grace_s: f64,
    left_alone: &[String],
) -> sqlx::Result<Option<Lease>> {
    let row = sqlx::query!(
        r#"
        -- db::leases::find_expired
        select work_item_id as "work_item: WorkItemId", lease_epoch
        from leases
        where expires_at < now() and pg_postmaster_start_time() < now() - make_interval(secs => $1)
            and work_item_id <> all($2)
        limit 1
        for no key update skip locked
        "#,
        grace_s,
        left_alone,
    )
    .fetch_optional(connection)
    .await?;
    Ok(row.map(|row| Lease { work_item: row.work_item, lease_epoch: row.lease_epoch }))
}

/// Lets every lease run out at once. Only for a private database whose single worker is known to be gone.
pub async fn expire_all(pool: &PgPool) -> sqlx::Result<u64> {
    let result = sqlx::query!("-- db::leases::expire_all\nupdate leases set expires_at = now() - interval '1 second'")
        .execute(pool)
        .await?;
    Ok(result.rows_affected())
}

/// Attempts at what is not a job that may fail through no fault of the user; a job's spec says it for itself.
pub const MAX_INFRA_FAILURES: i64 = 5;

/// Counts one more failure that was not the user's doing, and returns how many there were since the
/// last progress.
pub async fn count_infra_failure(connection: &mut PgConnection, work_item: &WorkItemId) -> sqlx::Result<i64> {
    sqlx::query_scalar!(
        r#"
        -- db::leases::count_infra_failure
        update work_items set infra_failures = infra_failures + 1 where id = $1 returning infra_failures
        "#,
        work_item.as_str(),
    )
    .fetch_one(connection)
    .await
}

/// Counts one more failure of the work itself, and returns how many there were.
pub async fn count_user_failure(connection: &mut PgConnection, work_item: &WorkItemId) -> sqlx::Result<i64> {
    sqlx::query_scalar!(
        r#"
        -- db::leases::count_user_failure
        update work_items set user_failures = user_failures + 1 where id = $1 returning user_failures
        "#,
        work_item.as_str(),
    )
    .fetch_one(connection)
    .await
}
