//! Repeating what an outage interrupted.

use std::time::Duration;

use crate::{db::leases::WriteError, shutdown::Shutdown};

/// How long a worker that has to go waits for the database to take how its work ended.
pub const SETTLING: Duration = Duration::from_secs(30);

/// Waits between tries: doubling, up to `MAX`.
#[derive(Debug)]
pub struct Backoff {
    next: Duration,
}

const FIRST: Duration = Duration::from_millis(200);
const MAX: Duration = Duration::from_secs(10);

impl Backoff {
    pub fn new() -> Self {
        Self { next: FIRST }
    }

    pub async fn wait(&mut self) {
        tokio::time::sleep(self.next).await;
        self.next = (self.next * 2).min(MAX);
    }
}

/// Repeats a write until the database takes it or refuses it. A write that was taken although the
/// answer got lost is repeated too, so it must change nothing the second time.
pub async fn until_written<T, F>(what: &str, mut write: impl FnMut() -> F) -> Result<T, WriteError>
where
    F: Future<Output = Result<T, WriteError>>,
{
    let mut backoff = Backoff::new();
    loop {
        match write().await {
            Err(WriteError::Database(error)) if is_outage(&error) => {
                tracing::warn!(%error, what, "database unreachable; trying again");
                backoff.wait().await;
            }
            outcome => return outcome,
        }
    }
}

/// Ends so long after a stop was wished for.
pub async fn long_after(shutdown: &Shutdown, delay: Duration) {
    shutdown.wait().await;
    tokio::time::sleep(delay).await;
}

/// Whether the database could not be asked, rather than said no.
fn is_outage(error: &sqlx::Error) -> bool {
    match error {
        sqlx::Error::Io(_) | sqlx::Error::PoolTimedOut | sqlx::Error::Protocol(_) | sqlx::Error::WorkerCrashed => true,
        // Connection exceptions, out of resources, operator intervention, serialisation failures.
        sqlx::Error::Database(error) => {
            // Or this process stood still within a transaction, which was ended.
            error
                .code()
                .is_some_and(|code| ["08", "53", "57", "40", "25P03"].iter().any(|class| code.starts_with(class)))
        }
        _ => false,
    }
}
