//! Uploads: SHA-256 on the way, one request for what fits into one part, else multipart with few parts in
//! memory. Whatever the store does, an upload ends: see [`Patience`].

use std::{io, path::Path, time::Duration};

use aws_sdk_s3::{
    config::{Builder, Config, timeout::TimeoutConfig},
    primitives::ByteStream,
    types::{CompletedMultipartUpload, CompletedPart},
};
use bytes::{Bytes, BytesMut};
use futures_util::{Stream, StreamExt};
use sha2::{Digest, Sha256};
use tokio::{
    task::{JoinSet, spawn_blocking},
    time::timeout,
};

use super::{Key, Result, StorageError, Store, error::local, pieces::file_pieces};

pub(super) const PART_BYTES: u64 = 8 << 20;
const MAX_PARTS: u64 = 10_000;
/// Parts on their way together hold at most this much memory, or are one. One more is being read.
const MAX_BYTES_IN_FLIGHT: u64 = 32 << 20;
pub(super) const CONTENT_TYPE: &str = "application/octet-stream";
/// How often a file is uploaded anew that was given up, or whose object is nowhere to be found after a completion.
const MAX_FILE_UPLOADS: u32 = 3;
/// How long to wait before a write is tried again that found too little free disk.
const LOW_DISK_PAUSE: Duration = Duration::from_secs(10);
/// The slowest store that files are uploaded to, for the deadline of a large one.
const MIN_BYTES_PER_S: u64 = 1 << 20;
/// How fast a store puts the parts together, at least, if it copies them.
const MIN_COMPLETED_BYTES_PER_S: u64 = 20 << 20;
/// No upload takes longer, so that one which is older than [`Store::STALE_UPLOAD`] is nobody's.
const MAX_UPLOAD: Duration = Duration::from_secs(23 * 3600);

/// How long a store may take. Tests are less patient.
#[derive(Debug, Clone, Copy)]
pub(super) struct Patience {
    /// One try of a request with [`PART_BYTES`] in it: what is slower is not slow but broken.
    pub(super) part: Duration,
    /// Between two parts that the store acknowledges, with all the tries that the library makes: longer than `part`, so
    /// that one connection that has died is replaced before everything is begun again.
    pub(super) progress: Duration,
    /// A small file, from the first byte to the last look at the object.
    pub(super) file: Duration,
    /// One try of a completion, without the copying of a large object.
    pub(super) completion: Duration,
    /// For cleaning up after an upload that has failed. What is not reached meanwhile is swept later.
    pub(super) clean_up: Duration,
}

impl Patience {
    pub(super) const DEFAULT: Self = Self {
        part: Duration::from_secs(120),
        progress: Duration::from_secs(300),
        file: Duration::from_secs(600),
        completion: Duration::from_secs(300),
        clean_up: Duration::from_secs(10),
    };

    /// The timeout of one try of a request that carries so much.
    fn request(&self, num_bytes: usize) -> Builder {
        attempt_timeout(self.part * u32::try_from((num_bytes as u64).div_ceil(PART_BYTES)).unwrap_or(u32::MAX).max(1))
    }

    fn completion(&self, num_bytes: u64) -> Builder {
        attempt_timeout(self.completion + Duration::from_secs(num_bytes / MIN_COMPLETED_BYTES_PER_S))
    }

    fn file(&self, num_bytes: u64) -> Duration {
        (self.file + Duration::from_secs(num_bytes / MIN_BYTES_PER_S)).min(MAX_UPLOAD)
    }
}

/// What was stored.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Uploaded {
    pub bytes: u64,
    /// Lowercase hexadecimal.
    pub sha256: String,
}

impl Store {
    /// Uploads that were begun longer ago than this are nobody's any more.
    pub const STALE_UPLOAD: Duration = Duration::from_secs(24 * 3600);

    /// Stores a stream. `len_bytes`, if known, only chooses the size of the parts. After a failure, or when
    /// the future is dropped, nothing is stored; only where the store fails after it has completed the object does that stay, an
    /// orphan that no row names.
    pub async fn upload(
        &self,
        key: &Key,
        stream: impl Stream<Item = io::Result<Bytes>> + Send,
        len_bytes: Option<u64>,
    ) -> Result<Uploaded> {
        self.within(MAX_UPLOAD, "upload", key, self.upload_stream(key, stream, len_bytes)).await
    }

