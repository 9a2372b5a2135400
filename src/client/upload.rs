//! Sends a file or a folder as the content of a dataset. Memory stays bounded by the largest single
//! document, however much is sent.

use std::path::{Path, PathBuf};

use anyhow::{Context as _, ensure};
use async_stream::try_stream;
use bytes::Bytes;
use futures_util::{Stream, StreamExt as _};
use indicatif::{ProgressBar, ProgressStyle};
use reqwest::{Body, Method, header};
use serde_json::Value;
use tokio_util::io::ReaderStream;

use super::{
    folder::{self, Selection, SourceFile},
    http::{Http, HttpError, parse},
    print,
    resources::Dataset,
};

/// Small documents go out together, in pieces of about this size.
pub const PIECE_BYTES: usize = 256 * 1024;

/// What there is to send.
#[derive(Debug)]
pub enum Content {
    /// Every file a document.
    Folder(Vec<SourceFile>),
    /// JSON lines (`.jsonl`), or else one document.
    File { path: PathBuf, size_bytes: u64, is_jsonl: bool },
}

impl Content {
    /// Looks at `path` before anything is asked of the server.
    pub fn find(path: &Path, selection: &Selection) -> anyhow::Result<Self> {
        let metadata = std::fs::metadata(path).with_context(|| format!("read {}", path.display()))?;
        if metadata.is_dir() {
            let files = selection.files(path)?;
            ensure!(!files.is_empty(), "{} holds no file that is selected", path.display());
            return Ok(Self::Folder(files));
        }
        let is_jsonl = path.extension().is_some_and(|extension| extension == "jsonl");
        Ok(Self::File { path: path.to_owned(), size_bytes: metadata.len(), is_jsonl })
    }

    fn size_bytes(&self) -> u64 {
        match self {
            Self::Folder(files) => files.iter().map(|file| file.size_bytes).sum(),
            Self::File { size_bytes, .. } => *size_bytes,
        }
    }

    fn media_type(&self) -> &'static str {
        match self {
            Self::Folder(_) | Self::File { is_jsonl: true, .. } => "application/jsonl",
            Self::File { is_jsonl: false, .. } => "text/plain",
        }
    }
}

/// Uploads, and returns the dataset as the server has it then.
pub async fn send(http: &Http, dataset_id: &str, content: Content) -> anyhow::Result<Value> {
    let bar = progress_bar(content.size_bytes());
    let mut request = http
        .request(Method::PUT, &["v1", "datasets", dataset_id, "content"])
        .header(header::CONTENT_TYPE, content.media_type());
    request = match content {
        Content::Folder(files) => request.body(Body::wrap_stream(lines(files, bar.clone()))),
        Content::File { path, size_bytes, .. } => {
            let file = tokio::fs::File::open(&path).await.with_context(|| format!("open {}", path.display()))?;
            let counted = bar.clone();
            let pieces = ReaderStream::with_capacity(file, PIECE_BYTES)
                .inspect(move |piece| counted.inc(piece.as_ref().map_or(0, |bytes| bytes.len() as u64)));
            request.header(header::CONTENT_LENGTH, size_bytes).body(Body::wrap_stream(pieces))
        }
    };
    let sent = http.send_for_json(request).await;
    bar.finish_and_clear();
    match sent {
        Ok(dataset) => Ok(dataset),
        Err(error) => Err(with_reason(http, dataset_id, error).await),
    }
}

/// A server that refuses an upload midway may close before its answer is read; the dataset says why.
async fn with_reason(http: &Http, dataset_id: &str, error: HttpError) -> anyhow::Error {
    let reason = match &error {
        HttpError::Refused(_) => None,
        _ => http.get(&["v1", "datasets", dataset_id]).await.ok().and_then(|d| parse::<Dataset>(d).ok()?.error),
    };
    match reason {
        Some(reason) => anyhow::Error::new(error).context(format!("dataset {dataset_id} is not ready: {reason}")),
        None => anyhow::Error::new(error).context(format!("upload to dataset {dataset_id}")),
    }
}

/// The documents of a folder as JSON lines. What is no text is skipped, and named.
fn lines(files: Vec<SourceFile>, bar: ProgressBar) -> impl Stream<Item = std::io::Result<Bytes>> + Send + 'static {
    try_stream! {
        let mut piece = Vec::with_capacity(PIECE_BYTES);
        for file in files {
            let content = tokio::fs::read(&file.path)
                .await
                .map_err(|error| std::io::Error::new(error.kind(), format!("{}: {error}", file.path.display())))?;
            bar.inc(file.size_bytes);
            match folder::json_line(&file, &content) {
                Ok(line) => piece.extend_from_slice(&line),
                Err(reason) => bar.suspend(|| eprintln!("skipped: {} {reason}", file.path.display())),
            }
            if piece.len() >= PIECE_BYTES {
                yield Bytes::from(std::mem::take(&mut piece));
            }
        }
        if !piece.is_empty() {
            yield Bytes::from(piece);
        }
    }
}

pub fn progress_bar(size_bytes: u64) -> ProgressBar {
    if !print::is_terminal() {
        return ProgressBar::hidden();
    }
    let template = "uploading {bar:30} {decimal_bytes}/{decimal_total_bytes}  {decimal_bytes_per_sec}  {eta} left";
    let style = ProgressStyle::with_template(template).expect("the template is well-formed");
    ProgressBar::new(size_bytes).with_style(style)
}
