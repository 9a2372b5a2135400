//! Writes a trainer's reports to the database, in order and in batches. An outage makes them late, not lost.

use std::{collections::BTreeMap, time::Duration};

use serde_json::json;
use sqlx::PgPool;
use tokio::{
    sync::{mpsc, oneshot},
    time::Instant,
};

use super::retry::until_written;
use crate::{
    db::{
        events::NewEvent,
        leases::{Lease, WriteError},
        training,
    },
    domain::{
        contract::{Fingerprint, RankCount, StepReport},
        ids::JobId,
        job::EventType,
        spec::{Choices, Linear},
    },
};

/// Steps are written this often, all that came meanwhile at once.
const STEPS_EVERY: Duration = Duration::from_millis(500);

/// Something that the trainer reported.
#[derive(Debug)]
pub enum Report {
    Ready {
        fingerprint: Fingerprint,
        choices: Choices,
    },
    Step(StepReport),
    Eval {
        step: i64,
        loss: f64,
        perplexity: f64,
        num_tokens: i64,
    },
    OptimizerReset {
        step: i64,
        reset: i64,
        cleared_frac: f64,
    },
    Ranks {
        step: i64,
        restart: i64,
        threshold: f64,
        kinds: BTreeMap<Linear, RankCount>,
    },
    Sample {
        step: i64,
        prompt: String,
        text: String,
    },
    Warning {
        step: i64,
        message: String,
    },
    NumericsChanged {
        before: Fingerprint,
        now: Fingerprint,
    },
    /// To be answered when everything before it is written.
    Barrier(oneshot::Sender<()>),
}

pub struct Reporter {
    pub pool: PgPool,
    pub lease: Lease,
    pub job: JobId,
}

impl Reporter {
    /// Writes until the channel is closed and everything is written.
    pub async fn run(self, mut reports: mpsc::UnboundedReceiver<Report>) -> Result<(), WriteError> {
        let mut steps = Vec::new();
        let mut due = Instant::now();
        loop {
            let report = match steps.is_empty() {
                true => reports.recv().await,
                false => match tokio::time::timeout_at(due, reports.recv()).await {
                    Ok(report) => report,
                    Err(_) => {
                        self.write_steps(&mut steps).await?;
                        due = Instant::now() + STEPS_EVERY;
                        continue;
                    }
                },
            };
            match report {
                Some(Report::Step(step)) => steps.push(step),
                Some(report) => {
                    self.write_steps(&mut steps).await?;
                    self.write(report).await?;
                }
                None => return self.write_steps(&mut steps).await,
            }
        }
    }

    async fn write_steps(&self, steps: &mut Vec<StepReport>) -> Result<(), WriteError> {
        let batch = std::mem::take(steps);
        until_written("steps", || training::append_steps(&self.pool, &self.lease, &self.job, &batch)).await
    }

    async fn write(&self, report: Report) -> Result<(), WriteError> {
        let (kind, message, data, metrics) = match report {
            Report::Step(_) => return Ok(()),
            Report::Barrier(written) => {
                // Nobody waits any more if the node is no longer wanted.
                let _ = written.send(());
                return Ok(());
            }
            Report::Ready { fingerprint, choices } => {
                let write = || training::mark_running(&self.pool, &self.lease, &self.job, &fingerprint, &choices);
                return until_written("start", write).await;
            }
            Report::NumericsChanged { before, now } => {
                let write = || training::mark_inexact(&self.pool, &self.lease, &self.job, &before, &now);
                return until_written("numerics changed", write).await;
            }
            Report::Eval { step, loss, perplexity, num_tokens } => (
                EventType::Eval,
                format!("validation perplexity {perplexity:.3} after step {step}"),
                json!({"step": step, "loss": loss, "perplexity": perplexity, "num_tokens": num_tokens}),
                vec![(step, "eval_loss", loss), (step, "eval_perplexity", perplexity)],
            ),
            Report::OptimizerReset { step, reset, cleared_frac } => (
                EventType::OptimizerReset,
                format!("optimizer reset {reset} cleared {:.1}% of the factors' state", 100.0 * cleared_frac),
                json!({"step": step, "reset": reset, "cleared_frac": cleared_frac}),
                vec![(step, "optimizer_cleared_frac", cleared_frac)],
            ),
            Report::Ranks { step, restart, threshold, kinds } => (
                EventType::Ranks,
                format!("ranks of the merged update counted after restart {restart}"),
                json!({"step": step, "restart": restart, "threshold": threshold, "kinds": kinds}),
                vec![],
            ),
            Report::Sample { step, prompt, text } => (
                EventType::Sample,
                format!("text generated after step {step}"),
                // PostgreSQL's jsonb holds no NUL.
                json!({"step": step, "prompt": prompt, "text": text.replace('\0', "\u{fffd}")}),
                vec![],
            ),
            Report::Warning { step, message } => (EventType::Warning, message, json!({"step": step}), vec![]),
        };
        let lease_epoch = Some(self.lease.lease_epoch);
        until_written("event", || {
            let event = NewEvent { kind, lease_epoch, message: &message, data: data.clone() };
            training::append_event(&self.pool, &self.lease, &self.job, event, &metrics)
        })
        .await
    }
}
