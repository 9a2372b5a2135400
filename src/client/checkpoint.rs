//! `relora checkpoint …`: what every kind of node has, and the import of checkpoints from outside.

use std::path::{Path, PathBuf};

use anyhow::{Context as _, ensure};
use clap::Subcommand;
use futures_util::StreamExt as _;
use indicatif::ProgressBar;
use reqwest::{
    Body, Method,
    multipart::{Form, Part},
};
use tokio_util::io::ReaderStream;

use super::{
    Outcome,
    http::{Http, parse},
    node, print,
    upload::{PIECE_BYTES, progress_bar},
};
use crate::domain::checkpoint::{TAKEN_FILES, is_taken};

#[derive(Debug, Subcommand)]
pub enum Command {
    /// Upload a LLaMA model as `transformers` stores it, to continue from it.
    Import {
        /// The model's folder.
        folder: PathBuf,
        /// By default the name of the folder.
        #[arg(long)]
        name: Option<String>,
        #[arg(long)]
        json: bool,
    },
    #[command(flatten)]
    Node(node::Command),
}

pub async fn run(http: &Http, command: Command) -> anyhow::Result<Outcome> {
    match command {
        Command::Import { folder, name, json } => import(http, &folder, name, json).await?,
        Command::Node(command) => return node::run(http, "checkpoints", command).await,
    }
    Ok(Outcome::Done)
}

/// A file of the checkpoint.
struct Source {
    path: PathBuf,
    name: String,
    size_bytes: u64,
}

async fn import(http: &Http, folder: &Path, name: Option<String>, json: bool) -> anyhow::Result<()> {
    let files = find_files(folder)?;
    let bar = progress_bar(files.iter().map(|file| file.size_bytes).sum());
    let mut form = Form::new();
    if let Some(name) = name.or_else(|| Some(folder.canonicalize().ok()?.file_name()?.to_string_lossy().into_owned())) {
        form = form.text("name", name);
    }
    for file in files {
        form = form.part("file", part(file, &bar).await?);
    }
    let sent = http.send_for_json(http.request(Method::POST, &["v1", "checkpoints"]).multipart(form)).await;
    bar.finish_and_clear();
    let answer = sent.with_context(|| format!("import {}", folder.display()))?;
    if json {
        return Ok(print::json(&answer)?);
    }
    Ok(print::line(&node::describe(&parse(answer)?))?)
}

/// What the server takes of a folder; the rest is named and left out.
fn find_files(folder: &Path) -> anyhow::Result<Vec<Source>> {
    let mut files = Vec::new();
    for entry in std::fs::read_dir(folder).with_context(|| format!("read the folder {}", folder.display()))? {
        let entry = entry.with_context(|| format!("read the folder {}", folder.display()))?;
        let (path, name) = (entry.path(), entry.file_name().to_string_lossy().into_owned());
        // Caches of downloads hold links.
        let metadata = std::fs::metadata(&path).with_context(|| format!("read {}", path.display()))?;
        if metadata.is_file() && is_taken(&name) {
            files.push(Source { path, name, size_bytes: metadata.len() });
        } else {
            eprintln!("left out: {}", path.display());
        }
    }
    ensure!(!files.is_empty(), "{} holds no file of a checkpoint: {TAKEN_FILES}", folder.display());
    // Small files first: what is wrong with them is known without the weights.
    files.sort_by(|a, b| (a.size_bytes, &a.name).cmp(&(b.size_bytes, &b.name)));
    Ok(files)
}

async fn part(file: Source, bar: &ProgressBar) -> anyhow::Result<Part> {
    let source = tokio::fs::File::open(&file.path).await.with_context(|| format!("open {}", file.path.display()))?;
    let counted = bar.clone();
    let pieces = ReaderStream::with_capacity(source, PIECE_BYTES)
        .inspect(move |piece| counted.inc(piece.as_ref().map_or(0, |bytes| bytes.len() as u64)));
    Ok(Part::stream_with_length(Body::wrap_stream(pieces), file.size_bytes).file_name(file.name))
}
