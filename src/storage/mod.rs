//! The S3 store: objects in, objects out, always as streams of bounded memory.
//!
//! Invariant: an upload that returns has been completed, and the store has confirmed its size; whatever
//! ends in another way leaves no object and no open upload behind, as far as the store can be reached.

mod check;
mod connect;
mod download;
mod error;
mod keys;
mod list;
mod pieces;
#[cfg(test)]
mod tests;
mod throughput;
mod upload;

use std::{
    sync::{Arc, atomic::AtomicBool},
    time::Duration,
};

use aws_sdk_s3::{
    Client,
    presigning::PresigningConfig,
    types::{Delete, ObjectIdentifier},
};
use bytes::Bytes;

use self::upload::Patience;
pub use self::{
    check::{Ability, Lack},
    download::ObjectStream,
    error::StorageError,
    keys::{JOBS_PREFIX, Key, MAX_KEY_BYTES, OTHER_PREFIXES},
    list::ListedObject,
    throughput::Throughput,
    upload::Uploaded,
};

/// The error code with which the embedded store refuses a write for lack of disk space.
pub(crate) const LOW_DISK_SPACE: &str = "LowDiskSpace";

/// What every function here returns.
pub type Result<T, E = StorageError> = std::result::Result<T, E>;

/// A connection to the store; clones share it.
#[derive(Debug, Clone)]
pub struct Store {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    client: Client,
    /// Signs for the host that the clients of the API see.
    public_client: Option<Client>,
    bucket: String,
    prefix: String,
    /// For messages: the endpoint, or AWS and its region.
    place: String,
    patience: Patience,
    /// Whether it has been said that this store lists no open uploads.
    cannot_list_uploads: AtomicBool,
}

impl Store {
    /// Stores a small object.
    pub async fn put_bytes(&self, key: &Key, bytes: Bytes) -> Result<Uploaded> {
        let num_bytes = bytes.len() as u64;
        self.upload(key, futures_util::stream::iter([Ok(bytes)]), Some(num_bytes)).await
    }

    /// The object's size in bytes, if it exists.
    pub async fn head(&self, key: &Key) -> Result<Option<u64>> {
        let request = self.client().head_object().bucket(self.bucket()).key(self.object_key(key)?);
        match request.send().await.map_err(|error| self.error("look at", key, error)) {
            Ok(head) => Ok(head.content_length().map(i64::unsigned_abs)),
            Err(StorageError::NotFound { .. }) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Deletes objects. One that is not there counts as deleted.
    pub async fn delete(&self, keys: &[Key]) -> Result<()> {
        for keys in keys.chunks(1000) {
            // Some stores lack the bulk request, or want a checksum for it that others refuse.
            if let Err(error) = self.delete_many(keys).await {
                tracing::debug!(error = %error, "deleting one by one");
                for key in keys {
                    self.delete_one(key).await?;
                }
            }
        }
        Ok(())
    }

    async fn delete_many(&self, keys: &[Key]) -> Result<()> {
        let Some(first) = keys.first() else { return Ok(()) };
        let failed = |source: String| self.failure("delete", first, source.into());
        let mut objects = Vec::with_capacity(keys.len());
        for key in keys {
            let object = ObjectIdentifier::builder().key(self.object_key(key)?).build();
            objects.push(object.map_err(|error| failed(error.to_string()))?);
        }
        let delete = Delete::builder().set_objects(Some(objects)).quiet(true).build();
        let delete = delete.map_err(|error| failed(error.to_string()))?;
        let request = self.client().delete_objects().bucket(self.bucket()).delete(delete);
        let response = request.send().await.map_err(|error| self.error("delete", first, error))?;
        match response.errors().first() {
            None => Ok(()),
            Some(error) => Err(failed(format!("{error:?}"))),
        }
    }

    async fn delete_one(&self, key: &Key) -> Result<()> {
        let request = self.client().delete_object().bucket(self.bucket()).key(self.object_key(key)?);
        match request.send().await.map_err(|error| self.error("delete", key, error)) {
            Ok(_) | Err(StorageError::NotFound { .. }) => Ok(()),
            Err(error) => Err(error),
        }
    }

    /// A URL from which a client can download the object for a while, if clients reach the store at all.
    /// `filename` is the name under which a browser saves it.
    pub async fn presigned_get(&self, key: &Key, ttl: Duration, filename: &str) -> Result<Option<String>> {
        let Some(client) = &self.inner.public_client else { return Ok(None) };
        let plain: String = filename.chars().filter(|c| c.is_ascii_graphic() && !"\"\\".contains(*c)).collect();
        let presigning = PresigningConfig::expires_in(ttl).map_err(|error| self.failure("sign", key, error.into()))?;
        let request = client
            .get_object()
            .bucket(self.bucket())
            .key(self.object_key(key)?)
            .response_content_disposition(format!("attachment; filename=\"{plain}\""));
        let signed = request.presigned(presigning).await.map_err(|error| self.error("sign", key, error))?;
        Ok(Some(signed.uri().to_owned()))
    }

    fn client(&self) -> &Client {
        &self.inner.client
    }

    fn bucket(&self) -> &str {
        &self.inner.bucket
    }

    /// The key as the store sees it.
    fn object_key(&self, key: &Key) -> Result<String> {
        key.below(&self.inner.prefix)
    }

    /// What every key begins with, as the store sees it.
    fn object_prefix(&self) -> String {
        if self.inner.prefix.is_empty() { String::new() } else { format!("{}/", self.inner.prefix) }
    }
}
