//! Taking back the work of workers that went silent.

use sqlx::{PgConnection, PgPool};

use super::{
    ingestion,
    leases::{self, Lease, Outcome, WriteError},
    training::{self, TrainingEnd},
    upkeep,
};
use crate::domain::job::{Failure, FailureKind};

/// Ends every attempt whose lease ran out: its work item is queued again, or fails when that has
/// happened too often without progress. Returns how many there were. Nothing happens within `grace_s` of the database's
/// start.
pub async fn requeue_expired(pool: &PgPool, grace_s: f64) -> Result<i64, WriteError> {
    let (mut num_expired, mut left_alone) = (0, Vec::new());
    loop {
        let mut tx = pool.begin().await?;
        let Some(lease) = leases::find_expired(&mut tx, grace_s, &left_alone).await? else { return Ok(num_expired) };
        let (work_item, lease_epoch) = (&lease.work_item, lease.lease_epoch);
        match settle(&mut tx, &lease).await {
            Ok(()) => {
                tx.commit().await?;
                tracing::warn!(work_item.id = %work_item, lease.epoch = lease_epoch, "lease ran out; work taken back");
                num_expired += 1;
            }
            Err(WriteError::Database(error @ (sqlx::Error::Io(_) | sqlx::Error::PoolTimedOut))) => {
                return Err(error.into());
            }
            // What cannot be settled must not keep others from it.
            Err(error) => {
                tracing::error!(work_item.id = %work_item, %error, "could not take back work whose lease ran out");
                left_alone.push(work_item.to_string());
            }
        }
    }
}

async fn settle(connection: &mut PgConnection, lease: &Lease) -> Result<(), WriteError> {
    let failure = Failure::new(FailureKind::Infrastructure, "the worker was not heard of for a whole lease");
    if let Some(tokenization) = ingestion::find(connection, lease).await? {
        return ingestion::settle(connection, lease, &tokenization, &failure, Outcome::LeaseExpired).await;
    }
    if upkeep::owns(connection, lease).await? {
        return upkeep::settle(connection, lease, &failure, Outcome::LeaseExpired).await;
    }
    training::settle(connection, lease, &TrainingEnd::Failed(failure), Outcome::LeaseExpired).await
}
