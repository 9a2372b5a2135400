//! `relora base|restart|checkpoint …`: the weights that a job left, and how they are brought home.

use std::path::{Path, PathBuf};

use anyhow::Context as _;
use clap::Subcommand;
use serde_json::Value;

use super::{
    Outcome, download,
    download::Fetched,
    http::{Http, parse},
    print,
    resources::Node,
};

#[derive(Debug, Subcommand)]
pub enum Command {
    List {
        /// Only those of this job.
        #[arg(long)]
        job: Option<String>,
        /// Also what a later attempt replaced.
        #[arg(long)]
        include_superseded: bool,
        #[arg(long)]
        json: bool,
    },
    Show {
        id: String,
        #[arg(long)]
        json: bool,
    },
    /// Download every file and check its SHA-256. Run again, it goes on where it broke off.
    Download {
        id: String,
        /// The folder to download to; made if it is not there.
        #[arg(long)]
        out: PathBuf,
    },
}

/// `collection` is the resource's name in URLs: bases, restarts or checkpoints.
pub async fn run(http: &Http, collection: &str, command: Command) -> anyhow::Result<Outcome> {
    match command {
        Command::List { job, include_superseded, json } => {
            let mut filter: Vec<_> = job.iter().map(|job| ("job", job.as_str())).collect();
            if include_superseded {
                filter.push(("include_superseded", "true"));
            }
            list(http.list(&["v1", collection], &filter).await?, json)?;
        }
        Command::Show { id, json } => show(http.get(&["v1", collection, &id]).await?, json)?,
        Command::Download { id, out } => download(http, collection, &id, &out).await?,
    }
    Ok(Outcome::Done)
}

fn list(items: Vec<Value>, json: bool) -> anyhow::Result<()> {
    if json {
        return Ok(print::json_list(items)?);
    }
    let mut rows = Vec::with_capacity(items.len());
    for item in items {
        let node: Node = parse(item)?;
        rows.push([
            node.id.to_string(),
            origin(&node),
            node.step.to_string(),
            node.restart.to_string(),
            print::size(node.size_bytes),
            marks(&node),
            node.created_at.format("%Y-%m-%d %H:%M:%S").to_string(),
        ]);
    }
    Ok(print::table(["id", "from", "step", "restart", "size", "", "created (UTC)"], &rows)?)
}

fn show(answer: Value, json: bool) -> anyhow::Result<()> {
    if json {
        return Ok(print::json(&answer)?);
    }
    let node: Node = parse(answer)?;
    print::line(&describe(&node))?;
    let rows: Vec<_> =
        node.files.into_iter().map(|file| [file.name, print::size(file.size_bytes), file.sha256]).collect();
    Ok(print::table(["file", "size", "sha256"], &rows)?)
}

/// What sets a node apart from others, if anything does.
fn marks(node: &Node) -> String {
    let marks = [(node.pinned, "pinned"), (node.superseded, "superseded"), (node.deleted_at.is_some(), "deleted")];
    marks.into_iter().filter(|(is_so, _)| *is_so).map(|(_, mark)| mark).collect::<Vec<_>>().join(", ")
}

/// The job that made a node, or what was imported.
fn origin(node: &Node) -> String {
    match (&node.job, &node.name) {
        (Some(job), _) => job.to_string(),
        (None, Some(name)) => format!("import {name:?}"),
        (None, None) => "import".into(),
    }
}

pub fn describe(node: &Node) -> String {
    let (step, restart) = (node.step, node.restart);
    let (size, marks) = (print::size(node.size_bytes), marks(node));
    format!("{}  {}  step {step}  restart {restart}  {size}  {marks}", node.id, origin(node)).trim_end().to_owned()
}

async fn download(http: &Http, collection: &str, id: &str, out: &Path) -> anyhow::Result<()> {
    let node: Node = parse(http.get(&["v1", collection, id]).await?)?;
    tokio::fs::create_dir_all(out).await.with_context(|| format!("make the folder {}", out.display()))?;
    for file in &node.files {
        let segments = ["v1", collection, id, "files", &file.name];
        let fetched = download::fetch(http, &segments, file, out).await?;
        let how = match fetched {
            Fetched::Downloaded => "downloaded",
            Fetched::AlreadyThere => "was there",
        };
        let path = out.join(&file.name);
        print::line(&format!("{how}  {}  {}  sha256 {}", path.display(), print::size(file.size_bytes), file.sha256))?;
    }
    Ok(())
}
