//! A request's body that is too large for memory, while it arrives.

use std::{
    io,
    sync::{
        Arc,
        atomic::{AtomicI64, Ordering},
    },
    time::Duration,
};

use async_stream::stream;
use axum::{
    body::{Body, BodyDataStream, Bytes},
    http::{HeaderMap, header},
};
use futures_util::{Stream, StreamExt};
use tokio::time::timeout;

use super::{
    AppState,
    error::{ApiError, ApiResult},
};
use crate::shutdown::Shutdown;

/// A client that sends nothing for this long has gone.
const STALL_TIMEOUT: Duration = Duration::from_secs(60);

/// A body, chunk by chunk, within the server's limit.
pub struct IncomingBody {
    chunks: BodyDataStream,
    limit_bytes: i64,
    shutdown: Shutdown,
    received_bytes: i64,
    /// Bytes that may still come before whoever reads the stream has made something of them.
    allowance_bytes: Arc<AtomicI64>,
    refusal: Option<ApiError>,
}

/// Bounds what a reader of the stream can be made to keep in memory.
#[derive(Debug, Clone)]
pub struct Allowance(Arc<AtomicI64>);

impl Allowance {
    /// At most this much may come from here on.
    pub fn limit(&self, bytes: i64) {
        self.0.store(bytes, Ordering::Relaxed);
    }

    pub fn lift(&self) {
        self.limit(i64::MAX);
    }
}

impl IncomingBody {
    pub fn new(state: &AppState, body: Body) -> Self {
        Self {
            chunks: body.into_data_stream(),
            limit_bytes: state.limits.max_upload_bytes.cast_signed(),
            shutdown: state.shutdown.clone(),
            received_bytes: 0,
            allowance_bytes: Arc::new(AtomicI64::new(i64::MAX)),
            refusal: None,
        }
    }

    pub fn received_bytes(&self) -> i64 {
        self.received_bytes
    }

    /// The next piece; `None` at the end.
    pub async fn next(&mut self) -> ApiResult<Option<Bytes>> {
        let next = timeout(STALL_TIMEOUT, self.chunks.next());
        let next = self.shutdown.run_until(next).await.ok_or(ApiError::Stopping)?;
        let chunk = match next {
            Ok(Some(Ok(chunk))) => chunk,
            Ok(Some(Err(error))) => return Err(self.broken(cause(&error))),
            Ok(None) => return Ok(None),
            Err(_) => return Err(self.broken(format!("nothing came for {} s", STALL_TIMEOUT.as_secs()))),
        };
        self.received_bytes += chunk.len() as i64;
        if self.received_bytes > self.limit_bytes {
            return Err(ApiError::TooLarge { limit_bytes: self.limit_bytes });
        }
        Ok(Some(chunk))
    }

    pub fn broken(&self, reason: String) -> ApiError {
        ApiError::UploadBroken { received_bytes: self.received_bytes, reason }
    }

    pub fn allowance(&self) -> Allowance {
        Allowance(Arc::clone(&self.allowance_bytes))
    }

    /// The body for a reader that knows nothing of our errors: [`Self::refusal`] then has the cause.
    pub fn stream(&mut self) -> impl Stream<Item = io::Result<Bytes>> + Send {
        stream! {
            loop {
                let next = self.next().await.and_then(|chunk| self.spend(chunk));
                match next {
                    Ok(Some(chunk)) => yield Ok(chunk),
                    Ok(None) => return,
                    Err(error) => {
                        let text = error.to_string();
                        self.refusal = Some(error);
                        yield Err(io::Error::other(text));
                        return;
                    }
                }
                // A reader that takes whatever is ready gets one chunk at a time.
                tokio::task::yield_now().await;
            }
        }
    }

    fn spend(&self, chunk: Option<Bytes>) -> ApiResult<Option<Bytes>> {
        let len_bytes = chunk.as_ref().map_or(0, Bytes::len) as i64;
        let left_bytes = self.allowance_bytes.fetch_sub(len_bytes, Ordering::Relaxed) - len_bytes;
        if left_bytes < 0 {
            return Err(ApiError::MalformedMultipart("the header of a part is too long".into()));
        }
        Ok(chunk)
    }

    /// Why the stream ended badly.
    pub fn take_refusal(&mut self) -> Option<ApiError> {
        self.refusal.take()
    }

    /// Reads what a client goes on sending after it was refused: a connection closed on unread bytes takes
    /// the answer with it. A client that sends much more than that has to do without.
    pub async fn read_to_end(&mut self) {
        let mut left_bytes = 64 << 20;
        let read = async {
            while let Some(Ok(chunk)) = self.chunks.next().await {
                left_bytes -= chunk.len() as i64;
                if left_bytes < 0 {
                    return;
                }
            }
        };
        let _ = timeout(Duration::from_secs(5), read).await;
    }
}

/// What the client says that it will send.
pub fn content_length(headers: &HeaderMap) -> Option<i64> {
    headers.get(header::CONTENT_LENGTH)?.to_str().ok()?.parse().ok()
}

/// Refuses at once what is announced to be too large.
pub fn check_length(state: &AppState, headers: &HeaderMap) -> ApiResult<Option<i64>> {
    let limit_bytes = state.limits.max_upload_bytes.cast_signed();
    match content_length(headers) {
        Some(bytes) if bytes > limit_bytes => Err(ApiError::TooLarge { limit_bytes }),
        announced => Ok(announced),
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
