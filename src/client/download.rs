//! Downloads that can be taken up where they broke off, and that are checked before they are believed.
//!
//! A file exists under its own name only once its size and SHA-256 are those that the server names;
//! until then it is `NAME.part`.

use std::path::{Path, PathBuf};

use anyhow::{Context as _, anyhow, bail, ensure};
use futures_util::StreamExt as _;
use indicatif::{ProgressBar, ProgressStyle};
use reqwest::{Method, StatusCode, header};
use sha2::{Digest as _, Sha256};
use tokio::{
    fs::{self, File, OpenOptions},
    io::{AsyncReadExt as _, AsyncWriteExt as _, BufWriter},
    time::{Duration, sleep, timeout},
};

use super::{
    http::{Http, HttpError},
    print,
    resources::NodeFile,
};

const BUFFER_BYTES: usize = 1 << 20;
/// In a row, each without a single byte.
const MAX_FRUITLESS_TRIES: u32 = 5;
const SILENCE: Duration = Duration::from_secs(30);

/// How a file came to be there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fetched {
    AlreadyThere,
    Downloaded,
}

/// Brings one file of a node into `folder`. `segments` are the path of the file's URL.
pub async fn fetch(http: &Http, segments: &[&str], file: &NodeFile, folder: &Path) -> anyhow::Result<Fetched> {
    let target = folder.join(plain_name(&file.name)?);
    if is_verified(&target, file).await? {
        return Ok(Fetched::AlreadyThere);
    }
    let mut part = Part::open(target.with_added_extension("part"), file).await?;
    let bar = progress_bar(file);
    let mut fruitless_tries = 0;
    while part.size_bytes < file.size_bytes {
        let before = part.size_bytes;
        let tried = part.go_on(http, segments, &bar).await;
        if part.size_bytes >= file.size_bytes {
            break;
        }
        fruitless_tries = if part.size_bytes > before { 0 } else { fruitless_tries + 1 };
        let error = tried.err().unwrap_or_else(|| anyhow!("the server sent less than the whole file"));
        let is_final = error.downcast_ref::<HttpError>().is_some_and(|error| !error.may_pass());
        if is_final || fruitless_tries >= MAX_FRUITLESS_TRIES {
            return Err(error.context(format!("download {}", file.name)));
        }
        bar.suspend(|| eprintln!("{}: broke off at byte {}, going on ({error:#})", file.name, part.size_bytes));
        sleep(Duration::from_secs(1)).await;
    }
    bar.finish_and_clear();
    part.finish(file, &target).await?;
    Ok(Fetched::Downloaded)
}

/// The name comes from the server and must not lead out of the folder.
fn plain_name(name: &str) -> anyhow::Result<&str> {
    let is_plain = !name.is_empty() && name != "." && name != ".." && !name.contains(['/', '\\', '\0']);
    ensure!(is_plain, "the server names a file {name:?}, which is no plain file name");
    Ok(name)
}

async fn is_verified(path: &Path, file: &NodeFile) -> anyhow::Result<bool> {
    match fs::metadata(path).await {
        Ok(metadata) if metadata.len() == file.size_bytes => {
            let (_, sha256) = hash(path).await?;
            Ok(hex::encode(sha256.finalize()) == file.sha256)
        }
        _ => Ok(false),
    }
}

/// The number of bytes in the file, and their running hash.
async fn hash(path: &Path) -> anyhow::Result<(u64, Sha256)> {
    let mut file = File::open(path).await.with_context(|| format!("open {}", path.display()))?;
    let (mut sha256, mut size_bytes) = (Sha256::new(), 0);
    let mut buffer = vec![0; BUFFER_BYTES];
    loop {
        let read = file.read(&mut buffer).await.with_context(|| format!("read {}", path.display()))?;
        if read == 0 {
            return Ok((size_bytes, sha256));
        }
        sha256.update(&buffer[..read]);
        size_bytes += read as u64;
    }
}

/// What is there of a file so far.
struct Part {
    path: PathBuf,
    size_bytes: u64,
    sha256: Sha256,
}

impl Part {
    /// Takes up what an earlier download left, unless it cannot be the beginning of this file.
    async fn open(path: PathBuf, file: &NodeFile) -> anyhow::Result<Self> {
        if fs::metadata(&path).await.is_ok_and(|metadata| metadata.len() <= file.size_bytes) {
            let (size_bytes, sha256) = hash(&path).await?;
            return Ok(Self { path, size_bytes, sha256 });
        }
        File::create(&path).await.with_context(|| format!("create {}", path.display()))?;
        Ok(Self { path, size_bytes: 0, sha256: Sha256::new() })
    }

    /// Appends what the server sends, from where the part ends.
    async fn go_on(&mut self, http: &Http, segments: &[&str], bar: &ProgressBar) -> anyhow::Result<()> {
        let mut request = http.request(Method::GET, segments);
        if self.size_bytes > 0 {
            request = request.header(header::RANGE, format!("bytes={}-", self.size_bytes));
        }
        let response = http.send(request).await?;
        let is_rest = response.status() == StatusCode::PARTIAL_CONTENT;
        if self.size_bytes > 0 && !is_rest {
            (self.size_bytes, self.sha256) = (0, Sha256::new());
        }
        let file = OpenOptions::new().append(is_rest).write(true).truncate(!is_rest).open(&self.path).await;
        let file = file.with_context(|| format!("open {}", self.path.display()))?;
        let mut file = BufWriter::with_capacity(BUFFER_BYTES, file);
        let received = self.receive(response, &mut file, bar).await;
        // What came before a break is kept, so it must reach the file in any case.
        file.flush().await.with_context(|| format!("write {}", self.path.display()))?;
        received
    }

    async fn receive(
        &mut self,
        response: reqwest::Response,
        file: &mut BufWriter<File>,
        bar: &ProgressBar,
    ) -> anyhow::Result<()> {
        let mut pieces = response.bytes_stream();
        while let Some(piece) = timeout(SILENCE, pieces.next()).await.context("nothing came for 30 s")? {
            let piece = piece.context("the connection broke off")?;
            file.write_all(&piece).await.with_context(|| format!("write {}", self.path.display()))?;
            self.sha256.update(&piece);
            self.size_bytes += piece.len() as u64;
            bar.set_position(self.size_bytes);
        }
        Ok(())
    }

    async fn finish(self, file: &NodeFile, target: &Path) -> anyhow::Result<()> {
        let found = hex::encode(self.sha256.finalize());
        if self.size_bytes != file.size_bytes || found != file.sha256 {
            fs::remove_file(&self.path).await.with_context(|| format!("remove {}", self.path.display()))?;
            bail!(
                "{} is damaged: {} bytes with SHA-256 {found} came, not {} with {}; it was removed, try again",
                file.name,
                self.size_bytes,
                file.size_bytes,
                file.sha256
            );
        }
        let part = File::open(&self.path).await.with_context(|| format!("open {}", self.path.display()))?;
        part.sync_all().await.with_context(|| format!("write {}", self.path.display()))?;
        fs::rename(&self.path, target).await.with_context(|| format!("rename to {}", target.display()))
    }
}

fn progress_bar(file: &NodeFile) -> ProgressBar {
    if !print::is_terminal() {
        return ProgressBar::hidden();
    }
    let style = ProgressStyle::with_template("{msg} {bar:30} {decimal_bytes}/{decimal_total_bytes}  {eta} left")
        .expect("the template is well-formed");
    ProgressBar::new(file.size_bytes).with_style(style).with_message(file.name.clone())
}
