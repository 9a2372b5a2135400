//! `relora job …`: submit, look at, watch and steer training jobs.

use std::path::{Path, PathBuf};

use anyhow::{Context as _, ensure};
use clap::Subcommand;
use futures_util::StreamExt as _;
use serde_json::{Map, Value};

use super::{
    Outcome, deletion,
    http::{Http, parse},
    print,
    resources::{Job, Metric},
    watch,
};

#[derive(Debug, Subcommand)]
pub enum Command {
    /// Submit a training spec.
    Submit {
        /// A JSON file.
        spec: PathBuf,
        /// Replaces the spec's "dataset", and its "tokenization" by that dataset's newest.
        #[arg(long)]
        dataset: Option<String>,
        /// Stay and show the job until it is over.
        #[arg(long)]
        watch: bool,
        #[arg(long)]
        json: bool,
    },
    List {
        /// Only jobs in this state.
        #[arg(long)]
        state: Option<String>,
        #[arg(long)]
        json: bool,
    },
    Show {
        id: String,
        #[arg(long)]
        json: bool,
    },
    /// End a job; what it has trained is kept as a checkpoint.
    Cancel {
        id: String,
        /// End it at once, without that checkpoint.
        #[arg(long)]
        force: bool,
        #[arg(long)]
        json: bool,
    },
    /// Save a job's state and free its worker.
    Pause {
        id: String,
        #[arg(long)]
        json: bool,
    },
    /// Queue a paused job again.
    Resume {
        id: String,
        #[arg(long)]
        json: bool,
    },
    /// Queue a job again that failed or was cancelled, to go on from its last state.
    Retry {
        id: String,
        #[arg(long)]
        json: bool,
    },
    /// Submit a job that begins with a checkpoint, with the spec of the job that made it.
    Fork {
        /// The checkpoint, node_….
        checkpoint: String,
        /// A JSON file with what is to be different.
        changes: Option<PathBuf>,
        /// Stay and show the job until it is over.
        #[arg(long)]
        watch: bool,
        #[arg(long)]
        json: bool,
    },
    /// Delete the bases, restarts and states of a job that is over. Its checkpoints stay.
    DeleteLineage {
        id: String,
        /// Only say what it would come to.
        #[arg(long)]
        dry_run: bool,
        #[arg(long)]
        json: bool,
    },
    /// Show a job live until it is over; the exit code is 0 if it succeeded, 1 if it failed, 3 if it
    /// was cancelled.
    Watch { id: String },
    /// Print what the trainers wrote, every attempt in order.
    Logs { id: String },
    /// Print losses, learning rates and the like by step.
    Metrics {
        id: String,
        /// Only the metric of this name.
        #[arg(long)]
        name: Option<String>,
        #[arg(long)]
        json: bool,
    },
}

pub async fn run(http: &Http, command: Command) -> anyhow::Result<Outcome> {
    match command {
        Command::Submit { spec, dataset, watch, json } => {
            return submit(http, &["v1", "jobs"], read_spec(&spec, dataset)?, watch, json).await;
        }
        Command::Watch { id } => return watch_until_over(http, &id).await,
        Command::List { state, json } => list(http, state.as_deref(), json).await?,
        Command::Show { id, json } => show(http.get(&["v1", "jobs", &id]).await?, json)?,
        Command::Fork { checkpoint, changes, watch, json } => {
            let changes = changes.map_or(Ok(Value::Object(Map::new())), |path| read_spec(&path, None))?;
            return submit(http, &["v1", "checkpoints", &checkpoint, "fork"], changes, watch, json).await;
        }
        Command::Cancel { id, force, json } => {
            let query: &[_] = if force { &[("force", "true")] } else { &[] };
            show(http.command(&["v1", "jobs", &id, "cancel"], query).await?, json)?;
        }
        Command::Pause { id, json } => show(http.command(&["v1", "jobs", &id, "pause"], &[]).await?, json)?,
        Command::Resume { id, json } => show(http.command(&["v1", "jobs", &id, "resume"], &[]).await?, json)?,
        Command::Retry { id, json } => show(http.command(&["v1", "jobs", &id, "retry"], &[]).await?, json)?,
        Command::DeleteLineage { id, dry_run, json } => deletion::of_lineage(http, &id, dry_run, json).await?,
        Command::Logs { id } => logs(http, &id).await?,
        Command::Metrics { id, name, json } => metrics(http, &id, name.as_deref(), json).await?,
    }
    Ok(Outcome::Done)
}

fn read_spec(path: &Path, dataset: Option<String>) -> anyhow::Result<Value> {
    let text = std::fs::read_to_string(path).with_context(|| format!("read {}", path.display()))?;
    let mut spec: Value = serde_json::from_str(&text).with_context(|| format!("{} is no JSON", path.display()))?;
    if let Some(dataset) = dataset {
        let fields = spec.as_object_mut().with_context(|| format!("{} is no JSON object", path.display()))?;
        fields.insert("dataset".into(), dataset.into());
        fields.remove("tokenization");
    }
    Ok(spec)
}

