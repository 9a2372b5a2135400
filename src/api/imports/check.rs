//! Looks at the stored files of an import: small ones as a whole, of weights the headers alone.

use bytes::Bytes;
use tokio::sync::Semaphore;

use crate::{
    api::error::{ApiError, ApiResult},
    db::nodes::StoredFile,
    domain::{
        checkpoint::{Excerpt, check_config, max_bytes},
        problem::Problem,
        spec::ModelSpec,
    },
    storage::{Key, Store},
};

/// Checks at a time: each may hold a large tokenizer in memory, and keep a core busy for seconds.
static CHECKS: Semaphore = Semaphore::const_new(2);

/// The model of a checkpoint that can be continued from; else every problem with its files.
pub async fn check(store: &Store, files: &[StoredFile]) -> ApiResult<ModelSpec> {
    let permit = CHECKS.acquire().await.map_err(|_| ApiError::Stopping)?;
    let excerpt = read(store, files).await?;
    // The permit goes along: a blocking task runs on when its import has ended.
    let checked = tokio::task::spawn_blocking(move || {
        let _permit = permit;
        excerpt.check()
    });
    checked
        .await
        .map_err(|error| ApiError::Internal(format!("the check's task ended: {error}")))?
        .map_err(ApiError::InvalidCheckpoint)
}

/// What is wrong with a stored `config.json`.
pub async fn problems_of_config(store: &Store, file: &StoredFile) -> ApiResult<Vec<Problem>> {
    Ok(check_config(&read_whole(store, file).await?).1)
}

async fn read(store: &Store, files: &[StoredFile]) -> ApiResult<Excerpt> {
    let mut excerpt = Excerpt::default();
    for file in files {
        if max_bytes(&file.name).is_some() {
            excerpt.add_small_file(&file.name, read_whole(store, file).await?);
            continue;
        }
        let (key, file_bytes) = (Key::from(file.object_key.clone()), file.size_bytes.unsigned_abs());
        let prefix = store.get_range_bytes(&key, 0..file_bytes.min(8)).await?;
        if let Some(range) = excerpt.header_range(&file.name, &prefix, file_bytes) {
            excerpt.add_header(&file.name, store.get_range_bytes(&key, range).await?, file_bytes);
        }
    }
    Ok(excerpt)
}

async fn read_whole(store: &Store, file: &StoredFile) -> ApiResult<Bytes> {
    Ok(store.get_bytes(&Key::from(file.object_key.clone()), max_bytes(&file.name).unwrap_or(0)).await?)
}
