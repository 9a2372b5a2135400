//! What can go wrong with the store, as far as callers act on it.

use std::{error::Error, io};

use aws_sdk_s3::error::{DisplayErrorContext, ProvideErrorMetadata, SdkError};

use super::{Key, LOW_DISK_SPACE, Store};

#[derive(Debug, thiserror::Error)]
pub enum StorageError {
    #[error("there is no object {key} in the store")]
    NotFound { key: Key },
    /// Nothing was stored. Trying again helps once there is space.
    #[error("the store's disk has too little free space for {key}: free some, or lower RELORA_MIN_FREE_BYTES")]
    LowDiskSpace { key: Key },
    #[error("the store takes no key {key:?}: {reason}")]
    InvalidKey { key: Key, reason: String },
    /// The object is not the one that was expected.
    #[error("object {key} is damaged: {reason}")]
    Damaged { key: Key, reason: String },
    /// The other side of a transfer failed: the body that was to be uploaded, or the file to be written.
    #[error("{op} {key}: {source}")]
    Local { op: &'static str, key: Key, source: io::Error },
    /// The store was given up. Trying again helps once it answers in time.
    #[error("{op} {key} (store {endpoint}): no end within {limit_s} s; look whether the store answers, and how fast")]
    Stalled { op: &'static str, key: Key, endpoint: String, limit_s: f64 },
    #[error("{op} {key} (store {endpoint}): {}", DisplayErrorContext(&**source))]
    Other { op: &'static str, key: Key, endpoint: String, source: Box<dyn Error + Send + Sync> },
}

impl Store {
    /// Says which of our errors an error of the client library is.
    pub(super) fn error<E>(&self, op: &'static str, key: &Key, error: SdkError<E>) -> StorageError
    where
        E: Error + ProvideErrorMetadata + Send + Sync + 'static,
    {
        let status = error.raw_response().map(|response| response.status().as_u16());
        match (error.code(), status) {
            (Some(LOW_DISK_SPACE), _) => StorageError::LowDiskSpace { key: key.clone() },
            (Some("NoSuchKey"), _) => StorageError::NotFound { key: key.clone() },
            // The answer to HEAD has no body that could say what is missing.
            (None | Some("NotFound"), Some(404)) => StorageError::NotFound { key: key.clone() },
            _ => self.failure(op, key, error.into()),
        }
    }

    pub(super) fn failure(&self, op: &'static str, key: &Key, source: Box<dyn Error + Send + Sync>) -> StorageError {
        StorageError::Other { op, key: key.clone(), endpoint: self.inner.place.clone(), source }
    }
}

/// An error of a local file or body.
pub(super) fn local(op: &'static str, key: &Key) -> impl FnOnce(io::Error) -> StorageError {
    let key = key.clone();
    move |source| StorageError::Local { op, key, source }
}
