//! The requests that the embedded store answers, each by `s3s-fs`, with what that leaves out:
//!
//! - an object is on the disk, with its folders, before a write of it is answered;
//! - a completion that has begun ends, also if the client goes away: interrupted, it would have consumed
//!   parts that no request can remove;
//! - a write that would leave too little free disk is refused;
//! - keys that do not fit into a file's name, or name another file than they seem to, are refused;
//! - listings, of objects in pages and of open uploads (`listing`).

use std::{
    fs::File,
    io::{self, SeekFrom},
    path::{Path, PathBuf},
    sync::Arc,
};

use anyhow::Context;
use base64::{Engine, engine::general_purpose::URL_SAFE_NO_PAD};
use futures_util::StreamExt;
use reqwest::StatusCode;
use rustix::fs::statvfs;
use s3s::{
    S3, S3Error, S3ErrorCode, S3Request, S3Response, S3Result,
    dto::{
        AbortMultipartUploadInput, AbortMultipartUploadOutput, CompleteMultipartUploadInput,
        CompleteMultipartUploadOutput, CreateMultipartUploadInput, CreateMultipartUploadOutput, DeleteObjectInput,
        DeleteObjectOutput, DeleteObjectsInput, DeleteObjectsOutput, GetObjectInput, GetObjectOutput, HeadBucketInput,
        HeadBucketOutput, HeadObjectInput, HeadObjectOutput, ListMultipartUploadsInput, ListMultipartUploadsOutput,
        ListObjectsV2Input, ListObjectsV2Output, PutObjectInput, PutObjectOutput, Range, StreamingBlob,
        UploadPartInput, UploadPartOutput,
    },
};
use s3s_fs::FileSystem;
use tokio::io::{AsyncReadExt, AsyncSeekExt};
use tokio_util::io::ReaderStream;

use super::listing;
use crate::storage::{LOW_DISK_SPACE, MAX_KEY_BYTES};

const READ_BYTES: usize = 256 << 10;

/// A folder of objects that survive a crash of the machine once they are acknowledged.
#[derive(Clone)]
pub(super) struct DurableFiles {
    files: Arc<FileSystem>,
    root: PathBuf,
    min_free_bytes: u64,
}

impl DurableFiles {
    pub(super) fn open(root: PathBuf, min_free_bytes: u64) -> anyhow::Result<Self> {
        let files = FileSystem::new(&root)
            .map_err(|error| anyhow::anyhow!("{error:?}"))
            .with_context(|| format!("open {}", root.display()))?;
        Ok(Self { files: Arc::new(files), root, min_free_bytes })
    }

    /// Refuses a write that would leave too little free disk.
    async fn check_space(&self, body: &mut Option<StreamingBlob>, num_bytes: Option<i64>) -> S3Result<()> {
        let disk = statvfs(&self.root).map_err(|error| S3Error::internal_error(io::Error::from(error)))?;
        let free_bytes = disk.f_bavail.saturating_mul(disk.f_frsize);
        let needed_bytes = self.min_free_bytes.saturating_add(num_bytes.unwrap_or(0).unsigned_abs());
        if free_bytes >= needed_bytes {
            return Ok(());
        }
        // An answer before the end of the body would reach the client as a broken connection.
        if let Some(mut body) = body.take() {
            while body.next().await.is_some() {}
        }
        let message = format!("{free_bytes} bytes are free on the disk, {needed_bytes} are needed");
        let mut error = S3Error::with_message(S3ErrorCode::Custom(LOW_DISK_SPACE.into()), message);
        error.set_status_code(StatusCode::INSUFFICIENT_STORAGE);
        Err(error)
    }

    /// Writes an object through to the disk, with what describes it and the folders that lead to it.
    async fn sync(&self, bucket: String, key: String) -> S3Result<()> {
        self.on_disk(move |root| sync_object(root, &bucket, &key)).await
    }

    async fn on_disk<T, F>(&self, work: F) -> S3Result<T>
    where
        T: Send + 'static,
        F: FnOnce(&Path) -> io::Result<T> + Send + 'static,
    {
        let root = self.root.clone();
        tokio::task::spawn_blocking(move || work(&root))
            .await
            .map_err(S3Error::internal_error)?
            .map_err(S3Error::internal_error)
    }
}

