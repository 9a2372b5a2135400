//! Tokenizations: a dataset turned into tokens by one tokenizer. The work itself is in `ingestion`.

use chrono::{DateTime, Utc};
use serde::{Deserialize, Serialize};
use sqlx::{PgConnection, PgPool, types::Json};
use utoipa::ToSchema;

use super::datasets::{DatasetState, Deletion};
use crate::domain::{
    data::TOKENIZER_FILE,
    ids::{DatasetId, NodeId, ProjectId, TokenizationId, WorkItemId},
    job::Failure,
    spec::DataFacts,
};

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema, sqlx::Type)]
#[serde(rename_all = "snake_case")]
#[sqlx(type_name = "text", rename_all = "snake_case")]
pub enum TokenizationState {
    Queued,
    Running,
    Ready,
    Failed,
}

#[derive(Debug)]
pub struct TokenizationRow {
    pub id: TokenizationId,
    pub dataset: DatasetId,
    pub state: TokenizationState,
    pub tokenizer_checkpoint: Option<NodeId>,
    pub vocab_size: i64,
    pub validation_frac: f64,
    pub tokenizer_vocab_size: Option<i64>,
    pub train_tokens: Option<i64>,
    pub valid_tokens: Option<i64>,
    pub train_documents: Option<i64>,
    pub valid_documents: Option<i64>,
    pub failure: Option<Json<Failure>>,
    pub created_at: DateTime<Utc>,
}

#[derive(Debug)]
pub struct TokenizationFileRow {
    pub tokenization: TokenizationId,
    pub name: String,
    pub size_bytes: i64,
    pub sha256: String,
}

/// What is asked for.
#[derive(Debug)]
pub struct NewTokenization {
    /// The checkpoint whose tokenizer is used; one is learned from the text without.
    pub tokenizer_checkpoint: Option<NodeId>,
    /// Of the tokenizer that is learned, or of the checkpoint's model.
    pub vocab_size: i64,
    pub validation_frac: f64,
}

/// What came of a request to tokenize.
#[derive(Debug)]
pub enum Creation {
    Done(TokenizationId),
    NoSuchDataset,
    DatasetNotReady(DatasetState),
    /// The checkpoint whose tokenizer is asked for was deleted.
    CheckpointDeleted,
}

/// Queues the tokenization of a dataset that is ready.
pub async fn create(
    pool: &PgPool,
    project: &ProjectId,
    dataset: &DatasetId,
    request: &NewTokenization,
) -> sqlx::Result<Creation> {
    let mut tx = pool.begin().await?;
    let state = sqlx::query_scalar!(
        r#"
        -- db::tokenizations::create: dataset
        select state as "state: DatasetState" from datasets where project_id = $1 and id = $2 for key share
        "#,
        project.as_str(),
        dataset.as_str(),
    )
    .fetch_optional(&mut *tx)
    .await?;
    match state {
        None => return Ok(Creation::NoSuchDataset),
        Some(DatasetState::Ready) => {}
        Some(state) => return Ok(Creation::DatasetNotReady(state)),
    }
    if let Some(checkpoint) = &request.tokenizer_checkpoint
        && !hold_node(&mut tx, project, checkpoint).await?
    {
        return Ok(Creation::CheckpointDeleted);
    }

    let (id, work_item) = (TokenizationId::new(), WorkItemId::new());
    sqlx::query!(
        r#"
        -- db::tokenizations::create
        with queued as (
            insert into work_items (id, project_id, kind) values ($1, $2, 'ingest') returning id
        )
        insert into tokenizations
            (id, project_id, dataset_id, work_item_id, tokenizer_node_id, vocab_size, validation_frac)
        select $3, $2, $4, queued.id, $5, $6, $7 from queued
        "#,
        work_item.as_str(),
        project.as_str(),
        id.as_str(),
        dataset.as_str(),
        request.tokenizer_checkpoint.as_ref().map(NodeId::as_str),
        request.vocab_size,
        request.validation_frac,
    )
    .execute(&mut *tx)
    .await?;
    tx.commit().await?;
    Ok(Creation::Done(id))
}

/// Whether the node is there. Until the transaction ends it cannot be deleted.
async fn hold_node(connection: &mut PgConnection, project: &ProjectId, node: &NodeId) -> sqlx::Result<bool> {
    let held = sqlx::query_scalar!(
        r#"
        -- db::tokenizations::hold_node
        select id from nodes where project_id = $1 and id = $2 and deleted_at is null for key share
        "#,
        project.as_str(),
        node.as_str(),
    )
    .fetch_optional(connection)
    .await?;
    Ok(held.is_some())
}

pub async fn find(pool: &PgPool, project: &ProjectId, id: &TokenizationId) -> sqlx::Result<Option<TokenizationRow>> {
    sqlx::query_as!(
        TokenizationRow,
        r#"
        -- db::tokenizations::find
        select id as "id: TokenizationId", dataset_id as "dataset: DatasetId", state as "state: TokenizationState",
            tokenizer_node_id as "tokenizer_checkpoint: NodeId", vocab_size, validation_frac, tokenizer_vocab_size,
            train_tokens, valid_tokens, train_documents, valid_documents, failure as "failure: Json<Failure>", created_at
        from tokenizations
        where project_id = $1 and id = $2
        "#,
        project.as_str(),
        id.as_str(),
    )
    .fetch_optional(pool)
    .await
}

