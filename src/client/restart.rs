//! `relora restart …`: what every kind of node has, and the tasks on the lineage up to a restart.

use std::time::Duration;

use anyhow::bail;
use clap::Subcommand;
use indicatif::{ProgressBar, ProgressStyle};
use reqwest::Method;
use serde_json::Value;

use super::{
    Outcome,
    http::{Http, parse},
    node, print,
    resources::{LineageTask, LineageTaskState, Verification},
};

const POLL_EVERY: Duration = Duration::from_millis(300);

#[derive(Debug, Subcommand)]
pub enum Command {
    /// Add the deltas to their base again and compare the weights with the merged ones, and read every file again.
    Verify(Task),
    /// Rebuild the full weights after a restart, as a checkpoint.
    Materialize(Task),
    #[command(flatten)]
    Node(node::Command),
}

#[derive(Debug, clap::Args)]
pub struct Task {
    id: String,
    /// Wait until it is done; fail if it fails, or if what was verified is not sound.
    #[arg(long)]
    wait: bool,
    #[arg(long)]
    json: bool,
}

pub async fn run(http: &Http, command: Command) -> anyhow::Result<Outcome> {
    match command {
        Command::Verify(task) => ask(http, "verify", task).await?,
        Command::Materialize(task) => ask(http, "materialize", task).await?,
        Command::Node(command) => return node::run(http, "restarts", command).await,
    }
    Ok(Outcome::Done)
}

async fn ask(http: &Http, verb: &str, options: Task) -> anyhow::Result<()> {
    let request = http.request(Method::POST, &["v1", "restarts", &options.id, verb]);
    let mut answer = http.send_for_json(request).await?;
    if options.wait {
        answer = wait_until_done(http, answer).await?;
    }
    let task: LineageTask = parse(answer.clone())?;
    match options.json {
        true => print::json(&answer)?,
        false => show(&task)?,
    }
    if let Some(failure) = &task.failure {
        bail!("{} failed: {}", task.id, failure.message);
    }
    match &task.verification {
        Some(verification) if !verification.is_sound => {
            bail!("{} is not sound: {}", task.restart, verification.message)
        }
        _ => Ok(()),
    }
}

async fn wait_until_done(http: &Http, mut answer: Value) -> anyhow::Result<Value> {
    let spinner = if print::is_terminal() { ProgressBar::new_spinner() } else { ProgressBar::hidden() };
    let style = ProgressStyle::with_template("{spinner} {msg}  {elapsed}").expect("the template is well-formed");
    spinner.set_style(style);
    spinner.enable_steady_tick(Duration::from_millis(100));
    loop {
        let task: LineageTask = parse(answer.clone())?;
        match task.state {
            LineageTaskState::Queued => spinner.set_message("waiting for a worker"),
            LineageTaskState::Running => spinner.set_message("adding the deltas to their base"),
            LineageTaskState::Succeeded | LineageTaskState::Failed => {
                spinner.finish_and_clear();
                return Ok(answer);
            }
        }
        tokio::time::sleep(POLL_EVERY).await;
        answer = http.get(&["v1", "lineage-tasks", task.id.as_str()]).await?;
    }
}

fn show(task: &LineageTask) -> anyhow::Result<()> {
    let state = format!("{:?}", task.state).to_lowercase();
    print::line(&format!("{}  {}  {}  {state}", task.id, task.kind, task.restart))?;
    if let Some(checkpoint) = &task.checkpoint {
        print::line(&format!("checkpoint {checkpoint}"))?;
    }
    task.verification.as_ref().map_or(Ok(()), show_verification)
}

fn show_verification(verification: &Verification) -> anyhow::Result<()> {
    print::line(&verification.message)?;
    for file in &verification.files {
        if let Some(problem) = &file.problem {
            print::line(&format!("  {} of {}: {problem}", file.name, file.node))?;
        }
    }
    if verification.differences.is_empty() {
        return Ok(());
    }
    let rows = verification.differences.iter();
    let rows: Vec<_> =
        rows.map(|(kind, d)| [kind.clone(), format!("{:.2e}", d.max_abs), format!("{:.2e}", d.max_rel)]).collect();
    Ok(print::table(["tensors", "largest difference", "relative"], &rows)?)
}
