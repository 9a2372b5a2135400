//! Projects and their API keys. A key is stored as its SHA-256 alone.

use sha2::{Digest, Sha256};
use sqlx::{PgConnection, PgPool};
use uuid::Uuid;

use crate::domain::ids::{ApiKeyId, ProjectId};

/// What a key may do.
#[derive(Debug)]
pub struct KeyGrant {
    pub project: ProjectId,
    /// `read`, `write`.
    pub scopes: Vec<String>,
}

/// Says what a key may do; `None` if there is no such key or it was revoked.
pub async fn find_grant(pool: &PgPool, key: &str) -> sqlx::Result<Option<KeyGrant>> {
    sqlx::query_as!(
        KeyGrant,
        r#"
        -- db::keys::find_grant
        select project_id as "project: ProjectId", scopes
        from api_keys
        where key_sha256 = $1 and revoked_at is null
        "#,
        sha256(key),
    )
    .fetch_optional(pool)
    .await
}

/// Makes the project `default` and a key for everything in it, if the database has no key yet; of
/// servers that start together one does. The key is returned this once, and known to nobody after.
pub async fn ensure_first_key(pool: &PgPool) -> sqlx::Result<Option<String>> {
    let mut tx = pool.begin().await?;
    sqlx::query!("-- db::keys::ensure_first_key: lock\nlock table api_keys in share row exclusive mode")
        .execute(&mut *tx)
        .await?;
    let exists = sqlx::query_scalar!(
        r#"
        -- db::keys::ensure_first_key: look
        select exists (select 1 from api_keys) as "exists!"
        "#
    )
    .fetch_one(&mut *tx)
    .await?;
    if exists {
        return Ok(None);
    }

    let key = insert_key(&mut tx, "first key").await?;
    tx.commit().await?;
    Ok(Some(key))
}

/// Makes one more key for everything in the project `default`. It is returned this once.
pub async fn create_key(pool: &PgPool, name: &str) -> sqlx::Result<String> {
    let mut connection = pool.acquire().await?;
    insert_key(&mut connection, name).await
}

async fn insert_key(connection: &mut PgConnection, name: &str) -> sqlx::Result<String> {
    let (project, id) = (ProjectId::new(), ApiKeyId::new());
    let key = format!("rl_{}{}", Uuid::new_v4().simple(), Uuid::new_v4().simple());
    sqlx::query!(
        r#"
        -- db::keys::insert_key
        with named as (
            insert into projects (id, name) values ($1, 'default')
            on conflict (name) do update set name = excluded.name
            returning id
        )
        insert into api_keys (id, project_id, name, key_sha256, scopes)
        select $2, id, $4, $3, array['read', 'write'] from named
        "#,
        project.as_str(),
        id.as_str(),
        sha256(&key),
        name,
    )
    .execute(connection)
    .await?;
    Ok(key)
}

fn sha256(key: &str) -> Vec<u8> {
    Sha256::digest(key).to_vec()
}
