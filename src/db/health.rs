//! Whether the database answers.

use sqlx::PgPool;

pub async fn ping(pool: &PgPool) -> sqlx::Result<()> {
    sqlx::query!("-- db::health::ping\nselect 1 as one").fetch_one(pool).await?;
    Ok(())
}
