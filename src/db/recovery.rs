//! Taking back the work of workers that went silent.

use sqlx::PgPool;

use super::{
    ingestion,
    leases::{self, Outcome, WriteError},
    training::{self, TrainingEnd},
    upkeep,
};
use crate::domain::job::{Failure, FailureKind};

/// Ends every attempt whose lease ran out: its work item is queued again, or fails when that has
/// happened too often without progress. Returns how many there were. Nothing happens within `grace_s` of the database's
/// start.
pub async fn requeue_expired(pool: &PgPool, grace_s: f64) -> Result<i64, WriteError> {
    let mut num_expired = 0;
    loop {
        let mut tx = pool.begin().await?;
        let Some(lease) = leases::find_expired(&mut tx, grace_s).await? else { return Ok(num_expired) };
        let failure = Failure::new(FailureKind::Infrastructure, "the worker was not heard of for a whole lease");
        if let Some(tokenization) = ingestion::find(&mut tx, &lease).await? {
            ingestion::settle(&mut tx, &lease, &tokenization, &failure, Outcome::LeaseExpired).await?;
        } else if upkeep::owns(&mut tx, &lease).await? {
            upkeep::settle(&mut tx, &lease, &failure, Outcome::LeaseExpired).await?;
        } else {
            let end = TrainingEnd::Failed(failure);
            training::settle(&mut tx, &lease, &end, Outcome::LeaseExpired).await?;
        }
        tx.commit().await?;
        tracing::warn!(work_item.id = %lease.work_item, lease.epoch = lease.lease_epoch, "lease ran out; work taken back");
        num_expired += 1;
    }
}
