//! Downloads: a stream for whoever passes it on, and a checked file for whoever keeps it.

use std::{io, ops::Range, path::Path};

use aws_sdk_s3::primitives::ByteStream;
use bytes::{Bytes, BytesMut};
use futures_util::{Stream, StreamExt, stream};
use sha2::{Digest, Sha256};
use tokio::{
    fs::{self, File},
    io::AsyncWriteExt,
};

use super::{Key, Result, StorageError, Store, Uploaded, error::local};

/// How often a download is taken up again after its connection broke.
const MAX_RESUMPTIONS: u32 = 4;

/// The bytes of an object, or of a range of it.
#[derive(Debug)]
pub struct ObjectStream {
    /// How many bytes the stream gives.
    pub len_bytes: u64,
    body: ByteStream,
}

impl ObjectStream {
    /// The bytes as they come. An object that ends early is an error.
    pub fn into_stream(self) -> impl Stream<Item = io::Result<Bytes>> + Send + 'static {
        stream::try_unfold((self.body, self.len_bytes), async |(mut body, left_bytes)| match body.next().await {
            Some(Ok(chunk)) => {
                let left_bytes = left_bytes.saturating_sub(chunk.len() as u64);
                Ok(Some((chunk, (body, left_bytes))))
            }
            Some(Err(error)) => Err(io::Error::other(error)),
            None if left_bytes > 0 => Err(io::ErrorKind::UnexpectedEof.into()),
            None => Ok(None),
        })
    }
}

impl Store {
    /// Reads an object, or the bytes of it in `range` (the end is not part of it).
    pub async fn get(&self, key: &Key, range: Option<Range<u64>>) -> Result<ObjectStream> {
        if range.as_ref().is_some_and(Range::is_empty) {
            return Ok(ObjectStream { len_bytes: 0, body: ByteStream::default() });
        }
        let header = range.map(|range| format!("bytes={}-{}", range.start, range.end - 1));
        let request = self.client().get_object().bucket(self.bucket()).key(self.object_key(key)?);
        let response = request.set_range(header).send().await.map_err(|error| self.error("get", key, error))?;
        let no_length = || self.failure("get", key, "the answer has no length".into());
        let len_bytes = response.content_length().ok_or_else(no_length)?.unsigned_abs();
        Ok(ObjectStream { len_bytes, body: response.body })
    }

    /// Reads a small object into memory; one above the limit is refused.
    pub async fn get_bytes(&self, key: &Key, limit_bytes: u64) -> Result<Bytes> {
        let object = self.get(key, None).await?;
        if object.len_bytes > limit_bytes {
            let reason = format!("it has {} bytes where at most {limit_bytes} belong", object.len_bytes);
            return Err(StorageError::Damaged { key: key.clone(), reason });
        }
        self.read(key, object).await
    }

    /// Reads a small range of an object into memory (the end is not part of it). A store that gives more or less, such
    /// as the whole object, is refused.
    pub async fn get_range_bytes(&self, key: &Key, range: Range<u64>) -> Result<Bytes> {
        let wanted_bytes = range.end.saturating_sub(range.start);
        let object = self.get(key, Some(range.clone())).await?;
        if object.len_bytes != wanted_bytes {
            let reason = format!("the store gives {} bytes of it for the range {range:?}", object.len_bytes);
            return Err(StorageError::Damaged { key: key.clone(), reason });
        }
        self.read(key, object).await
    }

    async fn read(&self, key: &Key, object: ObjectStream) -> Result<Bytes> {
        let mut bytes = BytesMut::new();
        let len_bytes = object.len_bytes;
        let mut stream = std::pin::pin!(object.into_stream());
        while let Some(chunk) = stream.next().await {
            let chunk = chunk.map_err(|error| self.failure("get", key, error.into()))?;
            if (bytes.len() + chunk.len()) as u64 > len_bytes {
                let reason = format!("the store gives more than the {len_bytes} bytes that it announced");
                return Err(StorageError::Damaged { key: key.clone(), reason });
            }
            bytes.extend_from_slice(&chunk);
        }
        Ok(bytes.freeze())
    }

    /// Downloads an object to a file, which has its name only once size and hash are what is expected.
    pub async fn download_to(&self, key: &Key, path: &Path, expected: &Uploaded) -> Result<()> {
        let mut unfinished = path.as_os_str().to_owned();
        unfinished.push(".part");
        let unfinished = Path::new(&unfinished);
        let result = self.download_checked(key, unfinished, expected).await;
        match result {
            Ok(()) => fs::rename(unfinished, path).await.map_err(local("rename the file of", key)),
            Err(error) => {
                // The error that is reported says more than a failure to remove.
                let _ = fs::remove_file(unfinished).await;
                Err(error)
            }
        }
    }

    async fn download_checked(&self, key: &Key, path: &Path, expected: &Uploaded) -> Result<()> {
        let mut file = File::create(path).await.map_err(local("create the file for", key))?;
        let mut sha256 = Sha256::new();
        let mut done_bytes = 0;
        let mut num_resumptions = 0;
        while let Err(error) = self.append(key, &mut file, &mut sha256, &mut done_bytes, expected.bytes).await {
            let is_broken_connection = matches!(error, StorageError::Other { op: "read", .. });
            if !is_broken_connection || num_resumptions == MAX_RESUMPTIONS {
                return Err(error);
            }
            num_resumptions += 1;
            tracing::warn!(storage.key = %key, error = %error, "taking up a download again");
        }
        file.flush().await.map_err(local("write the file of", key))?;
        let found = Uploaded { bytes: done_bytes, sha256: hex::encode(sha256.finalize()) };
        if found != *expected {
            let reason = format!("expected {expected:?}, found {found:?}");
            return Err(StorageError::Damaged { key: key.clone(), reason });
        }
        Ok(())
    }

    /// Reads from `done_bytes` on to the end.
    async fn append(
        &self,
        key: &Key,
        file: &mut File,
        sha256: &mut Sha256,
        done_bytes: &mut u64,
        expected_bytes: u64,
    ) -> Result<()> {
        let range = (*done_bytes > 0).then_some(*done_bytes..expected_bytes.max(*done_bytes));
        let object = self.get(key, range).await?;
        if *done_bytes + object.len_bytes != expected_bytes {
            let reason = format!("{expected_bytes} bytes are expected, and it has {}", *done_bytes + object.len_bytes);
            return Err(StorageError::Damaged { key: key.clone(), reason });
        }
        let mut stream = std::pin::pin!(object.into_stream());
        while let Some(chunk) = stream.next().await {
            let chunk = chunk.map_err(|error| self.failure("read", key, error.into()))?;
            file.write_all(&chunk).await.map_err(local("write the file of", key))?;
            sha256.update(&chunk);
            *done_bytes += chunk.len() as u64;
        }
        Ok(())
    }
}
