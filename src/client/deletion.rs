//! Deleting checkpoints and lineages, and telling what came of it.

use anyhow::ensure;
use reqwest::Method;
use serde_json::{Value, json};

use super::{
    http::{Http, parse},
    print,
    resources::Deletion,
};

/// Which checkpoints to delete.
#[derive(Debug, clap::Args)]
pub struct Selection {
    /// Only these. An imported checkpoint is deleted only if it is named.
    #[arg(required_unless_present_any = ["job", "older_than_s", "keep_last", "superseded"])]
    ids: Vec<String>,
    /// Only those of this job.
    #[arg(long)]
    job: Option<String>,
    /// Only those that are older than so many seconds.
    #[arg(long, value_name = "SECONDS")]
    older_than_s: Option<u64>,
    /// All but the newest so many of each job.
    #[arg(long, value_name = "N")]
    keep_last: Option<u64>,
    /// Only those that a later attempt replaced.
    #[arg(long)]
    superseded: bool,
    /// Only say what it would come to.
    #[arg(long)]
    dry_run: bool,
    #[arg(long)]
    json: bool,
}

pub async fn of_checkpoints(http: &Http, selection: Selection) -> anyhow::Result<()> {
    let names_each = !selection.ids.is_empty();
    // An absent field and null are one to the server.
    let request = json!({
        "ids": names_each.then_some(&selection.ids),
        "job": selection.job,
        "older_than_s": selection.older_than_s,
        "keep_last": selection.keep_last,
        "superseded": selection.superseded.then_some(true),
        "dry_run": selection.dry_run,
    });
    let answer = http.post(&["v1", "checkpoints", "delete"], &request).await?;
    let num_refused = tell(answer, selection.json)?;
    ensure!(!names_each || num_refused == 0, "not all that were named are deleted");
    Ok(())
}

pub async fn of_lineage(http: &Http, job: &str, dry_run: bool, json: bool) -> anyhow::Result<()> {
    let request = http.request(Method::DELETE, &["v1", "jobs", job, "lineage"]).query(&[("dry_run", dry_run)]);
    tell(http.send_for_json(request).await?, json)?;
    Ok(())
}

/// Returns how many were refused.
fn tell(answer: Value, json: bool) -> anyhow::Result<usize> {
    let deletion: Deletion = parse(answer.clone())?;
    if json {
        print::json(&answer)?;
        return Ok(deletion.refused.len());
    }
    let what = if deletion.dry_run { "would delete" } else { "deleted" };
    for id in &deletion.deleted {
        print::line(&format!("{what} {id}"))?;
    }
    for refusal in &deletion.refused {
        print::line(&format!("left: {}", refusal.message))?;
    }
    print::line(&format!("{what} {} in all, {}", deletion.num_deleted, print::size(deletion.freed_bytes)))?;
    Ok(deletion.refused.len())
}
