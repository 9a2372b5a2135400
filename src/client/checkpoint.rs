//! `relora checkpoint …`: what every kind of node has, and the import of checkpoints from outside.

use std::{
    fs,
    io::{self, Read as _},
    path::{Path, PathBuf},
};

use anyhow::{Context as _, bail, ensure};
use bytes::Bytes;
use clap::Subcommand;
use futures_util::StreamExt as _;
use indicatif::ProgressBar;
use reqwest::{
    Body, Method,
    multipart::{Form, Part},
};
use tokio_util::io::ReaderStream;

use super::{
    Outcome, deletion,
    http::{Http, parse},
    node, print,
    upload::{PIECE_BYTES, progress_bar},
};
use crate::domain::checkpoint::{CONFIG_FILE, Excerpt, TAKEN_FILES, is_taken, is_weights, max_bytes, too_large};

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
    /// Delete checkpoints: those that are named, or all to which every given option applies.
    Delete(deletion::Selection),
    /// Keep checkpoints, whatever the policy of their job says, until they are unpinned.
    Pin {
        #[arg(required = true)]
        ids: Vec<String>,
    },
    Unpin {
        #[arg(required = true)]
        ids: Vec<String>,
    },
    #[command(flatten)]
    Node(node::Command),
}

pub async fn run(http: &Http, command: Command) -> anyhow::Result<Outcome> {
    match command {
        Command::Import { folder, name, json } => import(http, &folder, name, json).await?,
        Command::Delete(selection) => deletion::of_checkpoints(http, selection).await?,
        Command::Pin { ids } => set_pinned(http, &ids, Method::PUT).await?,
        Command::Unpin { ids } => set_pinned(http, &ids, Method::DELETE).await?,
        Command::Node(command) => return node::run(http, "checkpoints", command).await,
    }
    Ok(Outcome::Done)
}

/// The method says whether the pin is put or taken out.
async fn set_pinned(http: &Http, ids: &[String], method: Method) -> anyhow::Result<()> {
    for id in ids {
        let request = http.request(method.clone(), &["v1", "checkpoints", id, "pin"]);
        print::line(&node::describe(&parse(http.send_for_json(request).await?)?))?;
    }
    Ok(())
}

/// A file of the checkpoint.
struct Source {
    path: PathBuf,
    name: String,
    size_bytes: u64,
}

async fn import(http: &Http, folder: &Path, name: Option<String>, json: bool) -> anyhow::Result<()> {
    let files = find_files(folder)?;
    let files = tokio::task::spawn_blocking(|| check(&files).map(|()| files)).await?;
    let files = files.with_context(|| format!("{} cannot be imported", folder.display()))?;
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
    for entry in fs::read_dir(folder).with_context(|| format!("read the folder {}", folder.display()))? {
        let entry = entry.with_context(|| format!("read the folder {}", folder.display()))?;
        let (path, name) = (entry.path(), entry.file_name().to_string_lossy().into_owned());
        if !is_taken(&name) {
            eprintln!("left out: {}", path.display());
            continue;
        }
        // Caches of downloads hold links.
        let metadata = fs::metadata(&path).with_context(|| format!("read {}", path.display()))?;
        ensure!(metadata.is_file(), "{} is no file; a checkpoint's file has this name", path.display());
        files.push(Source { path, name, size_bytes: metadata.len() });
    }
    ensure!(!files.is_empty(), "{} holds no file of a checkpoint: {TAKEN_FILES}", folder.display());
    // The server does not wait for the weights of a model that it refuses, whose configuration came before them.
    files.sort_by_key(|file| (is_weights(&file.name), file.name != CONFIG_FILE, file.name.clone()));
    Ok(files)
}

/// What the server would refuse is refused before anything is sent.
fn check(files: &[Source]) -> anyhow::Result<()> {
    let mut excerpt = Excerpt::default();
    for file in files {
        add(&mut excerpt, file).with_context(|| format!("read {}", file.path.display()))?;
    }
    let Err(problems) = excerpt.check() else { return Ok(()) };
    let lines: Vec<_> = problems.iter().map(|problem| format!("  {}: {}", problem.pointer, problem.message)).collect();
    bail!("the server would not take it, nothing was sent\n{}", lines.join("\n"))
}

fn add(excerpt: &mut Excerpt, file: &Source) -> io::Result<()> {
    match max_bytes(&file.name) {
        Some(limit_bytes) if file.size_bytes > limit_bytes => {
            excerpt.add_problem(&file.name, too_large(&file.name, limit_bytes));
        }
        Some(_) => excerpt.add_small_file(&file.name, fs::read(&file.path)?.into()),
        None => {
            let mut source = fs::File::open(&file.path)?;
            let mut prefix = Vec::new();
            source.by_ref().take(8).read_to_end(&mut prefix)?;
            if let Some(range) = excerpt.header_range(&file.name, &prefix, file.size_bytes) {
                let mut header = Vec::new();
                source.take(range.end - range.start).read_to_end(&mut header)?;
                excerpt.add_header(&file.name, Bytes::from(header), file.size_bytes);
            }
        }
    }
    Ok(())
}

async fn part(file: Source, bar: &ProgressBar) -> anyhow::Result<Part> {
    let source = tokio::fs::File::open(&file.path).await.with_context(|| format!("open {}", file.path.display()))?;
    let counted = bar.clone();
    let pieces = ReaderStream::with_capacity(source, PIECE_BYTES)
        .inspect(move |piece| counted.inc(piece.as_ref().map_or(0, |bytes| bytes.len() as u64)));
    Ok(Part::stream_with_length(Body::wrap_stream(pieces), file.size_bytes).file_name(file.name))
}
