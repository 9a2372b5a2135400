//! Uploads: SHA-256 on the way, one request for what fits into one part, else multipart with few parts in
//! memory.

use std::{io, path::Path, time::Duration};

use aws_sdk_s3::{
    config::{Config, timeout::TimeoutConfig},
    primitives::ByteStream,
    types::{CompletedMultipartUpload, CompletedPart},
};
use bytes::{Bytes, BytesMut};
use futures_util::{Stream, StreamExt};
use sha2::{Digest, Sha256};
use tokio::{fs::File, task::JoinSet};
use tokio_util::io::ReaderStream;

use super::{Key, Result, StorageError, Store, error::local};

const PART_BYTES: u64 = 8 << 20;
const MAX_PARTS: u64 = 10_000;
const MAX_PARTS_IN_FLIGHT: usize = 3;
const CONTENT_TYPE: &str = "application/octet-stream";
/// How often a file is uploaded anew after a completion whose object is nowhere to be found.
const MAX_FILE_UPLOADS: u32 = 3;
/// How long to wait before a write is tried again that found too little free disk.
const LOW_DISK_PAUSE: Duration = Duration::from_secs(10);
const FILE_CHUNK_BYTES: usize = 1 << 20;

/// What was stored.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Uploaded {
    pub bytes: u64,
    /// Lowercase hexadecimal.
    pub sha256: String,
}

impl Store {
    /// Stores a stream. `len_bytes`, if known, only chooses the size of the parts. A failure of any kind, and
    /// dropping the future, stores nothing.
    pub async fn upload(
        &self,
        key: &Key,
        stream: impl Stream<Item = io::Result<Bytes>> + Send,
        len_bytes: Option<u64>,
    ) -> Result<Uploaded> {
        // A part that ends with the body is followed by one more look, which not every stream allows.
        let mut parts = Parts { stream: Box::pin(stream).fuse(), rest: Bytes::new(), sha256: Sha256::new(), bytes: 0 };
        let first = parts.next(part_bytes(1, len_bytes)).await.map_err(local("read the body of", key))?;
        if (first.len() as u64) < part_bytes(1, len_bytes) {
            self.put(key, first).await?;
        } else {
            self.upload_parts(key, first, &mut parts, len_bytes).await?;
        }
        let uploaded = Uploaded { bytes: parts.bytes, sha256: hex::encode(parts.sha256.finalize()) };
        self.confirm(key, uploaded.bytes).await?;
        Ok(uploaded)
    }

    /// Stores a file. Waits while the store's disk is low on space, and uploads again what a failed completion
    /// has lost; the caller bounds that by dropping the future.
    pub async fn upload_file(&self, key: &Key, path: &Path) -> Result<Uploaded> {
        let mut num_uploads = 0;
        loop {
            let file = File::open(path).await.map_err(local("open the file for", key))?;
            let len_bytes = file.metadata().await.map_err(local("look at the file for", key))?.len();
            let stream = ReaderStream::with_capacity(file, FILE_CHUNK_BYTES);
            match self.upload(key, stream, Some(len_bytes)).await {
                Err(error @ StorageError::LowDiskSpace { .. }) => {
                    tracing::warn!(storage.key = %key, error = %error, "an upload waits");
                    tokio::time::sleep(LOW_DISK_PAUSE).await;
                }
                Err(StorageError::Other { op, source, .. }) if num_uploads + 1 < MAX_FILE_UPLOADS => {
                    num_uploads += 1;
                    tracing::warn!(storage.key = %key, storage.op = op, error = %source, "uploading a file again");
                }
                result => return result,
            }
        }
    }

    async fn put(&self, key: &Key, body: Bytes) -> Result<()> {
        let request = self
            .client()
            .put_object()
            .bucket(self.bucket())
            .key(self.object_key(key)?)
            .content_type(CONTENT_TYPE)
            .body(ByteStream::from(body));
        request.send().await.map_err(|error| self.error("put", key, error))?;
        Ok(())
    }

