//! The processes that take work.

use sqlx::PgPool;

use crate::domain::{ids::WorkerId, spec::Device};

/// Enters a worker that has just started.
pub async fn register(pool: &PgPool, id: &WorkerId, name: &str, device: Device, num_gpus: i64) -> sqlx::Result<()> {
    sqlx::query!(
        r#"
        -- db::workers::register
        insert into workers (id, name, version, device, num_gpus) values ($1, $2, $3, $4, $5)
        "#,
        id.as_str(),
        name,
        env!("CARGO_PKG_VERSION"),
        device as Device,
        num_gpus,
    )
    .execute(pool)
    .await?;
    Ok(())
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
