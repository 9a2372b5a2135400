//! What a worker writes about a tokenization. Every function is fenced by the lease of its attempt.

use serde_json::json;
use sqlx::{PgConnection, PgPool};

use super::{
    events::{self, NewEvent},
    leases::{self, Lease, Next, Outcome, WriteError},
    nodes::StoredFile,
};
use crate::domain::{
    ids::{JobId, NodeId, TokenizationId},
    job::{EventType, Failure, FailureKind},
};

/// A tokenization to make.
#[derive(Debug)]
pub struct Ingestion {
    pub tokenization: TokenizationId,
    /// The checkpoint whose tokenizer is used; one is learned from the text without.
    pub tokenizer_checkpoint: Option<NodeId>,
    pub vocab_size: i64,
    pub validation_frac: f64,
    /// `text` or `jsonl`.
    pub format: String,
    pub object_key: String,
    pub size_bytes: i64,
    pub sha256: String,
}

/// What came of it.
#[derive(Debug, Clone, Copy)]
pub struct Counts {
    pub tokenizer_vocab_size: i64,
    pub train_tokens: i64,
    pub valid_tokens: i64,
    pub train_documents: i64,
    pub valid_documents: i64,
}

/// Begins an attempt on the tokenization of a claimed item.
pub async fn begin_attempt(connection: &mut PgConnection, lease: &Lease) -> Result<Ingestion, WriteError> {
    leases::fence(connection, lease).await?;
    let ingestion = sqlx::query_as!(
        Ingestion,
        r#"
        -- db::ingestion::begin_attempt
        update tokenizations t
        set state = 'running'
        from datasets d
        where t.work_item_id = $1 and d.id = t.dataset_id
        returning t.id as "tokenization: TokenizationId", t.tokenizer_node_id as "tokenizer_checkpoint: NodeId",
            t.vocab_size, t.validation_frac, d.format as "format!", d.object_key as "object_key!", d.size_bytes as "size_bytes!", d.sha256 as "sha256!"
        "#,
        lease.work_item.as_str(),
    )
    .fetch_one(connection)
    .await?;
    Ok(ingestion)
}

/// Ends an attempt with the tokens stored: jobs that wait for them may start.
pub async fn complete(
    pool: &PgPool,
    lease: &Lease,
    tokenization: &TokenizationId,
    counts: Counts,
    files: &[StoredFile],
) -> Result<(), WriteError> {
    let mut tx = pool.begin().await?;
    leases::end_attempt(&mut tx, lease, Outcome::Succeeded, Next::Done).await?;
    sqlx::query!(
        r#"
        -- db::ingestion::complete
        update tokenizations
        set state = 'ready', tokenizer_vocab_size = $2, train_tokens = $3, valid_tokens = $4,
            train_documents = $5, valid_documents = $6
        where id = $1
        "#,
        tokenization.as_str(),
        counts.tokenizer_vocab_size,
        counts.train_tokens,
        counts.valid_tokens,
        counts.train_documents,
        counts.valid_documents,
    )
    .execute(&mut *tx)
    .await?;
    for file in files {
        sqlx::query!(
            r#"
            -- db::ingestion::complete: files
            insert into tokenization_files (tokenization_id, name, object_key, size_bytes, sha256)
            values ($1, $2, $3, $4, $5)
            "#,
            tokenization.as_str(),
            file.name,
            file.object_key,
            file.size_bytes,
            file.sha256,
        )
        .execute(&mut *tx)
        .await?;
    }
    tx.commit().await?;
    Ok(())
}

/// The tokenization of a lease's work item, if it has one.
pub(super) async fn find(connection: &mut PgConnection, lease: &Lease) -> sqlx::Result<Option<TokenizationId>> {
    sqlx::query_scalar!(
        r#"
        -- db::ingestion::find
        select id as "id: TokenizationId" from tokenizations where work_item_id = $1
        "#,
        lease.work_item.as_str(),
    )
    .fetch_optional(connection)
    .await
}

