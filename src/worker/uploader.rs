//! Streams finished nodes to the store and commits them, one after another in the trainer's order, so
//! that a committed node implies every earlier one. The training goes on meanwhile.

use std::{collections::HashMap, path::PathBuf};

use anyhow::{Context, Result};
use serde_json::json;
use sqlx::PgPool;
use tokio::sync::mpsc;

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
    storage::{Key, Store},
};

/// States of a job that are kept in the store.
const STATES_KEPT: i64 = 2;

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
    pub async fn run(mut self, mut nodes: mpsc::UnboundedReceiver<NodeReport>) -> Result<()> {
        while let Some(report) = nodes.recv().await {
            let context = || format!("store the {:?} after step {}", report.kind, report.step);
            self.publish(&report).await.with_context(context)?;
            tracing::info!(
                job.id = %self.job, lease.epoch = self.lease.lease_epoch, kind = ?report.kind, step = report.step,
                stall_ms = report.stall_ms, "stored"
            );
        }
        Ok(())
    }

    async fn publish(&mut self, report: &NodeReport) -> Result<()> {
        let mut files = Vec::with_capacity(report.files.len() + 1);
        for file in &report.files {
            files.push(self.upload(file).await?);
        }
        files.push(self.upload_manifest(report, &files).await?);
        until_written("commit a node", || {
            nodes::commit(&self.pool, &self.lease, &self.project, &self.job, report, &files)
        })
        .await?;
        self.remove_local(report).await;
        if report.kind == NodeKind::State {
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
                Err(error) => {
                    tracing::warn!(%error, job.id = %self.job, file = file.path, "upload failed; trying again");
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

    /// The manifest lets a copy of the files be checked without the service.
    async fn upload_manifest(&mut self, report: &NodeReport, files: &[StoredFile]) -> Result<StoredFile> {
        let files: Vec<_> = files
            .iter()
            .map(|file| json!({"name": file.name, "size_bytes": file.size_bytes, "sha256": file.sha256}))
            .collect();
        let manifest = json!({
            "format_version": 1, "kind": report.kind, "step": report.step, "restart": report.restart, "files": files,
        });
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

    async fn drop_old_states(&mut self) -> Result<()> {
        let unnamed = until_written("drop old states", || {
            nodes::drop_old_states(&self.pool, &self.lease, &self.job, STATES_KEPT)
        })
        .await?;
        self.stored.retain(|_, file| !unnamed.contains(&file.object_key));
        let keys: Vec<_> = unnamed.into_iter().map(Key::from).collect();
        if let Err(error) = self.store.delete(&keys).await {
            tracing::warn!(%error, job.id = %self.job, "could not delete old states; their objects are left behind");
        }
        Ok(())
    }
}
