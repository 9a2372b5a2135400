//! The wish to stop, shared by everything that has to end in order.

use anyhow::Context;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio_util::sync::CancellationToken;

/// A cheap clone of one wish to stop; once triggered it stays so.
#[derive(Debug, Clone, Default)]
pub struct Shutdown {
    token: CancellationToken,
}

impl Shutdown {
    /// Triggered by nothing but [`Shutdown::trigger`].
    pub fn new() -> Self {
        Self::default()
    }

    /// Triggered by SIGINT and SIGTERM. A second signal ends the process at once.
    pub fn on_signals() -> anyhow::Result<Self> {
        let interrupt = signal(SignalKind::interrupt()).context("listen for SIGINT")?;
        let terminate = signal(SignalKind::terminate()).context("listen for SIGTERM")?;
        let shutdown = Self::new();
        tokio::spawn(shutdown.clone().listen(interrupt, terminate));
        Ok(shutdown)
    }

    async fn listen(self, mut interrupt: Signal, mut terminate: Signal) {
        let mut next = async || {
            tokio::select! {
                _ = interrupt.recv() => ("SIGINT", 130),
                _ = terminate.recv() => ("SIGTERM", 143),
            }
        };
        let (name, _) = next().await;
        tracing::info!(signal = name, "stopping");
        self.trigger();
        let (name, status) = next().await;
        tracing::warn!(signal = name, "ended by a second signal before everything was stopped");
        std::process::exit(status);
    }

    /// Asks everybody to stop.
    pub fn trigger(&self) {
        self.token.cancel();
    }

    pub fn is_triggered(&self) -> bool {
        self.token.is_cancelled()
    }

    /// Returns when the stop is wished for; at once if it was before.
    pub async fn wait(&self) {
        self.token.cancelled().await;
    }

    /// The future's output, or `None` if the stop is wished for first.
    pub async fn run_until<F: Future>(&self, future: F) -> Option<F::Output> {
        self.token.run_until_cancelled(future).await
    }
}

#[cfg(test)]
mod tests {
    use super::Shutdown;

    #[tokio::test]
    async fn a_clone_sees_the_trigger_and_unfinished_work_is_left() {
        let shutdown = Shutdown::new();
        assert_eq!(shutdown.run_until(async { 7 }).await, Some(7));
        shutdown.clone().trigger();
        shutdown.wait().await;
        assert!(shutdown.is_triggered());
        assert_eq!(shutdown.run_until(std::future::pending::<()>()).await, None);
    }
}
