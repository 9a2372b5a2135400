//! Datasets: raw text, kept as it was uploaded.
//!
//! `empty -> uploading -> ready | failed`. Each upload draws a token; only the upload whose token the
//! row carries may end it, so that of two uploads the later one wins and no object is mixed up.

use chrono::{DateTime, Utc};
use serde::{Deserialize, Serialize};
use sqlx::PgPool;
use utoipa::ToSchema;

use crate::domain::ids::{DatasetId, ProjectId};

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema, sqlx::Type)]
#[serde(rename_all = "snake_case")]
#[sqlx(type_name = "text", rename_all = "snake_case")]
pub enum DatasetState {
    Empty,
    Uploading,
    Ready,
    /// The last upload failed; another one may follow.
    Failed,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema, sqlx::Type)]
#[serde(rename_all = "snake_case")]
#[sqlx(type_name = "text", rename_all = "snake_case")]
pub enum DatasetFormat {
    /// One document.
    Text,
    /// A document per line: an object with a string `text`.
    Jsonl,
}

#[derive(Debug)]
pub struct DatasetRow {
    pub id: DatasetId,
    pub name: String,
    pub state: DatasetState,
    pub format: Option<DatasetFormat>,
    pub object_key: Option<String>,
    pub size_bytes: Option<i64>,
    pub sha256: Option<String>,
    pub num_documents: Option<i64>,
    pub error: Option<String>,
    pub created_at: DateTime<Utc>,
}

/// Content that is stored.
#[derive(Debug, Clone)]
pub struct StoredContent {
    pub object_key: String,
    pub size_bytes: i64,
    pub sha256: String,
    pub num_documents: i64,
}

pub async fn create(pool: &PgPool, project: &ProjectId, name: &str) -> sqlx::Result<DatasetRow> {
    let id = DatasetId::new();
    sqlx::query_as!(
        DatasetRow,
        r#"
        -- db::datasets::create
        insert into datasets (id, project_id, name) values ($1, $2, $3)
        returning id as "id: DatasetId", name, state as "state: DatasetState", format as "format: DatasetFormat",
            object_key, size_bytes, sha256, num_documents, error, created_at
        "#,
        id.as_str(),
        project.as_str(),
        name,
    )
    .fetch_one(pool)
    .await
}

pub async fn find(pool: &PgPool, project: &ProjectId, id: &DatasetId) -> sqlx::Result<Option<DatasetRow>> {
    sqlx::query_as!(
        DatasetRow,
        r#"
        -- db::datasets::find
        select id as "id: DatasetId", name, state as "state: DatasetState", format as "format: DatasetFormat",
            object_key, size_bytes, sha256, num_documents, error, created_at
        from datasets
        where project_id = $1 and id = $2
        "#,
        project.as_str(),
        id.as_str(),
    )
    .fetch_optional(pool)
    .await
}

/// The newest datasets first, from before `cursor`.
pub async fn list(
    pool: &PgPool,
    project: &ProjectId,
    cursor: Option<&str>,
    limit: i64,
) -> sqlx::Result<Vec<DatasetRow>> {
    sqlx::query_as!(
        DatasetRow,
        r#"
        -- db::datasets::list
        select id as "id: DatasetId", name, state as "state: DatasetState", format as "format: DatasetFormat",
            object_key, size_bytes, sha256, num_documents, error, created_at
        from datasets
        where project_id = $1 and ($2::text is null or id < $2)
        order by id desc
        limit $3
        "#,
        project.as_str(),
        cursor,
        limit,
    )
    .fetch_all(pool)
    .await
}

/// Makes an upload the one that may fill the dataset; false if it is filled already or not there.
pub async fn begin_upload(
    pool: &PgPool,
    project: &ProjectId,
    id: &DatasetId,
    format: DatasetFormat,
    token: &str,
) -> sqlx::Result<bool> {
    let result = sqlx::query!(
        r#"
        -- db::datasets::begin_upload
        update datasets
        set state = 'uploading', format = $3, upload_token = $4, error = null
        where project_id = $1 and id = $2 and state <> 'ready'
        "#,
        project.as_str(),
        id.as_str(),
        format as DatasetFormat,
        token,
    )
    .execute(pool)
    .await?;
    Ok(result.rows_affected() == 1)
}