/// The newest tokenizations first, of one dataset or all, from before `cursor`.
pub async fn list(
    pool: &PgPool,
    project: &ProjectId,
    dataset: Option<&str>,
    cursor: Option<&str>,
    limit: i64,
) -> sqlx::Result<Vec<TokenizationRow>> {
    sqlx::query_as!(
        TokenizationRow,
        r#"
        -- db::tokenizations::list
        select id as "id: TokenizationId", dataset_id as "dataset: DatasetId", state as "state: TokenizationState",
            tokenizer_node_id as "tokenizer_checkpoint: NodeId", vocab_size, validation_frac, tokenizer_vocab_size,
            train_tokens, valid_tokens, train_documents, valid_documents, failure as "failure: Json<Failure>", created_at
        from tokenizations
        where project_id = $1 and ($2::text is null or dataset_id = $2) and ($3::text is null or id < $3)
        order by id desc
        limit $4
        "#,
        project.as_str(),
        dataset,
        cursor,
        limit,
    )
    .fetch_all(pool)
    .await
}

/// The files of all of these tokenizations.
pub async fn list_files(
    pool: &PgPool,
    project: &ProjectId,
    tokenizations: &[String],
) -> sqlx::Result<Vec<TokenizationFileRow>> {
    sqlx::query_as!(
        TokenizationFileRow,
        r#"
        -- db::tokenizations::list_files
        select f.tokenization_id as "tokenization: TokenizationId", f.name, f.size_bytes, f.sha256
        from tokenization_files f
        join tokenizations t on t.id = f.tokenization_id
        where t.project_id = $1 and t.id = any($2)
        order by f.tokenization_id, f.name
        "#,
        project.as_str(),
        tokenizations,
    )
    .fetch_all(pool)
    .await
}

/// What a job that names this data trains on: the named tokenization, else the newest of the dataset
/// that has not failed. Until the transaction ends it can be neither deleted nor declared failed.
pub async fn find_for_job(
    connection: &mut PgConnection,
    project: &ProjectId,
    dataset: &DatasetId,
    tokenization: Option<&TokenizationId>,
) -> sqlx::Result<Option<DataFacts>> {
    sqlx::query_as!(
        DataFacts,
        r#"
        -- db::tokenizations::find_for_job
        select t.dataset_id as "dataset: DatasetId", t.id as "tokenization: TokenizationId", t.vocab_size,
            -- Until it is ready: a token for each byte and one for the end of each document, at the most.
            coalesce(t.train_tokens, d.size_bytes + d.num_documents) as "max_train_tokens!",
            coalesce(t.valid_tokens, d.size_bytes + d.num_documents) as "max_valid_tokens!"
        from tokenizations t
        join datasets d on d.id = t.dataset_id
        where t.project_id = $1 and t.dataset_id = $2 and t.state <> 'failed' and ($3::text is null or t.id = $3)
        order by t.id desc
        limit 1
        for share of t
        "#,
        project.as_str(),
        dataset.as_str(),
        tokenization.map(TokenizationId::as_str),
    )
    .fetch_optional(connection)
    .await
}

/// The SHA-256 of the `tokenizer.json` that the tokens are made with. `None` while it is still to be learned.
pub async fn find_tokenizer_sha256(
    connection: &mut PgConnection,
    project: &ProjectId,
    tokenization: &TokenizationId,
) -> sqlx::Result<Option<String>> {
    sqlx::query_scalar!(
        r#"
        -- db::tokenizations::find_tokenizer_sha256
        select coalesce(made.sha256, given.sha256)
        from tokenizations t
        left join tokenization_files made on made.tokenization_id = t.id and made.name = $3
        left join node_files given on given.node_id = t.tokenizer_node_id and given.name = $3
        where t.project_id = $1 and t.id = $2
        "#,
        project.as_str(),
        tokenization.as_str(),
        TOKENIZER_FILE,
    )
    .fetch_optional(connection)
    .await
    .map(Option::flatten)
}

/// Deletes a tokenization that no job uses and no worker is busy with.
pub async fn delete(pool: &PgPool, project: &ProjectId, id: &TokenizationId) -> sqlx::Result<Deletion> {
    let mut tx = pool.begin().await?;
    // The work item comes first, as in every transaction that locks both: a claim starts there.
    let work_item = sqlx::query!(
        r#"
        -- db::tokenizations::delete: lock
        select w.id, w.state
        from work_items w
        where w.id = (select work_item_id from tokenizations where project_id = $1 and id = $2)
        for update
        "#,
        project.as_str(),
        id.as_str(),
    )
    .fetch_optional(&mut *tx)
    .await?;
    let Some(work_item) = work_item else { return Ok(Deletion::NotFound) };
    if work_item.state == "leased" {
        return Ok(Deletion::Running);
    }

    sqlx::query!(
        "-- db::tokenizations::delete: row\nselect id from tokenizations where id = $1 for update",
        id.as_str()
    )
    .fetch_optional(&mut *tx)
    .await?;
    let users = sqlx::query_scalar!(
        "-- db::tokenizations::delete: users\nselect id from jobs where tokenization_id = $1 limit 20",
        id.as_str()
    )
    .fetch_all(&mut *tx)
    .await?;
    if !users.is_empty() {
        return Ok(Deletion::InUse { users });
    }

    let object_keys = sqlx::query_scalar!(
        "-- db::tokenizations::delete: files\nselect object_key from tokenization_files where tokenization_id = $1",
        id.as_str()
    )
    .fetch_all(&mut *tx)
    .await?;
    sqlx::query!("-- db::tokenizations::delete\ndelete from tokenizations where id = $1", id.as_str())
        .execute(&mut *tx)
        .await?;
    sqlx::query!("-- db::tokenizations::delete: work\ndelete from work_items where id = $1", work_item.id)
        .execute(&mut *tx)
        .await?;
    tx.commit().await?;
    Ok(Deletion::Done { object_keys })
}
