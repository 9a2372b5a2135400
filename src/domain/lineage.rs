//! The lineage of a job's weights: base, restarts, checkpoints, states, and the files of each.

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use utoipa::ToSchema;

use super::ids::{JobId, NodeId};

/// What a node of the lineage holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, ToSchema, sqlx::Type)]
#[serde(rename_all = "snake_case")]
#[sqlx(type_name = "text", rename_all = "snake_case")]
pub enum NodeKind {
    /// Full weights at the moment when the model is wrapped with LoRA factors.
    Base,
    /// The LoRA delta of one cycle, as it was merged.
    Restart,
    /// Merged full-rank weights.
    Checkpoint,
    /// What an exact continuation needs.
    State,
}

impl NodeKind {
    /// The folder of such nodes, on disk and in object keys.
    pub fn folder(self) -> &'static str {
        match self {
            Self::Base => "base",
            Self::Restart => "restarts",
            Self::Checkpoint => "checkpoints",
            Self::State => "states",
        }
    }
}

/// Full weights, in bases and checkpoints (the `transformers` layout).
pub const MODEL_FILE: &str = "model.safetensors";
/// A delta's factors and replaced parameters (the `peft` layout).
pub const ADAPTER_FILE: &str = "adapter_model.safetensors";
/// How a delta is applied.
pub const ADAPTER_CONFIG_FILE: &str = "adapter_config.json";
/// Every file of a node with its size and SHA-256.
pub const MANIFEST_FILE: &str = "manifest.json";

/// The content of a manifest, from the (name, size in bytes, SHA-256) of every other file. It lets a copy of the files be
/// checked without the service.
pub fn manifest<'a>(
    kind: NodeKind,
    step: i64,
    restart: i64,
    files: impl IntoIterator<Item = (&'a str, i64, &'a str)>,
) -> Value {
    let file = |(name, size_bytes, sha256)| json!({"name": name, "size_bytes": size_bytes, "sha256": sha256});
    let files: Vec<_> = files.into_iter().map(file).collect();
    json!({"format_version": 1, "kind": kind, "step": step, "restart": restart, "files": files})
}

/// The frozen weights of a cycle (fp32), which every state of that cycle names.
pub const FROZEN_FILE: &str = "frozen.safetensors";

/// The frozen weights at the warm start, which states name where ranks are reported: those of the first cycle.
pub const START_FILE: &str = "start.safetensors";

/// Where the frozen weights of the cycle after `restart` lie in the trainer's output directory.
pub fn frozen_path(restart: i64) -> String {
    format!("frozen/{restart}/{FROZEN_FILE}")
}

/// Whether a path in the output directory is that of frozen weights.
pub fn is_frozen(path: &str) -> bool {
    path.starts_with("frozen/")
}

/// Where a file of an imported checkpoint lies in the bucket, below the store's prefix.
pub fn import_key(node: &NodeId, name: &str) -> String {
    format!("i/{node}/{name}")
}

/// Where a file of an attempt lies in the bucket, below the store's prefix.
///
/// The lease epoch is part of the key, so that a worker that lost its lease can leave an orphan and
/// can overwrite nothing. `path` is relative to the trainer's output directory, `states/120/state.json`.
pub fn attempt_key(job: &JobId, lease_epoch: i64, path: &str) -> String {
    format!("j/{job}/{lease_epoch}/{path}")
}
