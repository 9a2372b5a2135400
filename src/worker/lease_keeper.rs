//! Keeps a lease alive while its work goes on, and passes on what the database answers.

use std::time::Duration;

use sqlx::PgPool;
use tokio::sync::watch;
use tokio_util::task::AbortOnDropHandle;
use tracing::Instrument;

use crate::db::leases::{self, Desired, Lease, WriteError};

/// What the holder of a lease knows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Orders {
    Held(Desired),
    /// Somebody else may be at work: stop, and write nothing.
    Lost,
}

/// Renews the lease until dropped.
#[derive(Debug)]
pub struct LeaseKeeper {
    orders: watch::Receiver<Orders>,
    _heartbeat: AbortOnDropHandle<()>,
}

impl LeaseKeeper {
    pub fn start(pool: PgPool, lease: Lease, lease_s: u64) -> Self {
        let (sender, orders) = watch::channel(Orders::Held(Desired::Run));
        let heartbeat = tokio::spawn(beat(pool, lease, lease_s as f64, sender).in_current_span());
        Self { orders, _heartbeat: AbortOnDropHandle::new(heartbeat) }
    }

    /// Changes of the orders from here on.
    pub fn orders(&self) -> watch::Receiver<Orders> {
        self.orders.clone()
    }

    /// Returns when the lease is lost.
    pub async fn lost(&self) {
        let lost = self.orders().wait_for(|orders| *orders == Orders::Lost).await.is_ok();
        // The heartbeat ends only after it has told that the lease is lost.
        if !lost {
            std::future::pending::<()>().await;
        }
    }
}

/// Ten heartbeats in a lease: an order arrives within a few seconds, and a few of them may be missed.
async fn beat(pool: PgPool, lease: Lease, lease_s: f64, orders: watch::Sender<Orders>) {
    let every = Duration::from_secs_f64((lease_s / 10.0).clamp(0.1, 3.0));
    let mut failing = false;
    loop {
        tokio::time::sleep(every).await;
        let answer = tokio::time::timeout(every * 3, leases::heartbeat(&pool, &lease, lease_s)).await;
        match answer {
            Ok(Ok(desired)) => {
                failing = false;
                orders.send_if_modified(|now| std::mem::replace(now, Orders::Held(desired)) != Orders::Held(desired));
            }
            Ok(Err(WriteError::LeaseLost)) => {
                tracing::warn!("lease lost");
                orders.send_replace(Orders::Lost);
                return;
            }
            // The work goes on: while nobody has claimed the item, a late heartbeat is as good as one in time.
            Ok(Err(_)) | Err(_) if failing => {}
            Ok(Err(WriteError::Database(error))) => {
                failing = true;
                tracing::warn!(%error, "heartbeat failed; the work goes on");
            }
            Err(_) => {
                failing = true;
                tracing::warn!("heartbeat not answered in time; the work goes on");
            }
        }
    }
}
