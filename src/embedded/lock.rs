//! The lock that keeps two servers from sharing one data folder.

use std::{
    fs::{File, TryLockError},
    io::{Read, Seek, Write},
    path::Path,
};

use anyhow::{Context, bail};

/// Holds a folder until it is dropped, or until the process ends in any way.
#[derive(Debug)]
pub(super) struct FolderLock {
    file: File,
}

impl FolderLock {
    /// Takes the folder, or says who has it.
    pub(super) fn take(folder: &Path) -> anyhow::Result<Self> {
        let path = folder.join("lock");
        let mut file = File::options()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .open(&path)
            .with_context(|| format!("open {}", path.display()))?;
        match file.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => {
                let mut holder = String::new();
                // The holder's number only helps the reader of the message.
                let _ = file.read_to_string(&mut holder);
                bail!(
                    "{} is in use by another relora server (process {}): stop it, or choose another folder with \
                     RELORA_DATA_DIR",
                    folder.display(),
                    holder.trim()
                );
            }
            Err(TryLockError::Error(error)) => {
                return Err(error).with_context(|| format!("lock {}", path.display()));
            }
        }
        file.set_len(0).and_then(|()| file.rewind()).and_then(|()| writeln!(file, "{}", std::process::id()))?;
        Ok(Self { file })
    }
}

impl Drop for FolderLock {
    /// Closing the file is not enough: a process that is being started just now has a copy of it until it runs
    /// its own program.
    fn drop(&mut self) {
        if let Err(error) = self.file.unlock() {
            tracing::warn!(error = %error, "the lock of a data folder could not be released");
        }
    }
}
