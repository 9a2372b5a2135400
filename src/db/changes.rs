//! News from the database: a hint to look, never the truth. Whoever waits here also polls.

use std::time::Duration;

use sqlx::{PgPool, postgres::PgListener};
use tokio::sync::broadcast;

use crate::shutdown::Shutdown;

/// The payload is the job that changed.
pub const JOB_CHANGED: &str = "job_changed";
/// The payload is the kind of work that can be claimed.
pub const WORK_QUEUED: &str = "work_queued";

const RECONNECT_AFTER: Duration = Duration::from_secs(1);

/// One connection that listens for everybody in this process.
#[derive(Debug, Clone)]
pub struct Changes {
    sender: broadcast::Sender<String>,
}

/// A place from which no later change is missed.
#[derive(Debug)]
pub struct Subscription {
    receiver: broadcast::Receiver<String>,
}

impl Changes {
    /// Listens to a channel until `shutdown`, through any loss of the connection.
    pub fn listen(pool: PgPool, channel: &'static str, shutdown: Shutdown) -> Self {
        let (sender, _) = broadcast::channel(1_024);
        let changes = Self { sender: sender.clone() };
        tokio::spawn(async move { shutdown.run_until(forward(&pool, channel, &sender)).await });
        changes
    }

    /// To be taken before the look at the database that decides whether to wait.
    pub fn subscribe(&self) -> Subscription {
        Subscription { receiver: self.sender.subscribe() }
    }
}

impl Subscription {
    /// Waits until there is news of this payload, or it is time to look anyway.
    pub async fn wait(&mut self, payload: &str, at_most: Duration) {
        let changed = async {
            loop {
                match self.receiver.recv().await {
                    Ok(other) if other != payload => {}
                    // Closed: the listener ended, and only the clock is left.
                    Err(broadcast::error::RecvError::Closed) => std::future::pending().await,
                    Ok(_) | Err(broadcast::error::RecvError::Lagged(_)) => return,
                }
            }
        };
        // Time is up: that is an answer too.
        let _ = tokio::time::timeout(at_most, changed).await;
    }
}

async fn forward(pool: &PgPool, channel: &str, sender: &broadcast::Sender<String>) {
    loop {
        let error = match listen_and_forward(pool, channel, sender).await {
            Ok(never) => match never {},
            Err(error) => error,
        };
        tracing::warn!(error = %error, channel, "lost the connection that listens, trying again");
        tokio::time::sleep(RECONNECT_AFTER).await;
    }
}

async fn listen_and_forward(
    pool: &PgPool,
    channel: &str,
    sender: &broadcast::Sender<String>,
) -> sqlx::Result<std::convert::Infallible> {
    let mut listener = PgListener::connect_with(pool).await?;
    listener.listen(channel).await?;
    loop {
        let notification = listener.recv().await?;
        // Nobody waits: then nobody needs it.
        let _ = sender.send(notification.payload().to_owned());
    }
}