    async fn upload_stream(
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

    /// Stores a file. Waits while the store's disk is low on space, and begins again a few times where the store makes
    /// no progress, or a failed completion has lost what was sent; the caller bounds that by dropping the future.
    pub async fn upload_file(&self, key: &Key, path: &Path) -> Result<Uploaded> {
        let mut num_uploads = 0;
        loop {
            let file = tokio::fs::File::open(path).await.map_err(local("open the file for", key))?;
            let len_bytes = file.metadata().await.map_err(local("look at the file for", key))?.len();
            let stream = file_pieces(file.into_std().await, part_bytes(1, Some(len_bytes)), len_bytes);
            let limit = self.patience().file(len_bytes);
            match self.within(limit, "upload", key, self.upload_stream(key, stream, Some(len_bytes))).await {
                Err(error @ StorageError::LowDiskSpace { .. }) => {
                    tracing::warn!(storage.key = %key, error = %error, "an upload waits");
                    tokio::time::sleep(LOW_DISK_PAUSE).await;
                }
                Err(error @ (StorageError::Other { .. } | StorageError::Stalled { .. }))
                    if num_uploads + 1 < MAX_FILE_UPLOADS =>
                {
                    num_uploads += 1;
                    tracing::warn!(storage.key = %key, error = %error, "uploading a file again");
                }
                result => return result,
            }
        }
    }

    /// Gives up what takes longer.
    async fn within<T>(
        &self,
        limit: Duration,
        op: &'static str,
        key: &Key,
        work: impl Future<Output = Result<T>>,
    ) -> Result<T> {
        timeout(limit, work).await.unwrap_or_else(|_| {
            let endpoint = self.inner.place.clone();
            Err(StorageError::Stalled { op, key: key.clone(), endpoint, limit_s: limit.as_secs_f64() })
        })
    }

    fn patience(&self) -> &Patience {
        &self.inner.patience
    }

    async fn put(&self, key: &Key, body: Bytes) -> Result<()> {
        let timeout = self.patience().request(body.len());
        let request = self
            .client()
            .put_object()
            .bucket(self.bucket())
            .key(self.object_key(key)?)
            .content_type(CONTENT_TYPE)
            .body(ByteStream::from(body))
            .customize()
            .config_override(timeout);
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
                let arriving = async { while sending.join_next().await.is_some() {} };
                let _ = timeout(self.patience().clean_up, arriving).await;
                sending.shutdown().await;
                upload.abort().await;
                Err(error)
            }
        }
    }

    pub(super) async fn open_upload(&self, key: &Key) -> Result<OpenUpload> {
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
            while sending.len() >= max_in_flight(part.len()) {
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

    /// The next part that the store acknowledges, if one is on its way.
    async fn next_sent(
        &self,
        sending: &mut JoinSet<Result<CompletedPart>>,
        key: &Key,
    ) -> Result<Option<CompletedPart>> {
        const OP: &str = "upload a part of";
        let next = async { Ok(sending.join_next().await) };
        match self.within(self.patience().progress, OP, key, next).await? {
            None => Ok(None),
            Some(Ok(sent)) => sent.map(Some),
            Some(Err(panic)) => Err(self.failure(OP, key, panic.into())),
        }
    }

    /// Any failure of a completion is ambiguous: a store may answer a second try of one that succeeded with
    /// "no such upload", or report an error after it began to answer. What the key names now decides.
    pub(super) async fn complete(&self, mut upload: OpenUpload, parts: Vec<CompletedPart>, bytes: u64) -> Result<()> {
        let parts = CompletedMultipartUpload::builder().set_parts(Some(parts)).build();
        let request = self
            .client()
            .complete_multipart_upload()
            .bucket(self.bucket())
            .key(&upload.object_key)
            .upload_id(&upload.id)
            .multipart_upload(parts)
            .customize()
            .config_override(self.patience().completion(bytes));
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

fn attempt_timeout(timeout: Duration) -> Builder {
    Config::builder().timeout_config(TimeoutConfig::builder().operation_attempt_timeout(timeout).build())
}

pub(super) async fn send_part(
    store: Store,
    key: Key,
    upload_id: String,
    number: u64,
    body: Bytes,
) -> Result<CompletedPart> {
    let number = i32::try_from(number).expect("part numbers end at 10,000");
    let timeout = store.patience().request(body.len());
    let request = store
        .client()
        .upload_part()
        .bucket(store.bucket())
        .key(store.object_key(&key)?)
        .upload_id(upload_id)
        .part_number(number)
        .body(ByteStream::from(body))
        .customize()
        .config_override(timeout);
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

/// How many parts of this size may be on their way together.
pub(super) fn max_in_flight(part_len: usize) -> usize {
    usize::try_from(MAX_BYTES_IN_FLIGHT / (part_len as u64).max(1)).unwrap_or(usize::MAX).max(1)
}

/// For people: how files are cut.
pub(super) fn describe_parts() -> String {
    let part_mib = PART_BYTES >> 20;
    format!(
        "{part_mib} MiB, {} at once; larger and fewer above {} GB",
        MAX_BYTES_IN_FLIGHT / PART_BYTES,
        PART_BYTES * MAX_PARTS / 1_000_000_000
    )
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
        let part = self.gather(usize::try_from(size_bytes).map_err(io::Error::other)?).await?;
        self.bytes += part.len() as u64;
        // Some milliseconds for a part: too long for a thread that serves others.
        let (mut sha256, hashed) = (std::mem::take(&mut self.sha256), part.clone());
        let hash = move || {
            sha256.update(&hashed);
            sha256
        };
        self.sha256 = spawn_blocking(hash).await.map_err(io::Error::other)?;
        Ok(part)
    }

    async fn gather(&mut self, size: usize) -> io::Result<Bytes> {
        let mut part = BytesMut::new();
        while part.len() < size {
            if self.rest.is_empty() {
                match self.stream.next().await {
                    Some(chunk) => self.rest = chunk?,
                    None => break,
                }
            }
            let chunk = self.rest.split_to(self.rest.len().min(size - part.len()));
            if chunk.len() == size {
                // A whole part at once, as files give it, needs no copy.
                return Ok(chunk);
            }
            if part.is_empty() && !chunk.is_empty() {
                part.reserve(size);
            }
            part.extend_from_slice(&chunk);
        }
        Ok(part.freeze())
    }
}

/// A multipart upload that is neither completed nor aborted. Dropped, it is aborted behind the scenes.
pub(super) struct OpenUpload {
    store: Store,
    key: Key,
    object_key: String,
    id: String,
    is_open: bool,
}

impl OpenUpload {
    pub(super) fn id(&self) -> &str {
        &self.id
    }

    /// Best effort: what cannot be aborted now is swept later, or left to the store's own rules.
    pub(super) async fn abort(mut self) {
        self.is_open = false;
        let (object_key, id) = (std::mem::take(&mut self.object_key), std::mem::take(&mut self.id));
        let limit = self.store.patience().clean_up;
        if timeout(limit, abort(self.store.clone(), object_key, id)).await.is_err() {
            tracing::debug!(storage.key = %self.key, "an upload could not be aborted in time");
        }
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
    use super::{MAX_PARTS, MAX_UPLOAD, PART_BYTES, Patience, Store, max_in_flight, part_bytes};

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

    #[test]
    fn parts_on_their_way_hold_little_memory_and_are_at_least_one() {
        let held = |len_bytes| {
            part_bytes(1, Some(len_bytes)) * (max_in_flight(part_bytes(1, Some(len_bytes)) as usize) as u64)
        };
        assert_eq!(max_in_flight(PART_BYTES as usize), 4);
        assert!([0, 1 << 30, 80 << 30, 200 << 30].iter().all(|len_bytes| held(*len_bytes) <= 32 << 20));
        assert_eq!(max_in_flight(1 << 30), 1);
    }

    #[test]
    fn no_upload_outlives_the_age_at_which_it_is_swept() {
        let patience = Patience::DEFAULT;
        assert!(patience.file(0).as_secs() == 600 && patience.file(1 << 30).as_secs() == 600 + 1024);
        assert!(patience.file(u64::MAX) == MAX_UPLOAD && MAX_UPLOAD < Store::STALE_UPLOAD);
    }
}
