//! Keeps a lease alive while its work goes on, and passes on what the database answers.

use std::time::Duration;

use sqlx::PgPool;
use tokio::{sync::watch, time::Instant};
use tokio_util::task::AbortOnDropHandle;
use tracing::Instrument;

use crate::{
    config::AgentConfig,
    db::leases::{self, Desired, Lease, WriteError},
};

/// What the holder of a lease knows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Orders {
    Held(Desired),
    /// Not renewed for a whole lease, by this process's own clock: somebody else may be at work. Do nothing more until
    /// the lease is renewed or known to be lost.
    Unsure,
    /// Somebody else is or will be at work: stop, and write nothing.
    Lost,
}

/// Renews the lease until dropped.
#[derive(Debug)]
pub struct LeaseKeeper {
    orders: watch::Receiver<Orders>,
    _heartbeat: AbortOnDropHandle<()>,
}

impl LeaseKeeper {
    pub fn start(pool: PgPool, lease: Lease, config: &AgentConfig) -> Self {
        let (sender, orders) = watch::channel(Orders::Held(Desired::Run));
        let heartbeat = tokio::spawn(Heart::new(pool, lease, config).beat(sender).in_current_span());
        Self { orders, _heartbeat: AbortOnDropHandle::new(heartbeat) }
    }

    /// Changes of the orders from here on.
    pub fn orders(&self) -> watch::Receiver<Orders> {
        self.orders.clone()
    }

    /// Returns when the lease is lost.
    pub async fn lost(&self) {
        until(self.orders(), |orders| orders == Orders::Lost).await;
    }
}

/// Returns when the orders are of this kind.
pub async fn until(mut orders: watch::Receiver<Orders>, is_meant: impl Fn(Orders) -> bool) {
    // The heartbeat ends only after it has told that the lease is lost, and then nothing else is of interest.
    if orders.wait_for(|orders| is_meant(*orders)).await.is_err() {
        std::future::pending::<()>().await;
    }
}

struct Heart {
    pool: PgPool,
    lease: Lease,
    lease_s: f64,
    /// How long the work is kept while nobody can say whose it is.
    max_outage: Duration,
    /// When the last renewal was asked for that succeeded. It held for a lease from some moment after that.
    renewed: Instant,
    is_failing: bool,
}

impl Heart {
    fn new(pool: PgPool, lease: Lease, config: &AgentConfig) -> Self {
        let max_outage = Duration::from_secs(config.max_outage_s);
        Self { pool, lease, lease_s: config.lease_s as f64, max_outage, renewed: Instant::now(), is_failing: false }
    }

    /// Ten heartbeats in a lease: an order arrives within a few seconds, and a few of them may be missed.
    async fn beat(mut self, orders: watch::Sender<Orders>) {
        let every = Duration::from_secs_f64((self.lease_s / 10.0).clamp(0.1, 3.0));
        loop {
            tokio::time::sleep(every).await;
            let asked = Instant::now();
            let answer =
                tokio::time::timeout(every * 3, leases::heartbeat(&self.pool, &self.lease, self.lease_s)).await;
            let news = match answer {
                Ok(Ok(desired)) => {
                    (self.renewed, self.is_failing) = (asked, false);
                    Orders::Held(desired)
                }
                Ok(Err(WriteError::LeaseLost)) => Orders::Lost,
                Ok(Err(WriteError::Database(error))) => self.missed(&error.to_string()),
                Err(_) => self.missed("not answered in time"),
            };
            orders.send_if_modified(|now| {
                // While the lease holds, a missed heartbeat changes nothing of what was ordered.
                let news = if news == Orders::Unsure && self.is_within_lease() { *now } else { news };
                std::mem::replace(now, news) != news
            });
            if news == Orders::Lost {
                return tracing::warn!("lease lost");
            }
        }
    }

    fn is_within_lease(&self) -> bool {
        self.renewed.elapsed().as_secs_f64() < self.lease_s
    }

    fn missed(&mut self, why: &str) -> Orders {
        if !std::mem::replace(&mut self.is_failing, true) {
            tracing::warn!(why, "heartbeat failed; the work goes on while the lease holds");
        }
        if self.renewed.elapsed() < self.max_outage {
            return Orders::Unsure;
        }
        tracing::warn!(max_outage_s = self.max_outage.as_secs(), "given up: no heartbeat succeeded for too long");
        Orders::Lost
    }
}
