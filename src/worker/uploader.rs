//! Streams finished nodes to the store and commits them, one after another in the trainer's order, so
//! that a committed node implies every earlier one but the states that were skipped (`upload_queue`). The training goes
//! on meanwhile.

use std::{
    collections::{HashMap, HashSet},
    path::PathBuf,
    time::Duration,
};

use anyhow::{Context, Result};
use chrono::{DateTime, SecondsFormat, Utc};
use futures_util::{StreamExt, TryStreamExt, stream};
use serde_json::json;
use sqlx::PgPool;
use tokio::sync::{mpsc, oneshot, watch};

use super::{
    collect,
    retry::{Backoff, until_written},
    upload_queue::{Backlog, Next, UploadQueue},
};
use crate::{
    db::{
        events::NewEvent,
        leases::{Lease, WriteError},
        nodes::{self, StoredFile},
        training,
    },
    domain::{
        contract::{NodeFile, NodeReport},
        ids::{JobId, ProjectId},
        job::EventType,
        lineage::{self, MANIFEST_FILE, NodeKind},
    },
    storage::{Key, StorageError, Store},
};

/// States of a job that are kept in the store.
const STATES_KEPT: i64 = 2;
/// Files up to this size are uploaded together. A larger one fills the memory that uploads may take by itself.
const SMALL_FILE_BYTES: u64 = 8 << 20;
const SMALL_FILES_TOGETHER: usize = 4;

/// A node that is complete on disk.
#[derive(Debug)]
pub struct FinishedNode {
    pub report: NodeReport,
    /// Resolves when everything is in the database that the trainer reported before the node.
    pub reported: oneshot::Receiver<()>,
}

/// What an attempt's uploads need to know.
#[derive(Debug)]
pub struct Uploader {
    pub pool: PgPool,
    pub store: Store,
    pub lease: Lease,
    pub project: ProjectId,
    pub job: JobId,
    /// The trainer's output directory.
    pub out: PathBuf,
    /// Files that lie in the store already, by their path in the output directory: nodes share files,
    /// and an attempt that goes on from a state begins with that state's.
    pub stored: HashMap<String, StoredFile>,
    /// A node that has waited for longer is told of in the job's log.
    pub lag_limit: Duration,
    /// What may wait on the disk.
    pub max_local_bytes: u64,
}

impl Uploader {
    /// Uploads and commits until the channel is closed. Fails only if the lease is lost or the
    /// database refuses; a store that does not answer is asked again.
    ///
    /// `disk_full` is true while more bytes wait than the disk may hold: what makes more of them is to be held.
    pub async fn run(
        mut self,
        nodes: mpsc::UnboundedReceiver<FinishedNode>,
        disk_full: watch::Sender<bool>,
    ) -> Result<()> {
        let queue = UploadQueue::new(self.out.clone(), self.max_local_bytes, self.stored.keys().cloned(), disk_full);
        let lag =
            Lag { pool: self.pool.clone(), lease: self.lease.clone(), job: self.job.clone(), limit: self.lag_limit };
        let taking = async {
            queue.fill(nodes).await;
            Ok(())
        };
        let telling = async { lag.tell(&queue).await.context("report how far the store is behind") };
        tokio::try_join!(taking, self.publish_all(&queue), telling)?;
        Ok(())
    }

    async fn publish_all(&mut self, queue: &UploadQueue) -> Result<()> {
        while let Some(next) = queue.next().await {
            let report = next.report.clone();
            let (kind, step) = (report.kind, report.step);
            self.publish(next).await.with_context(|| format!("store the {kind:?} after step {step}"))?;
            queue.stored();
            tracing::info!(?kind, step, stall_ms = report.stall_ms, "stored");
        }
        Ok(())
    }

    async fn publish(&mut self, Next { report, reported, since }: Next) -> Result<()> {
        let mut files = self.upload_all(&report.files).await?;
        files.push(self.upload_manifest(&report, &files).await?);
        if let (NodeKind::State, Some(reported)) = (report.kind, reported) {
            // Whoever goes on from a state does not repeat what was reported before it. A reporter that
            // has ended has failed, which ends the attempt.
            let _ = reported.await;
        }
        until_written("commit a node", || {
            let lag_s = since.elapsed().as_secs_f64();
            nodes::commit(&self.pool, &self.lease, &self.project, &self.job, &report, &files, lag_s)
        })
        .await?;
        self.remove_local(&report).await;
        if report.kind == NodeKind::State {
            self.remove_old_frozen(&report).await;
            self.drop_old_states().await?;
        }
        Ok(())
    }

    async fn upload_all(&mut self, files: &[NodeFile]) -> Result<Vec<StoredFile>> {
        let (mut small, mut large, mut seen) = (Vec::new(), Vec::new(), HashSet::new());
        for file in files.iter().filter(|file| !self.stored.contains_key(&file.path) && seen.insert(&file.path)) {
            let size_bytes = tokio::fs::metadata(self.out.join(&file.path)).await.map_or(0, |metadata| metadata.len());
            if size_bytes <= SMALL_FILE_BYTES { small.push(file) } else { large.push(file) }
        }
        let together: Vec<_> = small.into_iter().map(|file| self.upload(file)).collect();
        let mut uploaded: Vec<_> = stream::iter(together).buffer_unordered(SMALL_FILES_TOGETHER).try_collect().await?;
        for file in large {
            uploaded.push(self.upload(file).await?);
        }
        self.stored.extend(uploaded);
        let stored = |file: &NodeFile| {
            let stored =
                self.stored.get(&file.path).with_context(|| format!("find {} among what is stored", file.path))?;
            Ok(StoredFile { name: file.name.clone(), ..stored.clone() })
        };
        files.iter().map(stored).collect()
    }

