//! The processes that take work.

use sqlx::{PgConnection, PgPool};

use crate::domain::{
    ids::WorkerId,
    offer::Offer,
    spec::{Device, ResourcesSpec},
};

/// A worker that was not heard of for this long takes no work, as far as anybody can tell.
pub(super) const WORKER_ALIVE_S: f64 = 60.0;

/// Enters a worker that has just started.
pub async fn register(pool: &PgPool, id: &WorkerId, name: &str, offer: &Offer) -> sqlx::Result<()> {
    sqlx::query!(
        r#"
        -- db::workers::register
        insert into workers (id, name, version, device, num_gpus, memory_bytes, bf16_speedup)
        values ($1, $2, $3, $4, $5, $6, $7)
        "#,
        id.as_str(),
        name,
        env!("CARGO_PKG_VERSION"),
        offer.device as Device,
        offer.num_gpus,
        offer.memory_bytes,
        offer.bf16_speedup,
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
