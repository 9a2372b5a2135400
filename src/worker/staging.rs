//! Lays out what a trainer reads: spec, tokens, tokenizer, and the state to go on from.

use std::{
    collections::HashMap,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result};
use sqlx::PgPool;

use crate::{
    db::{
        ingestion,
        nodes::{self, StoredFile},
        training::{ResumePoint, Training},
    },
    domain::{
        checkpoint::is_staged,
        ids::NodeId,
        lineage::{self, FROZEN_FILE, NodeKind, START_FILE},
    },
    storage::{Key, StorageError, Store, Uploaded},
};

/// An attempt's folder, filled.
#[derive(Debug)]
pub struct Staged {
    pub spec: PathBuf,
    pub data: PathBuf,
    pub out: PathBuf,
    /// The state to go on from.
    pub resume: Option<PathBuf>,
    /// The checkpoint to begin with; a state holds everything that came of it.
    pub weights: Option<PathBuf>,
    /// Files below `out` that lie in the store already, by their path there.
    pub stored: HashMap<String, StoredFile>,
}

/// The store does not have the state as it was committed, and will not.
#[derive(Debug, thiserror::Error)]
#[error("the state is gone or damaged")]
pub struct UnusableState;

/// Fills `folder` for an attempt. Every download is checked against the size and hash on record.
pub async fn stage(pool: &PgPool, store: &Store, training: &Training, folder: &Path) -> Result<Staged> {
    let mut staged = Staged {
        spec: folder.join("spec.json"),
        data: folder.join("data"),
        out: folder.join("out"),
        resume: None,
        weights: None,
        stored: HashMap::new(),
    };
    for created in [&staged.data, &staged.out] {
        tokio::fs::create_dir(created).await.with_context(|| format!("create {}", created.display()))?;
    }
    let spec = training.settled_spec();
    tokio::fs::write(&staged.spec, serde_json::to_vec_pretty(&spec)?).await.context("write the spec")?;
    for file in ingestion::files(pool, &training.tokenization).await.context("list the tokens' files")? {
        download(store, &file, &staged.data.join(&file.name)).await?;
    }
    if let Some(resume) = &training.resume {
        stage_state(pool, store, resume, &mut staged).await.context("stage the state to go on from")?;
    } else if let Some(checkpoint) = &training.spec.init_checkpoint {
        let weights = folder.join("weights");
        stage_node(pool, store, checkpoint, &weights, is_staged).await.context("stage the checkpoint to begin with")?;
        staged.weights = Some(weights);
    }
    Ok(staged)
}

async fn stage_state(pool: &PgPool, store: &Store, resume: &ResumePoint, staged: &mut Staged) -> Result<()> {
    let state = format!("{}/{}", NodeKind::State.folder(), resume.step);
    for file in nodes::files(pool, &resume.node).await? {
        let path = match file.name.as_str() {
            FROZEN_FILE => lineage::frozen_path(resume.restart),
            START_FILE => lineage::frozen_path(0),
            name => format!("{state}/{name}"),
        };
        download(store, &file, &staged.out.join(&path)).await.map_err(|error| match error.downcast_ref() {
            Some(StorageError::NotFound { .. } | StorageError::Damaged { .. }) => error.context(UnusableState),
            _ => error,
        })?;
        if lineage::is_frozen(&path) {
            staged.stored.insert(path, file);
        }
    }
    staged.resume = Some(staged.out.join(state));
    Ok(())
}

/// Downloads those files of a node whose names are wanted.
pub async fn stage_node(
    pool: &PgPool,
    store: &Store,
    node: &NodeId,
    folder: &Path,
    is_wanted: impl Fn(&str) -> bool,
) -> Result<()> {
    for file in nodes::files(pool, node).await?.iter().filter(|file| is_wanted(&file.name)) {
        download(store, file, &folder.join(&file.name)).await?;
    }
    Ok(())
}

/// Downloads a file, which appears only if size and hash are those on record.
pub async fn download(store: &Store, file: &StoredFile, path: &Path) -> Result<()> {
    if let Some(parent) = path.parent() {
        tokio::fs::create_dir_all(parent).await.with_context(|| format!("create {}", parent.display()))?;
    }
    let expected = Uploaded { bytes: u64::try_from(file.size_bytes)?, sha256: file.sha256.clone() };
    store.download_to(&Key::from(file.object_key.clone()), path, &expected).await?;
    Ok(())
}