/// Ends an upload well; `None` if a later upload took over or the dataset was deleted meanwhile.
pub async fn finish_upload(
    pool: &PgPool,
    project: &ProjectId,
    id: &DatasetId,
    token: &str,
    content: &StoredContent,
) -> sqlx::Result<Option<DatasetRow>> {
    sqlx::query_as!(
        DatasetRow,
        r#"
        -- db::datasets::finish_upload
        update datasets
        set state = 'ready', object_key = $4, size_bytes = $5, sha256 = $6, num_documents = $7
        where project_id = $1 and id = $2 and upload_token = $3 and state = 'uploading'
        returning id as "id: DatasetId", name, state as "state: DatasetState", format as "format: DatasetFormat",
            object_key, size_bytes, sha256, num_documents, error, created_at
        "#,
        project.as_str(),
        id.as_str(),
        token,
        content.object_key,
        content.size_bytes,
        content.sha256,
        content.num_documents,
    )
    .fetch_optional(pool)
    .await
}

/// Ends an upload badly, unless it was finished or a later one took over. Returns the state in which
/// this upload left the dataset; `None` if a later one has it.
pub async fn fail_upload(
    pool: &PgPool,
    project: &ProjectId,
    id: &DatasetId,
    token: &str,
    error: &str,
) -> sqlx::Result<Option<DatasetState>> {
    sqlx::query_scalar!(
        r#"
        -- db::datasets::fail_upload
        update datasets
        set state = case when state = 'uploading' then 'failed' else state end,
            error = case when state = 'uploading' then $4 else error end
        where project_id = $1 and id = $2 and upload_token = $3
        returning state as "state: DatasetState"
        "#,
        project.as_str(),
        id.as_str(),
        token,
        error,
    )
    .fetch_optional(pool)
    .await
}

/// Ends every upload that was in progress. Only for a private database whose single server was killed.
pub async fn fail_all_uploads(pool: &PgPool) -> sqlx::Result<()> {
    sqlx::query!(
        r#"
        -- db::datasets::fail_all_uploads
        update datasets
        set state = 'failed', error = 'the server was killed during the upload; upload the content again'
        where state = 'uploading'
        "#
    )
    .execute(pool)
    .await?;
    Ok(())
}

/// What came of a deletion.
#[derive(Debug)]
pub enum Deletion {
    /// The objects that nothing refers to any more.
    Done {
        object_keys: Vec<String>,
    },
    NotFound,
    /// The identifiers of what uses it.
    InUse {
        users: Vec<String>,
    },
    /// A worker is busy with it.
    Running,
}

/// Deletes a dataset that no tokenization and no job uses.
pub async fn delete(pool: &PgPool, project: &ProjectId, id: &DatasetId) -> sqlx::Result<Deletion> {
    let mut tx = pool.begin().await?;
    let found = sqlx::query_scalar!(
        r#"
        -- db::datasets::delete: lock
        select object_key from datasets where project_id = $1 and id = $2 for update
        "#,
        project.as_str(),
        id.as_str(),
    )
    .fetch_optional(&mut *tx)
    .await?;
    let Some(object_key) = found else { return Ok(Deletion::NotFound) };

    let users = sqlx::query_scalar!(
        r#"
        -- db::datasets::delete: users
        select id as "id!" from tokenizations where dataset_id = $1
        union all
        select id from jobs where dataset_id = $1
        limit 20
        "#,
        id.as_str(),
    )
    .fetch_all(&mut *tx)
    .await?;
    if !users.is_empty() {
        return Ok(Deletion::InUse { users });
    }

    sqlx::query!("-- db::datasets::delete\ndelete from datasets where id = $1", id.as_str()).execute(&mut *tx).await?;
    tx.commit().await?;
    Ok(Deletion::Done { object_keys: object_key.into_iter().collect() })
}