async fn submit(http: &Http, path: &[&str], spec: Value, watch: bool, json: bool) -> anyhow::Result<Outcome> {
    let answer = http.post(path, &spec).await?;
    let job: Job = parse(answer.clone())?;
    for warning in &job.warnings {
        eprintln!("warning: {warning}");
    }
    if json {
        print::json(&answer)?;
    } else {
        print::line(&format!("job {}  {:?}  {}", job.id, job.name, word(job.state)))?;
    }
    if watch { watch_until_over(http, job.id.as_str()).await } else { Ok(Outcome::Done) }
}

/// The user may look away at any time: that is not what cancels a job.
async fn watch_until_over(http: &Http, id: &str) -> anyhow::Result<Outcome> {
    let job = tokio::select! {
        job = watch::watch(http, id) => job?,
        interrupted = tokio::signal::ctrl_c() => {
            interrupted.context("listen for Ctrl-C")?;
            eprintln!("\n{id} goes on; `relora job watch {id}` shows it again, `relora job cancel {id}` ends it");
            return Ok(Outcome::StoppedWatching);
        }
    };
    print::line(&describe(&job))?;
    Ok(Outcome::of(job.state))
}

async fn list(http: &Http, state: Option<&str>, json: bool) -> anyhow::Result<()> {
    let filter: Vec<_> = state.map(|state| ("state", state)).into_iter().collect();
    let items = http.list(&["v1", "jobs"], &filter).await?;
    if json {
        return Ok(print::json_list(items)?);
    }
    let mut rows = Vec::with_capacity(items.len());
    for item in items {
        let job: Job = parse(item)?;
        let progress = job.progress.as_ref();
        rows.push([
            job.id.to_string(),
            job.name,
            word(job.state),
            print::or_dash(progress.map(|progress| format!("{}/{}", progress.step, progress.num_steps))),
            print::or_dash(progress.and_then(|progress| progress.loss).map(|loss| format!("{loss:.4}"))),
            print::or_dash(job.stored_bytes.map(print::size)),
            job.created_at.format("%Y-%m-%d %H:%M:%S").to_string(),
        ]);
    }
    Ok(print::table(["id", "name", "state", "step", "loss", "stored", "created (UTC)"], &rows)?)
}

fn show(answer: Value, json: bool) -> anyhow::Result<()> {
    if json { Ok(print::json(&answer)?) } else { Ok(print::line(&describe(&parse(answer)?))?) }
}

async fn logs(http: &Http, id: &str) -> anyhow::Result<()> {
    let mut pieces = http.open(&["v1", "jobs", id, "logs"], "text/plain").await?.bytes_stream();
    while let Some(piece) = pieces.next().await {
        print::bytes(&piece.context("the logs broke off")?)?;
    }
    Ok(())
}

async fn metrics(http: &Http, id: &str, name: Option<&str>, json: bool) -> anyhow::Result<()> {
    let filter: Vec<_> = name.map(|name| ("name", name)).into_iter().collect();
    let items = http.list_after(&["v1", "jobs", id, "metrics"], &filter, "after_step").await?;
    if json {
        return Ok(print::json_list(items)?);
    }
    ensure!(!items.is_empty(), "{id} has no such metrics yet");
    let mut rows = Vec::with_capacity(items.len());
    for item in items {
        let metric: Metric = parse(item)?;
        rows.push([metric.step.to_string(), metric.name, metric.value.to_string()]);
    }
    Ok(print::table(["step", "name", "value"], &rows)?)
}

/// What a person wants to know of a job, a line per thing.
fn describe(job: &Job) -> String {
    let mut lines = vec![format!("job {}  {:?}  {}", job.id, job.name, word(job.state))];
    if let Some(reason) = job.wait_reason {
        lines.push(format!("  waits: {}, position {}", word(reason), print::or_dash(job.queue_position)));
    }
    if let Some(progress) = &job.progress {
        lines.push(format!("  step {}/{}  {}", progress.step, progress.num_steps, watch::describe(progress)));
    }
    if let Some(bytes) = job.stored_bytes.filter(|&bytes| bytes > 0) {
        lines.push(format!("  stored: {}", print::size(bytes)));
    }
    if let (Some(from), Some(to)) = (job.started_at, job.finished_at) {
        lines.push(format!("  took {}", print::duration((to - from).as_seconds_f64())));
    }
    lines.extend(job.warnings.iter().map(|warning| format!("  warning: {warning}")));
    if let Some(failure) = &job.failure {
        let advice = if failure.retryable { "; trying again can help" } else { "" };
        lines.push(format!("  failed ({}{advice}): {}", word(failure.kind), failure.message));
        lines.extend(failure.log_tail.lines().map(|line| format!("    | {line}")));
    }
    lines.join("\n")
}

/// A value of one of the API's enums as the API writes it.
pub fn word(value: impl serde::Serialize) -> String {
    serde_json::to_value(value).ok().and_then(|value| value.as_str().map(str::to_owned)).unwrap_or_default()
}
