//! Follows a job by its event stream until it is over, through restarts of the server too.
//!
//! Every event is shown once: the stream is taken up after the last one that was seen.

use std::time::{Duration, Instant};

use anyhow::Context as _;
use futures_util::StreamExt as _;
use indicatif::{ProgressBar, ProgressStyle};
use reqwest::{Method, header};
use tokio::time::{sleep, timeout};

use super::{
    http::{Http, HttpError, parse},
    print,
    resources::{Job, JobEvent, Progress},
    sse::{Message, Parser},
};

/// The server sends something every 10 s, even if nothing happens.
const SILENCE: Duration = Duration::from_secs(30);
const RECONNECT_AFTER: Duration = Duration::from_secs(1);
/// How long a server may be away.
const PATIENCE: Duration = Duration::from_secs(120);
/// Between two lines of progress where there is no terminal to draw a bar on.
const PLAIN_EVERY: Duration = Duration::from_secs(5);

/// Shows a job until it is over, and returns it as it is then.
pub async fn watch(http: &Http, job_id: &str) -> anyhow::Result<Job> {
    let job: Job = parse(http.get(&["v1", "jobs", job_id]).await?)?;
    let mut watch = Watch { http, job_id, last_event_id: None, heard_at: Instant::now(), view: View::new(&job) };
    loop {
        match watch.follow().await {
            Ok(true) => break,
            Ok(false) => {}
            Err(error) if error.downcast_ref::<HttpError>().is_some_and(|error| !error.may_pass()) => {
                return Err(error);
            }
            Err(error) if watch.heard_at.elapsed() > PATIENCE => {
                return Err(error.context(format!("nothing was heard of {job_id} for {} s", PATIENCE.as_secs())));
            }
            Err(error) => watch.view.note(&format!("connection lost, trying again: {error:#}")),
        }
        sleep(RECONNECT_AFTER).await;
    }
    watch.view.bar.finish_and_clear();
    parse(http.get(&["v1", "jobs", job_id]).await?)
}

struct Watch<'a> {
    http: &'a Http,
    job_id: &'a str,
    last_event_id: Option<String>,
    heard_at: Instant,
    view: View,
}

impl Watch<'_> {
    /// Reads one connection's stream; true if the job is over, false if the server ended the stream.
    async fn follow(&mut self) -> anyhow::Result<bool> {
        let mut request = self.http.request(Method::GET, &["v1", "jobs", self.job_id, "events", "stream"]);
        request = request.header(header::ACCEPT, "text/event-stream");
        if let Some(id) = &self.last_event_id {
            request = request.header("last-event-id", id);
        }
        let mut pieces = self.http.send(request).await?.bytes_stream();
        let mut parser = Parser::default();
        while let Some(piece) = timeout(SILENCE, pieces.next()).await.context("the stream fell silent")? {
            self.heard_at = Instant::now();
            for message in parser.feed(&piece.context("the stream broke off")?) {
                if message.event == "end" {
                    return Ok(true);
                }
                self.show(message)?;
            }
        }
        Ok(false)
    }

    fn show(&mut self, message: Message) -> anyhow::Result<()> {
        if message.event == "progress" {
            let progress = serde_json::from_str(&message.data).context("read the job's progress")?;
            return self.view.progress(&progress);
        }
        let event: JobEvent = serde_json::from_str(&message.data).context("read an event of the job")?;
        self.view.event(&event)?;
        self.last_event_id = message.id.or(self.last_event_id.take());
        Ok(())
    }
}

/// The bar and the lines above it; plain lines alone where stdout is no terminal.
struct View {
    bar: ProgressBar,
    is_plain: bool,
    shown_at: Option<Instant>,
    shown_step: u64,
}

impl View {
    fn new(job: &Job) -> Self {
        let is_plain = !print::is_terminal();
        let bar = if is_plain { ProgressBar::hidden() } else { ProgressBar::new(0) };
        let style = ProgressStyle::with_template("{bar:24} {pos}/{len}  {msg}").expect("the template is well-formed");
        bar.set_style(style);
        bar.set_length(job.progress.as_ref().map_or(0, |progress| progress.num_steps));
        bar.set_message(match (job.wait_reason, job.queue_position) {
            (Some(reason), Some(position)) => format!("queued ({}, position {position})", super::job::word(reason)),
            (Some(reason), None) => format!("queued ({})", super::job::word(reason)),
            _ => String::new(),
        });
        Self { bar, is_plain, shown_at: None, shown_step: 0 }
    }

    fn event(&mut self, event: &JobEvent) -> anyhow::Result<()> {
        // A state is written every minute, and is of interest to nobody who watches.
        if event.kind == "state" {
            return Ok(());
        }
        let line = format!("{}  {:<10} {}", event.at.format("%H:%M:%S"), event.kind, event.message);
        Ok(self.bar.suspend(|| print::line(&line))?)
    }

    fn progress(&mut self, progress: &Progress) -> anyhow::Result<()> {
        self.bar.set_length(progress.num_steps);
        self.bar.set_position(progress.step);
        self.bar.set_message(describe(progress));
        let is_due = self.shown_at.is_none_or(|at| at.elapsed() >= PLAIN_EVERY) || progress.step == progress.num_steps;
        if self.is_plain && is_due && progress.step != self.shown_step {
            (self.shown_at, self.shown_step) = (Some(Instant::now()), progress.step);
            print::line(&format!("step {}/{}  {}", progress.step, progress.num_steps, describe(progress)))?;
        }
        Ok(())
    }

    fn note(&self, text: &str) {
        self.bar.suspend(|| eprintln!("{text}"));
    }
}

/// `loss 4.321  lr 1.00e-3  12345 tokens/s  restarts 1/3  2m 05s left`
pub fn describe(progress: &Progress) -> String {
    let parts = [
        progress.loss.map(|loss| format!("loss {loss:.4}")),
        progress.learning_rate.map(|rate| format!("lr {rate:.2e}")),
        progress.tokens_per_s.map(|rate| format!("{rate:.0} tokens/s")),
        (progress.total_restarts > 0)
            .then(|| format!("restarts {}/{}", progress.num_restarts, progress.total_restarts)),
        progress.eta_s.map(|eta_s| format!("{} left", print::duration(eta_s))),
    ];
    parts.into_iter().flatten().collect::<Vec<_>>().join("  ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn progress_is_one_line_that_leaves_out_what_is_not_known() {
        let mut progress = Progress {
            step: 1,
            num_steps: 600,
            loss: Some(4.32109),
            learning_rate: Some(1e-3),
            tokens_per_s: Some(12_345.6),
            num_restarts: 1,
            total_restarts: 3,
            eta_s: Some(125.2),
        };
        assert_eq!(describe(&progress), "loss 4.3211  lr 1.00e-3  12346 tokens/s  restarts 1/3  2m 05s left");
        (progress.loss, progress.learning_rate, progress.tokens_per_s) = (None, None, None);
        (progress.total_restarts, progress.eta_s) = (0, None);
        assert_eq!(describe(&progress), "");
    }
}