fn check_key(key: &str) -> S3Result<()> {
    let is_plain = key.split('/').all(|segment| !["", ".", ".."].contains(&segment));
    if is_plain && key.len() <= MAX_KEY_BYTES {
        return Ok(());
    }
    let message = format!("a key has {MAX_KEY_BYTES} bytes at most, and no empty, '.' or '..' segments: {key:?}");
    Err(S3Error::with_message(S3ErrorCode::InvalidArgument, message))
}

async fn read_range(path: &Path, range: Option<Range>, len_bytes: u64) -> io::Result<StreamingBlob> {
    let mut file = tokio::fs::File::open(path).await?;
    match range {
        None => {}
        Some(Range::Int { first, .. }) => _ = file.seek(SeekFrom::Start(first)).await?,
        Some(Range::Suffix { .. }) => _ = file.seek(SeekFrom::End(-len_bytes.cast_signed())).await?,
    }
    Ok(StreamingBlob::wrap(ReaderStream::with_capacity(file.take(len_bytes), READ_BYTES)))
}

fn sync_object(root: &Path, bucket: &str, key: &str) -> io::Result<()> {
    let object = root.join(bucket).join(key);
    File::open(&object)?.sync_all()?;
    for kind in ["metadata", "internal"] {
        match File::open(root.join(description_name(bucket, key, kind))) {
            Ok(file) => file.sync_all()?,
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(error),
        }
    }
    for folder in object.ancestors().skip(1).take_while(|folder| folder.starts_with(root)) {
        File::open(folder)?.sync_all()?;
    }
    Ok(())
}

/// The file in which `s3s-fs` describes an object.
pub(super) fn description_name(bucket: &str, key: &str, kind: &str) -> String {
    let (bucket, key) = (URL_SAFE_NO_PAD.encode(bucket), URL_SAFE_NO_PAD.encode(key));
    format!(".bucket-{bucket}.object-{key}.{kind}.json")
}

/// The object that a description of `s3s-fs` belongs to, as bucket and key.
pub(super) fn described_object(name: &str) -> Option<(String, String)> {
    let name = name.strip_suffix(".metadata.json").or_else(|| name.strip_suffix(".internal.json"))?;
    let (bucket, key) = name.strip_prefix(".bucket-")?.split_once(".object-")?;
    let decode = |text: &str| String::from_utf8(URL_SAFE_NO_PAD.decode(text).ok()?).ok();
    Some((decode(bucket)?, decode(key)?))
}

/// The open upload that a description of `s3s-fs` belongs to, as bucket, key and identifier.
pub(super) fn described_upload(name: &str) -> Option<(String, String, String)> {
    let (object, id) = name.strip_suffix(".metadata.json")?.rsplit_once(".upload-")?;
    let (bucket, key) = described_object(&format!("{object}.metadata.json"))?;
    Some((bucket, key, id.to_owned()))
}

#[async_trait::async_trait]
impl S3 for DurableFiles {
    async fn head_bucket(&self, req: S3Request<HeadBucketInput>) -> S3Result<S3Response<HeadBucketOutput>> {
        self.files.head_bucket(req).await
    }

    async fn head_object(&self, req: S3Request<HeadObjectInput>) -> S3Result<S3Response<HeadObjectOutput>> {
        self.files.head_object(req).await
    }

    async fn get_object(&self, req: S3Request<GetObjectInput>) -> S3Result<S3Response<GetObjectOutput>> {
        let (range, path) = (req.input.range, self.root.join(&req.input.bucket).join(&req.input.key));
        check_key(&req.input.key)?;
        let mut response = self.files.get_object(req).await?;
        // The body that comes with it is read from the disk in pieces of 4 KiB, at a fifth of the speed.
        let len_bytes = response.output.content_length.unwrap_or(0).unsigned_abs();
        response.output.body = Some(read_range(&path, range, len_bytes).await.map_err(S3Error::internal_error)?);
        Ok(response)
    }

