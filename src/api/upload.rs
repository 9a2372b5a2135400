//! One upload of a dataset's content: from the request's body to the store, in bounded memory.
//!
//! It runs as a task of its own, because a handler is dropped when its client goes away, and a broken
//! upload must still leave the dataset `failed` and nothing in the store.

use std::{io, panic::AssertUnwindSafe, time::Duration};

use axum::body::{Body, BodyDataStream, Bytes};
use futures_util::{FutureExt, StreamExt, stream};
use tokio::{sync::mpsc, time::timeout};
use tracing::Instrument;
use uuid::Uuid;

use super::{
    AppState,
    content::ContentCheck,
    error::{ApiError, ApiResult},
};
use crate::{
    db::datasets::{self, DatasetFormat, DatasetRow, DatasetState, StoredContent},
    domain::ids::{DatasetId, ProjectId},
    storage::Key,
};

/// A client that sends nothing for this long has gone.
const STALL_TIMEOUT: Duration = Duration::from_secs(60);
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
    let mut chunks = body.into_data_stream();
    let outcome = tokio::select! {
        outcome = pass_on(state, upload, &mut chunks, &sender) => outcome,
        () = state.shutdown.wait() => Err(PumpError::Refused(ApiError::Stopping)),
    };
    if let Err(PumpError::Refused(error)) = &outcome {
        // If the store is gone too, there is nobody left to tell.
        let _ = sender.send(Err(io::Error::other(error.to_string()))).await;
        drop(sender);
        read_to_end(&mut chunks).await;
    }
    outcome
}

/// Reads what a client goes on sending after it was refused: a connection closed on unread bytes takes
/// the answer with it. A client that sends much more than that has to do without.
async fn read_to_end(chunks: &mut BodyDataStream) {
    let mut left_bytes = 64 << 20;
    let read = async {
        while let Some(Ok(chunk)) = chunks.next().await {
            left_bytes -= chunk.len() as i64;
            if left_bytes < 0 {
                return;
            }
        }
    };
    let _ = timeout(Duration::from_secs(5), read).await;
}

async fn pass_on(
    state: &AppState,
    upload: &Upload,
    chunks: &mut BodyDataStream,
    sender: &Sender,
) -> Result<i64, PumpError> {
    let limit_bytes = state.limits.max_upload_bytes.cast_signed();
    let mut check = ContentCheck::new(upload.format);
    let mut received_bytes = 0;
    let broken = |received_bytes, reason: String| PumpError::Refused(ApiError::UploadBroken { received_bytes, reason });

    loop {
        let chunk = match timeout(STALL_TIMEOUT, chunks.next()).await {
            Ok(Some(Ok(chunk))) => chunk,
            Ok(Some(Err(error))) => return Err(broken(received_bytes, cause(&error))),
            Ok(None) => break,
            Err(_) => return Err(broken(received_bytes, format!("nothing came for {} s", STALL_TIMEOUT.as_secs()))),
        };
        received_bytes += chunk.len() as i64;
        if received_bytes > limit_bytes {
            return Err(PumpError::Refused(ApiError::TooLarge { limit_bytes }));
        }
        check.push(&chunk).map_err(PumpError::Refused)?;
        sender.send(Ok(chunk)).await.map_err(|_| PumpError::StoreStopped)?;
    }

    match upload.expected_bytes {
        Some(expected) if expected != received_bytes => {
            Err(broken(received_bytes, format!("{expected} were announced")))
        }
        _ => check.finish().map_err(PumpError::Refused),
    }
}

/// The innermost reason, which says most.
fn cause(error: &axum::Error) -> String {
    let mut innermost: &dyn std::error::Error = error;
    while let Some(source) = innermost.source() {
        innermost = source;
    }
    innermost.to_string()
}
