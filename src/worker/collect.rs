//! The collector: applies the retention policies of jobs, deletes the objects of what was deleted, and sweeps objects
//! that no row names.
//!
//! Rows go first and objects after them, so whatever breaks off in between leaves an object that is found again. Every
//! part may be repeated, and done by two at once: that an object is gone already is what was wanted.

use std::{collections::HashSet, time::Duration};

use anyhow::{Context, Result};
use chrono::{DateTime, Utc};
use sqlx::PgPool;
use uuid::Uuid;

use crate::{
    db::{
        objects::{self, CollectorPart},
        retention,
    },
    storage::{JOBS_PREFIX, Key, ListedObject, OTHER_PREFIXES, Store},
};

/// How often each worker asks whether something is due.
const LOOK_EVERY: Duration = Duration::from_secs(60);
const RETENTION_EVERY_S: f64 = 5.0 * 60.0;
const SWEEP_EVERY_S: f64 = 6.0 * 3_600.0;
/// What is younger may be of an upload whose row is still to come.
const ORPHAN_AGE: Duration = Duration::from_secs(24 * 3_600);
/// Objects that are listed or deleted at once.
const BATCH: usize = 1_000;
/// So many refusals at the start are those of a store that is away.
const MOST_REFUSALS: usize = 10;

/// Collects for ever, by turns with all other workers.
pub async fn run(pool: &PgPool, store: &Store) {
    loop {
        // Workers that were started together do not ask together.
        let jitter = Duration::from_millis((Uuid::new_v4().as_u128() % 30_000) as u64);
        tokio::time::sleep(LOOK_EVERY + jitter).await;
        if let Err(error) = take_turns(pool, store).await {
            tracing::warn!(error = format!("{error:#}"), "could not collect; the next turn goes on");
        }
    }
}

async fn take_turns(pool: &PgPool, store: &Store) -> Result<()> {
    if objects::take_turn(pool, CollectorPart::Retention, RETENTION_EVERY_S).await? {
        apply_policies(pool).await?;
        delete_queued(pool, store).await?;
    }
    if objects::take_turn(pool, CollectorPart::Sweep, SWEEP_EVERY_S).await? {
        let now = objects::now(pool).await.context("ask the database for the time")?;
        sweep(pool, store, now - ORPHAN_AGE).await?;
        store.abort_stale_uploads(Store::STALE_UPLOAD).await.context("abort uploads that nobody ends")?;
    }
    Ok(())
}

/// Deletes the checkpoints that the policy of their job lets go, and returns how many those were.
pub async fn apply_policies(pool: &PgPool) -> Result<usize> {
    let mut num_deleted = 0;
    for policy in retention::list_policies(pool).await.context("list the policies of jobs")? {
        match retention::apply_policy(pool, &policy.job, &policy.policy).await {
            Ok(deletion) => num_deleted += deletion.deleted.len(),
            // The next turn tries it again, and the other jobs need not wait for that.
            Err(error) => tracing::warn!(%error, job.id = %policy.job, "could not apply a job's policy"),
        }
    }
    Ok(num_deleted)
}

/// Deletes the objects that are queued for it, and returns how many those were.
pub async fn delete_queued(pool: &PgPool, store: &Store) -> Result<usize> {
    let mut num_deleted = 0;
    loop {
        let keys = objects::list_queued(pool, BATCH as i64).await.context("list the objects to delete")?;
        if keys.is_empty() {
            return Ok(num_deleted);
        }
        let num_gone = delete(pool, store, &keys).await?;
        num_deleted += num_gone;
        if num_gone < keys.len() {
            return Ok(num_deleted);
        }
    }
}

/// Deletes objects, and takes them out of the queue once the store has confirmed it. What the store keeps goes to the end
/// of the queue, so that it holds up nothing else. Returns how many are gone.
pub async fn delete(pool: &PgPool, store: &Store, keys: &[String]) -> Result<usize> {
    let objects: Vec<_> = keys.iter().cloned().map(Key::from).collect();
    if store.delete(&objects).await.is_ok() {
        objects::mark_gone(pool, keys).await.context("take deleted objects out of the queue")?;
        return Ok(keys.len());
    }
    let (mut gone, mut kept) = (Vec::new(), Vec::new());
    for object in &objects {
        match store.delete(std::slice::from_ref(object)).await {
            Ok(()) => gone.push(object.to_string()),
            Err(error) => {
                kept.push(object.to_string());
                let is_last = kept.len() == objects.len().min(MOST_REFUSALS);
                if gone.is_empty() && is_last {
                    return Err(error).context("delete objects: the store refuses every one");
                }
                tracing::warn!(%error, storage.key = %object, "could not delete an object");
            }
        }
    }
    objects::mark_gone(pool, &gone).await.context("take deleted objects out of the queue")?;
    objects::put_last(pool, &kept).await.context("put objects at the end of the queue")?;
    Ok(gone.len())
}

/// What a sweep came to.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Swept {
    pub num_objects: usize,
    pub bytes: u64,
    /// An object of a job that this database does not know: other databases keep objects here too.
    pub foreign_key: Option<String>,
}

/// Deletes every object that no row names, that was written before `written_before`, and that nobody with a lease may
/// still be going to name. Jobs are never forgotten, so an object of an unknown one belongs to another database; then
/// unknown identifiers of other kinds may as well, and are left alone.
pub async fn sweep(pool: &PgPool, store: &Store, written_before: DateTime<Utc>) -> Result<Swept> {
    let mut swept = Swept::default();
    sweep_prefix(pool, store, JOBS_PREFIX, written_before, &mut swept).await?;
    for prefix in OTHER_PREFIXES {
        if swept.foreign_key.is_none() {
            sweep_prefix(pool, store, prefix, written_before, &mut swept).await?;
        }
    }
    if let Some(key) = &swept.foreign_key {
        tracing::warn!(
            storage.key = key,
            "the store holds objects of a job that this database does not know; give each database a bucket or an \
             S3_PREFIX of its own. Only orphans of known jobs are swept"
        );
    }
    if swept.num_objects > 0 {
        tracing::info!(swept.num_objects, swept.bytes, "swept objects that no row names");
    }
    Ok(swept)
}

async fn sweep_prefix(
    pool: &PgPool,
    store: &Store,
    prefix: &str,
    written_before: DateTime<Utc>,
    swept: &mut Swept,
) -> Result<()> {
    let mut after: Option<Key> = None;
    loop {
        let page = store.list(prefix, after.as_ref(), BATCH).await?;
        let Some(last) = page.last() else { return Ok(()) };
        after = Some(last.key.clone());
        let keys: Vec<_> = page.iter().map(|object| object.key.to_string()).collect();
        let orphans = objects::find_orphans(pool, &keys).await.context("look for objects that no row names")?;
        let (ours, foreign): (Vec<_>, Vec<_>) = orphans.into_iter().partition(|orphan| orphan.is_known);
        swept.foreign_key = swept.foreign_key.take().or_else(|| foreign.into_iter().next().map(|orphan| orphan.key));

        let ours: HashSet<_> = ours.into_iter().map(|orphan| Key::from(orphan.key)).collect();
        let is_swept = |object: &&ListedObject| object.modified_at < written_before && ours.contains(&object.key);
        let old: Vec<_> = page.iter().filter(is_swept).collect();
        store.delete(&old.iter().map(|object| object.key.clone()).collect::<Vec<_>>()).await?;
        swept.num_objects += old.len();
        swept.bytes += old.iter().map(|object| object.bytes).sum::<u64>();
    }
}
