//! One upload of a dataset's content: from the request's body to the store, in bounded memory.
//!
//! It runs as a task of its own, because a handler is dropped when its client goes away, and a broken
//! upload must still leave the dataset `failed` and nothing in the store.

use std::{io, panic::AssertUnwindSafe};

use axum::body::{Body, Bytes};
use futures_util::{FutureExt, StreamExt, stream};
use tokio::sync::mpsc;
use tracing::Instrument;
use uuid::Uuid;

use super::{
    AppState,
    body::IncomingBody,
    content::ContentCheck,
    error::{ApiError, ApiResult},
};
use crate::{
    db::datasets::{self, DatasetFormat, DatasetRow, DatasetState, StoredContent},
    domain::ids::{DatasetId, ProjectId},
    storage::Key,
};

/// Chunks of a body between the client and the store.
const CHUNKS_IN_FLIGHT: usize = 4;

#[derive(Debug)]
pub struct Upload {
    pub token: String,
    project: ProjectId,
    dataset: DatasetId,
    format: DatasetFormat,
    /// What the client said it would send.
    expected_bytes: Option<i64>,
}

impl Upload {
    pub fn new(project: ProjectId, dataset: DatasetId, format: DatasetFormat, expected_bytes: Option<i64>) -> Self {
        Self { token: Uuid::now_v7().simple().to_string(), project, dataset, format, expected_bytes }
    }

    fn key(&self) -> Key {
        Key::dataset(&self.dataset, &self.token)
    }
}

/// Carries an upload out that was begun in the database, to its end there.
pub async fn run(state: AppState, upload: Upload, body: Body) -> ApiResult<DatasetRow> {
    let task = tokio::spawn(receive(state, upload, body).in_current_span());
    task.await.map_err(|error| ApiError::Internal(format!("the upload's task ended: {error}")))?
}

async fn receive(state: AppState, upload: Upload, body: Body) -> ApiResult<DatasetRow> {
    // Even a defect of ours must not leave the dataset `uploading`.
    let stored = AssertUnwindSafe(store(&state, &upload, body)).catch_unwind().await;
    let error = match stored.unwrap_or_else(|_| Err(ApiError::Internal("the upload panicked".into()))) {
        Ok(content) => {
            let finished =
                datasets::finish_upload(&state.pool, &upload.project, &upload.dataset, &upload.token, &content).await;
            match finished {
                Ok(Some(dataset)) => {
                    tracing::info!(dataset.id = %upload.dataset, size_bytes = content.size_bytes, "dataset ready");
                    return Ok(dataset);
                }
                Ok(None) => ApiError::UploadSuperseded,
                Err(error) => error.into(),
            }
        }
        Err(error) => error,
    };

    let reason = error.detail();
    tracing::warn!(dataset.id = %upload.dataset, error = %error, "dataset upload failed");
    let failed = datasets::fail_upload(&state.pool, &upload.project, &upload.dataset, &upload.token, &reason).await;
    // If the database cannot say whether the upload was finished after all, its object stays.
    match failed {
        Ok(Some(DatasetState::Ready)) => {}
        Ok(_) => state.delete_objects(&[upload.key().to_string()]).await,
        Err(error) => tracing::warn!(dataset.id = %upload.dataset, %error, "could not enter that the upload failed"),
    }
    Err(error)
}

async fn store(state: &AppState, upload: &Upload, body: Body) -> ApiResult<StoredContent> {
    let (sender, receiver) = mpsc::channel(CHUNKS_IN_FLIGHT);
    let chunks = stream::unfold(receiver, async |mut receiver| Some((receiver.recv().await?, receiver))).fuse();
    let key = upload.key();
    let len_bytes = upload.expected_bytes.map(i64::unsigned_abs);

    let (pumped, stored) = tokio::join!(pump(state, upload, body, sender), state.store.upload(&key, chunks, len_bytes));

    // When the client's side fails the store fails with it, and the other way round: the cause counts.
    let num_documents = match (pumped, &stored) {
        (Ok(num_documents), _) => num_documents,
        (Err(PumpError::StoreStopped), Ok(_)) => return Err(ApiError::Internal("the store stopped reading".into())),
        (Err(PumpError::StoreStopped), Err(_)) => 0,
        (Err(PumpError::Refused(error)), _) => return Err(error),
    };
    let stored = stored?;
    Ok(StoredContent {
        object_key: key.to_string(),
        size_bytes: stored.bytes as i64,
        sha256: stored.sha256,
        num_documents,
    })
}

enum PumpError {
    StoreStopped,
    Refused(ApiError),
}

type Sender = mpsc::Sender<io::Result<Bytes>>;

/// Checks the body while it passes on, and returns how many documents it had. The store learns that
/// a body ended badly, so that it keeps nothing of it.
async fn pump(state: &AppState, upload: &Upload, body: Body, sender: Sender) -> Result<i64, PumpError> {
    let mut body = IncomingBody::new(state, body);
    let outcome = pass_on(upload, &mut body, &sender).await;
    if let Err(PumpError::Refused(error)) = &outcome {
        // If the store is gone too, there is nobody left to tell.
        let _ = sender.send(Err(io::Error::other(error.to_string()))).await;
        drop(sender);
        body.read_to_end().await;
    }
    outcome
}

async fn pass_on(upload: &Upload, body: &mut IncomingBody, sender: &Sender) -> Result<i64, PumpError> {
    let mut check = ContentCheck::new(upload.format);
    while let Some(chunk) = body.next().await.map_err(PumpError::Refused)? {
        check.push(&chunk).map_err(PumpError::Refused)?;
        sender.send(Ok(chunk)).await.map_err(|_| PumpError::StoreStopped)?;
    }
    match upload.expected_bytes {
        Some(expected) if expected != body.received_bytes() => {
            Err(PumpError::Refused(body.broken(format!("{expected} were announced"))))
        }
        _ => check.finish().map_err(PumpError::Refused),
    }
}
