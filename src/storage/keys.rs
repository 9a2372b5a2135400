//! Where each kind of object lies in the bucket. No key is made anywhere else.

use super::{Result, StorageError};
use crate::domain::{
    ids::{DatasetId, JobId, LineageTaskId, NodeId, TokenizationId},
    lineage::{attempt_key, import_key},
};

/// The longest key, with the store's prefix. The embedded store makes a file's name of it, encoded.
pub const MAX_KEY_BYTES: usize = 120;

/// What the keys of jobs begin with.
pub const JOBS_PREFIX: &str = "j/";
/// What all other keys begin with: imports, tokenizations, datasets, materialized checkpoints.
pub const OTHER_PREFIXES: [&str; 4] = ["i/", "t/", "d/", "m/"];
/// What `relora s3-check` writes and deletes again.
pub(super) const CHECK_PREFIX: &str = "check/";

/// Whether a key, as the store has it without its prefix, is one of ours: others may share the bucket.
pub(super) fn is_ours(key: &str) -> bool {
    [JOBS_PREFIX, CHECK_PREFIX].iter().chain(&OTHER_PREFIXES).any(|prefix| key.starts_with(prefix))
}

/// The name of an object, below the store's prefix.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Key(String);

impl Key {
    /// A dataset's raw bytes. The token sets one upload apart from another try.
    pub fn dataset(dataset: &DatasetId, upload_token: &str) -> Self {
        Self(format!("d/{dataset}/{upload_token}"))
    }

    /// A file of a tokenization.
    pub fn tokenization_file(tokenization: &TokenizationId, lease_epoch: i64, name: &str) -> Self {
        Self(format!("t/{tokenization}/{lease_epoch}/{name}"))
    }

    /// A file that a trainer wrote; the path is relative to its output folder.
    pub fn attempt(job: &JobId, lease_epoch: i64, path: &str) -> Self {
        Self(attempt_key(job, lease_epoch, path))
    }

    /// A file of an imported checkpoint.
    pub fn import(node: &NodeId, name: &str) -> Self {
        Self(import_key(node, name))
    }

    /// A file of a checkpoint that a task rebuilt.
    pub fn materialized(task: &LineageTaskId, lease_epoch: i64, name: &str) -> Self {
        Self(format!("m/{task}/{lease_epoch}/{name}"))
    }

    /// The trainer's log of one attempt.
    pub fn log(job: &JobId, lease_epoch: i64) -> Self {
        Self::attempt(job, lease_epoch, "trainer.log")
    }

    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// The whole key, if it is one that every store keeps apart from all others.
    pub(super) fn below(&self, prefix: &str) -> Result<String> {
        let whole = if prefix.is_empty() { self.0.clone() } else { format!("{prefix}/{}", self.0) };
        let reason = if whole.len() > MAX_KEY_BYTES {
            format!("it has {} bytes with the store's prefix, and {MAX_KEY_BYTES} are allowed", whole.len())
        } else if whole.split('/').any(|segment| ["", ".", ".."].contains(&segment)) {
            "a part of it between slashes is empty, '.' or '..'".to_owned()
        } else if whole.chars().any(char::is_control) {
            "it has control characters".to_owned()
        } else {
            return Ok(whole);
        };
        Err(StorageError::InvalidKey { key: self.clone(), reason })
    }
}

/// A key that was made here before and kept in the database.
impl From<String> for Key {
    fn from(text: String) -> Self {
        Self(text)
    }
}

impl std::fmt::Display for Key {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::{JOBS_PREFIX, Key, MAX_KEY_BYTES, OTHER_PREFIXES};
    use crate::domain::ids::{DatasetId, JobId, LineageTaskId, NodeId, TokenizationId};

    #[test]
    fn the_longest_files_of_a_trainer_and_an_import_fit_below_the_longest_prefix() {
        let key = Key::attempt(&JobId::new(), 999, "checkpoints/1000000/generation_config.json");
        assert!(key.below(&"p".repeat(30)).is_ok());
        let key = Key::import(&NodeId::new(), "model-00001-of-00002.safetensors");
        assert!(key.below(&"p".repeat(30)).is_ok());
    }

    #[test]
    fn every_key_lies_below_one_of_the_prefixes() {
        let keys = [
            Key::import(&NodeId::new(), "config.json"),
            Key::tokenization_file(&TokenizationId::new(), 1, "train.bin"),
            Key::dataset(&DatasetId::new(), "token"),
            Key::materialized(&LineageTaskId::new(), 1, "config.json"),
        ];
        for (key, prefix) in keys.iter().zip(OTHER_PREFIXES) {
            assert!(key.as_str().starts_with(prefix), "{key}");
        }
        for key in [Key::log(&JobId::new(), 1), Key::attempt(&JobId::new(), 1, "states/1/state.json")] {
            assert!(key.as_str().starts_with(JOBS_PREFIX), "{key}");
        }
    }

    #[test]
    fn keys_that_are_too_long_or_name_something_else_are_refused() {
        let long = Key::from("k".repeat(MAX_KEY_BYTES));
        assert!(long.below("").is_ok());
        assert!(long.below("p").unwrap_err().to_string().contains("122 bytes"));
        for bad in ["", "a//b", "a/../b", "./a", "a/", "a\nb"] {
            assert!(Key::from(bad.to_owned()).below("p").is_err(), "{bad:?}");
        }
    }
}
