//! `relora usage`: what a project has in the store.

use super::{
    Outcome,
    http::{Http, parse},
    print,
    resources::Usage,
};

pub async fn show(http: &Http, json: bool) -> anyhow::Result<Outcome> {
    let answer = http.get(&["v1", "usage"]).await?;
    if json {
        print::json(&answer)?;
        return Ok(Outcome::Done);
    }
    let usage: Usage = parse(answer)?;
    let rows = [
        ("datasets", usage.datasets_bytes),
        ("tokenizations", usage.tokenizations_bytes),
        ("bases", usage.bases_bytes),
        ("restarts", usage.restarts_bytes),
        ("checkpoints", usage.checkpoints_bytes),
        ("states", usage.states_bytes),
        ("logs", usage.logs_bytes),
        ("total", usage.total_bytes),
    ];
    print::table(["what", "size"], &rows.map(|(what, bytes)| [what.to_owned(), print::size(bytes)]))?;
    Ok(Outcome::Done)
}
