//! Scratch space of this worker process. What a killed process left behind is removed by the next one.

use std::{
    fs::{self, File},
    path::{Path, PathBuf},
};

use anyhow::{Context, Result};

use crate::domain::ids::WorkerId;

/// The folder of one worker process, removed when it ends.
#[derive(Debug)]
pub struct WorkDir {
    path: PathBuf,
    /// Held while the process lives: a folder whose lock is free has lost its owner.
    _lock: File,
}

const LOCK_FILE: &str = "lock";

impl WorkDir {
    pub fn open(root: &Path, worker: &WorkerId) -> Result<Self> {
        fs::create_dir_all(root).with_context(|| format!("create the work folder {}", root.display()))?;
        remove_abandoned(root).with_context(|| format!("tidy the work folder {}", root.display()))?;
        let path = root.join(worker.as_str());
        let context = || format!("create {}", path.display());
        fs::create_dir(&path).with_context(context)?;
        let lock = File::create(path.join(LOCK_FILE)).with_context(context)?;
        lock.lock().with_context(context)?;
        Ok(Self { path, _lock: lock })
    }

    /// A fresh folder for one attempt, removed when dropped.
    pub fn attempt(&self, name: &str) -> Result<AttemptDir> {
        let path = self.path.join(name);
        fs::create_dir(&path).with_context(|| format!("create {}", path.display()))?;
        Ok(AttemptDir { path })
    }
}

impl Drop for WorkDir {
    fn drop(&mut self) {
        remove(&self.path);
    }
}

/// The folder of one attempt.
#[derive(Debug)]
pub struct AttemptDir {
    path: PathBuf,
}

impl AttemptDir {
    pub fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for AttemptDir {
    fn drop(&mut self) {
        remove(&self.path);
    }
}

fn remove(path: &Path) {
    if let Err(error) = fs::remove_dir_all(path) {
        tracing::warn!(%error, path = %path.display(), "could not remove a work folder");
    }
}

fn remove_abandoned(root: &Path) -> Result<()> {
    for entry in fs::read_dir(root)? {
        let path = entry?.path();
        let Ok(lock) = File::open(path.join(LOCK_FILE)) else { continue };
        if lock.try_lock().is_ok() {
            tracing::info!(path = %path.display(), "removing what a killed worker left behind");
            fs::remove_dir_all(&path)?;
        }
    }
    Ok(())
}
