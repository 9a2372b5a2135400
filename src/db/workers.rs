//! The processes that take work.

use chrono::{DateTime, Utc};
use serde_json::json;
use sqlx::{PgConnection, PgPool};

use crate::domain::{
    contract::Numerics,
    ids::WorkerId,
    offer::Offer,
    spec::{Device, ResourcesSpec},
};

/// A worker that was not heard of for this long takes no work, as far as anybody can tell.
pub(super) const WORKER_ALIVE_S: f64 = 60.0;

/// Enters a worker that has just started.
pub async fn register(
    pool: &PgPool,
    id: &WorkerId,
    name: &str,
    offer: &Offer,
    numerics: &Numerics,
) -> sqlx::Result<()> {
    sqlx::query!(
        r#"
        -- db::workers::register
        insert into workers (id, name, version, device, num_gpus, memory_bytes, bf16_speedup, numerics)
        values ($1, $2, $3, $4, $5, $6, $7, $8)
        "#,
        id.as_str(),
        name,
        env!("CARGO_PKG_VERSION"),
        offer.device as Device,
        offer.num_gpus,
        offer.memory_bytes,
        offer.bf16_speedup,
        json!(numerics),
    )
    .execute(pool)
    .await?;
    Ok(())
}

/// What the living workers have that may claim a job with these wishes.
pub async fn offers(connection: &mut PgConnection, wanted: &ResourcesSpec) -> sqlx::Result<Vec<Offer>> {
    sqlx::query_as!(
        Offer,
        r#"
        -- db::workers::offers
        select device as "device: Device", num_gpus, memory_bytes, bf16_speedup
        from workers
        where last_seen_at > now() - make_interval(secs => $3)
            and ($1 in ('auto', 'cpu') or (device = $1 and num_gpus >= $2))
        "#,
        wanted.device as Device,
        wanted.num_gpus,
        WORKER_ALIVE_S,
    )
    .fetch_all(connection)
    .await
}

/// Says that a worker is alive.
pub async fn mark_seen(pool: &PgPool, id: &WorkerId) -> sqlx::Result<()> {
    sqlx::query!("-- db::workers::mark_seen\nupdate workers set last_seen_at = now() where id = $1", id.as_str())
        .execute(pool)
        .await?;
    Ok(())
}

/// Says that a worker has gone: it is no longer seen.
pub async fn mark_gone(pool: &PgPool, id: &WorkerId) -> sqlx::Result<()> {
    sqlx::query!("-- db::workers::mark_gone\nupdate workers set last_seen_at = '-infinity' where id = $1", id.as_str())
        .execute(pool)
        .await?;
    Ok(())
}

/// A worker as its operator sees it.
#[derive(Debug)]
pub struct WorkerRow {
    pub id: WorkerId,
    pub name: String,
    pub version: String,
    pub device: Device,
    pub num_gpus: i64,
    pub is_draining: bool,
    pub is_alive: bool,
    pub started_at: DateTime<Utc>,
    /// Work items that it holds.
    pub num_leases: i64,
}

/// The workers that are alive or hold something, the newest first.
pub async fn list(pool: &PgPool) -> sqlx::Result<Vec<WorkerRow>> {
    sqlx::query_as!(
        WorkerRow,
        r#"
        -- db::workers::list
        select w.id as "id: WorkerId", w.name, w.version, w.device as "device: Device", w.num_gpus, w.is_draining,
            w.last_seen_at > now() - make_interval(secs => $1) as "is_alive!", w.started_at,
            count(l.work_item_id) as "num_leases!"
        from workers w
        left join leases l on l.worker_id = w.id
        group by w.id
        having w.last_seen_at > now() - make_interval(secs => $1) or count(l.work_item_id) > 0
        order by w.id desc
        "#,
        WORKER_ALIVE_S,
    )
    .fetch_all(pool)
    .await
}

/// Sets for every living worker of this name or identifier whether it is given more work; with `hands_back` it also
/// gives back the jobs that it trains, with their states saved. Returns how many workers there were.
pub async fn set_draining(pool: &PgPool, worker: &str, is_draining: bool, hands_back: bool) -> sqlx::Result<usize> {
    let mut tx = pool.begin().await?;
    let meant = sqlx::query_scalar!(
        r#"
        -- db::workers::set_draining
        update workers set is_draining = $2
        where (id = $1 or name = $1) and last_seen_at > now() - make_interval(secs => $3)
        returning id
        "#,
        worker,
        is_draining,
        WORKER_ALIVE_S,
    )
    .fetch_all(&mut *tx)
    .await?;
    if hands_back {
        // A statement of its own: it sees the claim that the first one waited for.
        sqlx::query!(
            r#"
            -- db::workers::set_draining: hand back
            update work_items set desired = 'drain'
            where desired = 'run' and kind = 'train'
                and id in (select work_item_id from leases where worker_id = any($1))
            "#,
            &meant,
        )
        .execute(&mut *tx)
        .await?;
    }
    tx.commit().await?;
    Ok(meant.len())
}