    async fn upload_parts<S>(&self, key: &Key, first: Bytes, parts: &mut Parts<S>, len_bytes: Option<u64>) -> Result<()>
    where
        S: Stream<Item = io::Result<Bytes>> + Unpin,
    {
        let upload = self.open_upload(key).await?;
        let mut sending = JoinSet::new();
        match self.send_parts(&upload, first, parts, len_bytes, &mut sending).await {
            Ok(completed) => self.complete(upload, completed, parts.bytes).await,
            Err(error) => {
                // A part that arrives after the abort would stay in the store.
                while sending.join_next().await.is_some() {}
                upload.abort().await;
                Err(error)
            }
        }
    }

    async fn open_upload(&self, key: &Key) -> Result<OpenUpload> {
        let object_key = self.object_key(key)?;
        let request = self.client().create_multipart_upload().bucket(self.bucket()).key(&object_key);
        let response = request.content_type(CONTENT_TYPE).send().await;
        let response = response.map_err(|error| self.error("begin the upload of", key, error))?;
        let no_id = || self.failure("begin the upload of", key, "the answer names no upload".into());
        let id = response.upload_id().ok_or_else(no_id)?.to_owned();
        Ok(OpenUpload { store: self.clone(), key: key.clone(), object_key, id, is_open: true })
    }

    /// Reads on while earlier parts are on their way.
    async fn send_parts<S>(
        &self,
        upload: &OpenUpload,
        first: Bytes,
        parts: &mut Parts<S>,
        len_bytes: Option<u64>,
        sending: &mut JoinSet<Result<CompletedPart>>,
    ) -> Result<Vec<CompletedPart>>
    where
        S: Stream<Item = io::Result<Bytes>> + Unpin,
    {
        let mut completed = Vec::new();
        let mut part = first;
        let mut number = 1;
        while !part.is_empty() {
            if number > MAX_PARTS {
                return Err(self.failure("upload", &upload.key, "it has more parts than a store takes".into()));
            }
            if sending.len() == MAX_PARTS_IN_FLIGHT {
                completed.extend(self.next_sent(sending, &upload.key).await?);
            }
            sending.spawn(send_part(self.clone(), upload.key.clone(), upload.id.clone(), number, part));
            number += 1;
            part = parts.next(part_bytes(number, len_bytes)).await.map_err(local("read the body of", &upload.key))?;
        }
        while let Some(part) = self.next_sent(sending, &upload.key).await? {
            completed.push(part);
        }
        completed.sort_by_key(|part| part.part_number());
        Ok(completed)
    }

    async fn next_sent(
        &self,
        sending: &mut JoinSet<Result<CompletedPart>>,
        key: &Key,
    ) -> Result<Option<CompletedPart>> {
        match sending.join_next().await {
            None => Ok(None),
            Some(Ok(sent)) => sent.map(Some),
            Some(Err(panic)) => Err(self.failure("upload a part of", key, panic.into())),
        }
    }

    /// Any failure of a completion is ambiguous: a store may answer a second try of one that succeeded with
    /// "no such upload", or report an error after it began to answer. What the key names now decides.
    async fn complete(&self, mut upload: OpenUpload, parts: Vec<CompletedPart>, bytes: u64) -> Result<()> {
        let parts = CompletedMultipartUpload::builder().set_parts(Some(parts)).build();
        let request = self
            .client()
            .complete_multipart_upload()
            .bucket(self.bucket())
            .key(&upload.object_key)
            .upload_id(&upload.id)
            .multipart_upload(parts)
            .customize()
            .config_override(Config::builder().timeout_config(completion_timeout()));
        let Err(error) = request.send().await else {
            upload.is_open = false;
            return Ok(());
        };
        let error = self.error("complete the upload of", &upload.key, error);
        match self.head(&upload.key).await {
            Ok(Some(stored_bytes)) if stored_bytes == bytes => {
                tracing::warn!(storage.key = %upload.key, error = %error, "a completion failed, yet the object is there");
                upload.is_open = false;
                Ok(())
            }
            _ => {
                upload.abort().await;
                Err(error)
            }
        }
    }

    /// A store that keeps the framing of a request inside the object, or drops a part, is found here.
    async fn confirm(&self, key: &Key, bytes: u64) -> Result<()> {
        match self.head(key).await? {
            Some(stored_bytes) if stored_bytes == bytes => Ok(()),
            stored => {
                let reason = format!("{bytes} bytes were uploaded, and the store has {stored:?}");
                Err(StorageError::Damaged { key: key.clone(), reason })
            }
        }
    }
}

