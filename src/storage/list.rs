//! What lies in the store: its objects, and the uploads that nobody has ended.

use std::{sync::atomic::Ordering, time::Duration};

use aws_sdk_s3::{
    error::{ProvideErrorMetadata, SdkError},
    primitives,
    types::MultipartUpload,
};
use chrono::{DateTime, Utc};

use super::{Key, Result, Store};

/// The most that one request lists.
const MAX_PAGE: usize = 1000;

/// An object as a listing shows it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ListedObject {
    pub key: Key,
    pub bytes: u64,
    pub modified_at: DateTime<Utc>,
}

impl Store {
    /// Up to `limit` objects whose keys begin with `prefix` and come after `start_after`, in the order of their keys;
    /// fewer only where there are no more. Names that no key of ours can have are left out.
    pub async fn list(&self, prefix: &str, start_after: Option<&Key>, limit: usize) -> Result<Vec<ListedObject>> {
        let begin = self.object_prefix();
        let mut listed: Vec<ListedObject> = Vec::new();
        let mut token = None;
        while listed.len() < limit {
            let page = i32::try_from((limit - listed.len()).min(MAX_PAGE)).unwrap_or(i32::MAX);
            let request = self.client().list_objects_v2().bucket(self.bucket()).prefix(format!("{begin}{prefix}"));
            let request = request
                .max_keys(page)
                .set_start_after(start_after.map(|key| format!("{begin}{key}")))
                .set_continuation_token(token);
            let key = || Key::from(prefix.to_owned());
            let response = request.send().await.map_err(|error| self.error("list", &key(), error))?;
            let incomplete = || self.failure("list", &key(), "an object has no size or time".into());
            for object in response.contents() {
                let Some(key) = object.key().and_then(|key| key.strip_prefix(&begin)) else { continue };
                let key = Key::from(key.to_owned());
                if self.object_key(&key).is_ok() {
                    let bytes = object.size().ok_or_else(incomplete)?.unsigned_abs();
                    let modified_at = object.last_modified().and_then(time).ok_or_else(incomplete)?;
                    listed.push(ListedObject { key, bytes, modified_at });
                }
            }
            token = response.next_continuation_token;
            if token.is_none() {
                break;
            }
        }
        Ok(listed)
    }

    /// Aborts the uploads of this store that were begun longer ago than `older_than`, and returns how many those were.
    /// Their parts are paid for and shown to nobody.
    pub async fn abort_stale_uploads(&self, older_than: Duration) -> Result<usize> {
        let begun_before = Utc::now() - older_than;
        let prefix = Key::from("uploads".to_owned());
        let mut num_aborted = 0;
        let (mut key_marker, mut id_marker) = (None, None);
        loop {
            let request = self.client().list_multipart_uploads().bucket(self.bucket()).prefix(self.object_prefix());
            let response = match request.set_key_marker(key_marker).set_upload_id_marker(id_marker).send().await {
                Ok(response) => response,
                Err(error) if is_not_implemented(&error) => {
                    if !self.inner.cannot_list_uploads.swap(true, Ordering::Relaxed) {
                        tracing::info!("the store does not list open uploads: a rule of its own has to abort them");
                    }
                    return Ok(0);
                }
                Err(error) => return Err(self.error("list open", &prefix, error)),
            };
            let is_stale = |upload: &&MultipartUpload| {
                upload.initiated().and_then(time).is_some_and(|begun_at| begun_at < begun_before)
            };
            for upload in response.uploads().iter().filter(is_stale) {
                num_aborted += usize::from(self.abort_upload(upload).await?);
            }
            if response.is_truncated() != Some(true) || response.next_key_marker().is_none() {
                return Ok(num_aborted);
            }
            (key_marker, id_marker) = (response.next_key_marker, response.next_upload_id_marker);
        }
    }

    /// False if the upload has ended meanwhile.
    async fn abort_upload(&self, upload: &MultipartUpload) -> Result<bool> {
        let key = upload.key().unwrap_or_default();
        let request = self.client().abort_multipart_upload().bucket(self.bucket()).key(key);
        match request.set_upload_id(upload.upload_id.clone()).send().await {
            Ok(_) => {
                tracing::info!(storage.key = key, begun_at = ?upload.initiated(), "aborted an upload that nobody has ended");
                Ok(true)
            }
            Err(error) if error.code() == Some("NoSuchUpload") => Ok(false),
            Err(error) => Err(self.error("abort an old upload of", &Key::from(key.to_owned()), error)),
        }
    }
}

fn time(time: &primitives::DateTime) -> Option<DateTime<Utc>> {
    DateTime::from_timestamp(time.secs(), time.subsec_nanos())
}

/// Whether the store says that it does not know the request at all.
fn is_not_implemented<E: ProvideErrorMetadata>(error: &SdkError<E>) -> bool {
    let status = error.raw_response().map(|response| response.status().as_u16());
    matches!(error.code(), Some("NotImplemented" | "MethodNotAllowed")) || matches!(status, Some(405 | 501))
}