    /// Returns what was stored, and its path in the output directory.
    async fn upload(&self, file: &NodeFile) -> Result<(String, StoredFile)> {
        let key = Key::attempt(&self.job, self.lease.lease_epoch, &file.path);
        let path = self.out.join(&file.path);
        let mut backoff = Backoff::new();
        let uploaded = loop {
            match self.store.upload_file(&key, &path).await {
                Ok(uploaded) => break uploaded,
                // What was written here is gone or has an impossible name: asking again cannot help.
                Err(error @ (StorageError::Local { .. } | StorageError::InvalidKey { .. })) => return Err(error.into()),
                Err(error) => {
                    tracing::warn!(%error, file = file.path, "upload failed; trying again");
                    backoff.wait().await;
                }
            }
        };
        let stored = StoredFile {
            name: file.name.clone(),
            object_key: key.as_str().to_owned(),
            size_bytes: i64::try_from(uploaded.bytes)?,
            sha256: uploaded.sha256,
        };
        Ok((file.path.clone(), stored))
    }

    async fn upload_manifest(&self, report: &NodeReport, files: &[StoredFile]) -> Result<StoredFile> {
        let files = files.iter().map(StoredFile::facts);
        let manifest = lineage::manifest(report.kind, report.step, report.restart, files);
        let folder = match report.kind {
            NodeKind::Restart => report.restart,
            _ => report.step,
        };
        let path = format!("{}/{folder}/{MANIFEST_FILE}", report.kind.folder());
        let local = self.out.join(&path);
        tokio::fs::write(&local, serde_json::to_vec_pretty(&manifest)?)
            .await
            .with_context(|| format!("write {}", local.display()))?;
        let (_, stored) = self.upload(&NodeFile { name: MANIFEST_FILE.into(), path }).await?;
        Ok(stored)
    }

    /// Frees the disk. Frozen weights stay: the next state names them again.
    async fn remove_local(&self, report: &NodeReport) {
        for file in report.files.iter().filter(|file| !lineage::is_frozen(&file.path)) {
            let path = self.out.join(&file.path);
            if let Err(error) = tokio::fs::remove_file(&path).await {
                tracing::warn!(%error, path = %path.display(), "could not remove a stored file");
            }
        }
    }

    /// Frozen weights of earlier cycles are named by no state to come.
    async fn remove_old_frozen(&self, report: &NodeReport) {
        let is_old = |path: &&String| lineage::is_frozen(path) && !report.files.iter().any(|file| file.path == **path);
        for path in self.stored.keys().filter(is_old) {
            // Removed already where an earlier state did it.
            let _ = tokio::fs::remove_file(self.out.join(path)).await;
        }
    }

    async fn drop_old_states(&mut self) -> Result<()> {
        let unnamed = until_written("drop old states", || {
            nodes::drop_old_states(&self.pool, &self.lease, &self.job, STATES_KEPT)
        })
        .await?;
        self.stored.retain(|_, file| !unnamed.contains(&file.object_key));
        // States come often and are large: their space is wanted before the collector's next turn.
        if let Err(error) = collect::delete(&self.pool, &self.store, &unnamed).await {
            tracing::warn!(error = format!("{error:#}"), "could not delete old states; the collector will");
        }
        Ok(())
    }
}

/// Tells the job's log when the store falls behind, and when it has caught up.
#[derive(Debug)]
struct Lag {
    pool: PgPool,
    lease: Lease,
    job: JobId,
    limit: Duration,
}

impl Lag {
    /// Until there is nothing more to store.
    async fn tell(&self, queue: &UploadQueue) -> Result<(), WriteError> {
        while let Some(Backlog { num_nodes, bytes, since }) = queue.behind(self.limit).await {
            let since = Utc::now() - since.elapsed();
            let at = |time: DateTime<Utc>| time.to_rfc3339_opts(SecondsFormat::Millis, true);
            let message = format!(
                "the store is behind: {num_nodes} nodes of {bytes} bytes wait, the oldest since {}; training goes on",
                at(since)
            );
            tracing::warn!(num_nodes, bytes, since = at(since), "the store is behind");
            let data = json!({"behind": true, "num_nodes": num_nodes, "bytes": bytes, "since": at(since)});
            self.append(&message, data).await?;

            // Half of the limit: a store that is just fast enough does not fill the log.
            queue.caught_up(self.limit / 2).await;
            let lasted_s = (Utc::now() - since).as_seconds_f64();
            tracing::info!(lasted_s, "the store has caught up");
            let data = json!({"behind": false, "since": at(since), "lasted_s": lasted_s});
            self.append(&format!("the store has caught up after {lasted_s:.0} s"), data).await?;
        }
        Ok(())
    }

    async fn append(&self, message: &str, data: serde_json::Value) -> Result<(), WriteError> {
        until_written("event", || {
            let lease_epoch = Some(self.lease.lease_epoch);
            let event = NewEvent { kind: EventType::CheckpointLag, lease_epoch, message, data: data.clone() };
            training::append_event(&self.pool, &self.lease, &self.job, event, &[])
        })
        .await
    }
}