/// A store may copy the whole object before it answers.
fn completion_timeout() -> TimeoutConfig {
    TimeoutConfig::builder().operation_attempt_timeout(Duration::from_secs(3600)).build()
}

async fn send_part(store: Store, key: Key, upload_id: String, number: u64, body: Bytes) -> Result<CompletedPart> {
    let number = i32::try_from(number).expect("part numbers end at 10,000");
    let request = store
        .client()
        .upload_part()
        .bucket(store.bucket())
        .key(store.object_key(&key)?)
        .upload_id(upload_id)
        .part_number(number)
        .body(ByteStream::from(body));
    let sent = request.send().await.map_err(|error| store.error("upload a part of", &key, error))?;
    Ok(CompletedPart::builder().part_number(number).set_e_tag(sent.e_tag().map(str::to_owned)).build())
}

/// The size of part `number`, counted from 1. Of a known length every part is equal, as some stores demand;
/// of an unknown one the parts double every thousand, and 8 TiB fit.
fn part_bytes(number: u64, len_bytes: Option<u64>) -> u64 {
    match len_bytes {
        Some(len_bytes) => len_bytes.div_ceil(MAX_PARTS).next_multiple_of(1 << 20).max(PART_BYTES),
        None => PART_BYTES << ((number - 1) / 1000).min(9),
    }
}

/// A stream cut into parts, and its hash so far.
struct Parts<S> {
    stream: S,
    rest: Bytes,
    sha256: Sha256,
    bytes: u64,
}

impl<S: Stream<Item = io::Result<Bytes>> + Unpin> Parts<S> {
    /// Exactly `size_bytes`, or less at the end.
    async fn next(&mut self, size_bytes: u64) -> io::Result<Bytes> {
        let size = usize::try_from(size_bytes).map_err(io::Error::other)?;
        let mut part = BytesMut::new();
        while part.len() < size {
            if self.rest.is_empty() {
                match self.stream.next().await {
                    Some(chunk) => self.rest = chunk?,
                    None => break,
                }
            }
            let chunk = self.rest.split_to(self.rest.len().min(size - part.len()));
            part.extend_from_slice(&chunk);
            self.sha256.update(&chunk);
            self.bytes += chunk.len() as u64;
        }
        Ok(part.freeze())
    }
}

/// A multipart upload that is neither completed nor aborted. Dropped, it is aborted behind the scenes.
struct OpenUpload {
    store: Store,
    key: Key,
    object_key: String,
    id: String,
    is_open: bool,
}

impl OpenUpload {
    /// Best effort: what cannot be aborted now is left to the store's own clean-up.
    async fn abort(mut self) {
        self.is_open = false;
        abort(self.store.clone(), std::mem::take(&mut self.object_key), std::mem::take(&mut self.id)).await;
    }
}

async fn abort(store: Store, object_key: String, upload_id: String) {
    let request = store.client().abort_multipart_upload().bucket(store.bucket()).key(&object_key);
    if let Err(error) = request.upload_id(upload_id).send().await {
        tracing::debug!(storage.key = object_key, error = %error, "an upload could not be aborted");
    }
}

impl Drop for OpenUpload {
    fn drop(&mut self) {
        if let (true, Ok(runtime)) = (self.is_open, tokio::runtime::Handle::try_current()) {
            let (object_key, id) = (std::mem::take(&mut self.object_key), std::mem::take(&mut self.id));
            runtime.spawn(abort(self.store.clone(), object_key, id));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{MAX_PARTS, PART_BYTES, part_bytes};

    #[test]
    fn no_upload_needs_more_parts_than_a_store_takes() {
        for len_bytes in [0, 1, 80 << 30, (80 << 30) + 1, 5 << 40] {
            let size = part_bytes(1, Some(len_bytes));
            assert!(size >= PART_BYTES && len_bytes.div_ceil(size) <= MAX_PARTS);
            assert_eq!(part_bytes(MAX_PARTS, Some(len_bytes)), size);
        }
        let total: u64 = (1..=MAX_PARTS).map(|number| part_bytes(number, None)).sum();
        assert!(part_bytes(1000, None) == PART_BYTES && part_bytes(1001, None) == 2 * PART_BYTES);
        assert!(total > 7 << 40 && part_bytes(MAX_PARTS, None) <= 5 << 30);
    }
}