    async fn put_object(&self, mut req: S3Request<PutObjectInput>) -> S3Result<S3Response<PutObjectOutput>> {
        check_key(&req.input.key)?;
        self.check_space(&mut req.input.body, req.input.content_length).await?;
        let (bucket, key) = (req.input.bucket.clone(), req.input.key.clone());
        let response = self.files.put_object(req).await?;
        self.sync(bucket, key).await?;
        Ok(response)
    }

    async fn create_multipart_upload(
        &self,
        req: S3Request<CreateMultipartUploadInput>,
    ) -> S3Result<S3Response<CreateMultipartUploadOutput>> {
        check_key(&req.input.key)?;
        self.files.create_multipart_upload(req).await
    }

    async fn upload_part(&self, mut req: S3Request<UploadPartInput>) -> S3Result<S3Response<UploadPartOutput>> {
        self.check_space(&mut req.input.body, req.input.content_length).await?;
        self.files.upload_part(req).await
    }

    async fn complete_multipart_upload(
        &self,
        req: S3Request<CompleteMultipartUploadInput>,
    ) -> S3Result<S3Response<CompleteMultipartUploadOutput>> {
        check_key(&req.input.key)?;
        let this = self.clone();
        let completion = tokio::spawn(async move {
            let (bucket, key) = (req.input.bucket.clone(), req.input.key.clone());
            let response = this.files.complete_multipart_upload(req).await?;
            this.sync(bucket, key).await?;
            Ok(response)
        });
        completion.await.map_err(S3Error::internal_error)?
    }

    async fn abort_multipart_upload(
        &self,
        req: S3Request<AbortMultipartUploadInput>,
    ) -> S3Result<S3Response<AbortMultipartUploadOutput>> {
        self.files.abort_multipart_upload(req).await
    }

    async fn delete_object(&self, req: S3Request<DeleteObjectInput>) -> S3Result<S3Response<DeleteObjectOutput>> {
        self.files.delete_object(req).await
    }

    async fn delete_objects(&self, req: S3Request<DeleteObjectsInput>) -> S3Result<S3Response<DeleteObjectsOutput>> {
        self.files.delete_objects(req).await
    }

    /// Pages of 1000 keys. Listings by folders are left to `s3s-fs`: nothing here asks for them.
    async fn list_objects_v2(&self, req: S3Request<ListObjectsV2Input>) -> S3Result<S3Response<ListObjectsV2Output>> {
        if req.input.delimiter.is_some() {
            return self.files.list_objects_v2(req).await;
        }
        let ListObjectsV2Input { bucket, prefix, start_after, continuation_token, max_keys, .. } = req.input;
        let max = usize::try_from(max_keys.unwrap_or(1000)).unwrap_or_default().min(1000);
        let after = start_after.clone().max(continuation_token.clone()).unwrap_or_default();
        let (folder, begin) = (bucket.clone(), prefix.clone().unwrap_or_default());
        let (objects, is_truncated) =
            self.on_disk(move |root| listing::objects(&root.join(folder), &begin, &after, max)).await?;
        let last_key = objects.last().and_then(|object| object.key.clone());
        Ok(S3Response::new(ListObjectsV2Output {
            name: Some(bucket),
            prefix,
            start_after,
            continuation_token,
            max_keys,
            key_count: i32::try_from(objects.len()).ok(),
            is_truncated: Some(is_truncated),
            next_continuation_token: last_key.filter(|_| is_truncated),
            contents: Some(objects),
            ..ListObjectsV2Output::default()
        }))
    }

    /// In one page: a process has few uploads open.
    async fn list_multipart_uploads(
        &self,
        req: S3Request<ListMultipartUploadsInput>,
    ) -> S3Result<S3Response<ListMultipartUploadsOutput>> {
        let ListMultipartUploadsInput { bucket, prefix, .. } = req.input;
        let (of_bucket, begin) = (bucket.clone(), prefix.clone().unwrap_or_default());
        let uploads = self.on_disk(move |root| listing::uploads(root, &of_bucket, &begin)).await?;
        Ok(S3Response::new(ListMultipartUploadsOutput {
            bucket: Some(bucket),
            prefix,
            is_truncated: Some(false),
            uploads: Some(uploads),
            ..ListMultipartUploadsOutput::default()
        }))
    }
}
