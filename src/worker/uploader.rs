//! Streams finished nodes to the store and commits them, one after another in the trainer's order, so
//! that a committed node implies every earlier one. The training goes on meanwhile.

use std::{collections::HashMap, path::PathBuf};

use anyhow::{Context, Result};
use sqlx::PgPool;
use tokio::sync::{mpsc, oneshot};

use super::retry::{Backoff, until_written};
use crate::{
    db::{
        leases::Lease,
        nodes::{self, StoredFile},
    },
    domain::{
        contract::{NodeFile, NodeReport},
        ids::{JobId, ProjectId},
        lineage::{self, MANIFEST_FILE, NodeKind},
    },
    storage::{Key, StorageError, Store},
};

/// States of a job that are kept in the store.
const STATES_KEPT: i64 = 2;

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
}

impl Uploader {
    /// Uploads and commits until the channel is closed. Fails only if the lease is lost or the
    /// database refuses; a store that does not answer is asked again.
    pub async fn run(mut self, mut nodes: mpsc::UnboundedReceiver<FinishedNode>) -> Result<()> {
        while let Some(mut node) = nodes.recv().await {
            let (kind, step) = (node.report.kind, node.report.step);
            self.publish(&mut node).await.with_context(|| format!("store the {kind:?} after step {step}"))?;
            let report = node.report;
            tracing::info!(
                kind = ?report.kind, step = report.step,
                stall_ms = report.stall_ms, "stored"
            );
        }
        Ok(())
    }

    async fn publish(&mut self, FinishedNode { report, reported }: &mut FinishedNode) -> Result<()> {
        let mut files = Vec::with_capacity(report.files.len() + 1);
        for file in &report.files {
            files.push(self.upload(file).await?);
        }
        files.push(self.upload_manifest(report, &files).await?);
        if report.kind == NodeKind::State {
            // Whoever goes on from a state does not repeat what was reported before it. A reporter that
            // has ended has failed, which ends the attempt.
            let _ = reported.await;
        }
        let report = &*report;
        until_written("commit a node", || {
            nodes::commit(&self.pool, &self.lease, &self.project, &self.job, report, &files)
        })
        .await?;
        self.remove_local(report).await;
        if report.kind == NodeKind::State {
            self.remove_old_frozen(report).await;
            self.drop_old_states().await?;
        }
        Ok(())
    }

    async fn upload(&mut self, file: &NodeFile) -> Result<StoredFile> {
        if let Some(stored) = self.stored.get(&file.path) {
            return Ok(StoredFile { name: file.name.clone(), ..stored.clone() });
        }
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
        self.stored.insert(file.path.clone(), stored.clone());
        Ok(stored)
    }

    async fn upload_manifest(&mut self, report: &NodeReport, files: &[StoredFile]) -> Result<StoredFile> {
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
        self.upload(&NodeFile { name: MANIFEST_FILE.into(), path }).await
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
        let keys: Vec<_> = unnamed.into_iter().map(Key::from).collect();
        if let Err(error) = self.store.delete(&keys).await {
            tracing::warn!(%error, "could not delete old states; their objects are left behind");
        }
        Ok(())
    }
}