/// Ends an attempt that failed: for another try if that can help, else for good, and with it every
/// queued job that waits for these tokens.
pub async fn fail(
    pool: &PgPool,
    lease: &Lease,
    tokenization: &TokenizationId,
    failure: &Failure,
) -> Result<(), WriteError> {
    let mut tx = pool.begin().await?;
    settle(&mut tx, lease, tokenization, failure, Outcome::Failed).await?;
    tx.commit().await?;
    Ok(())
}

pub(super) async fn settle(
    connection: &mut PgConnection,
    lease: &Lease,
    tokenization: &TokenizationId,
    failure: &Failure,
    outcome: Outcome,
) -> Result<(), WriteError> {
    leases::fence(connection, lease).await?;
    let failures = leases::count_infra_failure(connection, &lease.work_item).await?;
    if failure.retryable && failures <= leases::MAX_INFRA_FAILURES {
        return requeue(connection, lease, tokenization, outcome, failures as f64).await;
    }
    leases::end_attempt(connection, lease, outcome, Next::Done).await?;
    sqlx::query!(
        "-- db::ingestion::settle\nupdate tokenizations set state = 'failed', failure = $2 where id = $1",
        tokenization.as_str(),
        json!(failure),
    )
    .execute(&mut *connection)
    .await?;
    fail_waiting_jobs(connection, tokenization, failure).await?;
    Ok(())
}

/// Gives the work back unharmed, because the worker has to go.
pub async fn release(pool: &PgPool, lease: &Lease, tokenization: &TokenizationId) -> Result<(), WriteError> {
    let mut tx = pool.begin().await?;
    requeue(&mut tx, lease, tokenization, Outcome::Released, 0.0).await?;
    tx.commit().await?;
    Ok(())
}

async fn requeue(
    connection: &mut PgConnection,
    lease: &Lease,
    tokenization: &TokenizationId,
    outcome: Outcome,
    delay_s: f64,
) -> Result<(), WriteError> {
    leases::end_attempt(connection, lease, outcome, Next::QueuedAfter { delay_s }).await?;
    sqlx::query!(
        "-- db::ingestion::requeue\nupdate tokenizations set state = 'queued' where id = $1",
        tokenization.as_str(),
    )
    .execute(connection)
    .await?;
    Ok(())
}

async fn fail_waiting_jobs(
    connection: &mut PgConnection,
    tokenization: &TokenizationId,
    cause: &Failure,
) -> sqlx::Result<()> {
    let message = format!("the tokenization {tokenization} failed: {}", cause.message);
    let failure = Failure::new(FailureKind::Data, &message);
    let jobs = sqlx::query_scalar!(
        r#"
        -- db::ingestion::fail_waiting_jobs
        with waiting as (
            -- The work items come first, as in every transaction that locks both.
            select w.id
            from work_items w
            join jobs j on j.work_item_id = w.id
            where j.tokenization_id = $1 and j.state = 'queued'
            order by w.id
            for no key update of w
        ), failed as (
            update jobs set state = 'failed', failure = $2, finished_at = now()
            where work_item_id in (select id from waiting) and state = 'queued'
            returning id, work_item_id
        ), done as (
            update work_items set state = 'done' where id in (select work_item_id from failed)
        )
        select id as "id: JobId" from failed
        "#,
        tokenization.as_str(),
        json!(failure),
    )
    .fetch_all(&mut *connection)
    .await?;
    for job in jobs {
        let data = json!({"failure": failure});
        let event = NewEvent { kind: EventType::Failed, lease_epoch: None, message: &message, data };
        events::append(&mut *connection, &job, event).await?;
    }
    Ok(())
}

/// Where the files of a tokenization lie.
pub async fn files(pool: &PgPool, tokenization: &TokenizationId) -> sqlx::Result<Vec<StoredFile>> {
    sqlx::query_as!(
        StoredFile,
        r#"
        -- db::ingestion::files
        select name, object_key, size_bytes, sha256 from tokenization_files where tokenization_id = $1 order by name
        "#,
        tokenization.as_str(),
    )
    .fetch_all(pool)
    .await
}
