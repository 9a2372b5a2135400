//! What a restart is worth: whether its deltas, added to the base again, give the weights that were merged, and
//! whether every file that this takes is still what it was.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::ids::NodeId;

/// Rebuilt and merged weights that differ by less, relative to the largest value of their tensor, count as equal.
pub const MAX_REL_DIFFERENCE: f64 = 1e-6;

/// How far rebuilt weights are from merged ones, over all tensors of a kind.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Difference {
    /// The largest absolute difference of two elements.
    pub max_abs: f64,
    /// The same relative to the largest absolute value in the merged tensor.
    pub max_rel: f64,
}

/// By kind of tensor: `q_proj`, `embed_tokens`, `input_layernorm`.
pub type Differences = BTreeMap<String, Difference>;

/// A file of the lineage, read again from the store.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct CheckedFile {
    pub node: NodeId,
    pub name: String,
    /// As the database has it.
    pub size_bytes: i64,
    /// As the database has it; that of the stored file where there is no problem.
    pub sha256: String,
    /// What the stored file is otherwise than the database, or the node's manifest, says; null if it is as they say.
    pub problem: Option<String>,
}

/// What a check of a restart came to.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Verification {
    /// No file is damaged, the weights can be rebuilt, and they equal the merged ones if there are any.
    pub is_sound: bool,
    /// The same in words.
    pub message: String,
    /// The checkpoint with the merged weights; null if there is none at the restart's step.
    pub compared_with: Option<NodeId>,
    /// Whether no tensor differs by more than 1e-6 relative to its largest value; null if nothing was compared.
    pub is_within_tolerance: Option<bool>,
    /// By kind of tensor; empty if nothing was compared.
    pub differences: BTreeMap<String, Difference>,
    /// Every file of the base, of the restarts up to this one, and of the checkpoint.
    pub files: Vec<CheckedFile>,
}

impl Verification {
    /// Of a lineage some of whose files have a problem: from such files nothing is computed.
    pub fn damaged(files: Vec<CheckedFile>) -> Self {
        let num_damaged = files.iter().filter(|file| file.problem.is_some()).count();
        let message = format!(
            "{num_damaged} of {} files are not what was stored; the weights were not rebuilt from them",
            files.len()
        );
        Self::new(false, message, files)
    }

    /// Of whole files from which the weights cannot be rebuilt.
    pub fn unusable(files: Vec<CheckedFile>, reason: &str) -> Self {
        Self::new(false, format!("every file is what was stored, and the weights cannot be rebuilt: {reason}"), files)
    }

    /// Of whole files, where there is nothing to compare the rebuilt weights with.
    pub fn without_merged(files: Vec<CheckedFile>) -> Self {
        let message = "every file is what was stored, and the weights can be rebuilt; there is no checkpoint at the \
            restart's step to compare them with";
        Self::new(true, message.into(), files)
    }

    /// Of whole files whose rebuilt weights were compared with a checkpoint.
    pub fn compared(files: Vec<CheckedFile>, checkpoint: NodeId, differences: Differences) -> Self {
        let max_rel = differences.values().map(|difference| difference.max_rel).fold(0.0, f64::max);
        let is_within = max_rel <= MAX_REL_DIFFERENCE;
        let message = match is_within {
            true => format!("the rebuilt weights equal the merged ones: they differ by {max_rel:.1e} at most"),
            false => format!(
                "the rebuilt weights are not the merged ones: they differ by {max_rel:.1e}, {MAX_REL_DIFFERENCE:e} is \
                 allowed"
            ),
        };
        Self {
            compared_with: Some(checkpoint),
            is_within_tolerance: Some(is_within),
            differences,
            ..Self::new(is_within, message, files)
        }
    }

    fn new(is_sound: bool, message: String, files: Vec<CheckedFile>) -> Self {
        let differences = BTreeMap::new();
        Self { is_sound, message, compared_with: None, is_within_tolerance: None, differences, files }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(max_rel: f64) -> Verification {
        let differences = [("norm", 0.0), ("q_proj", max_rel)];
        let differences = differences.map(|(kind, max_rel)| (kind.to_owned(), Difference { max_abs: 1.0, max_rel }));
        Verification::compared(Vec::new(), NodeId::new(), differences.into())
    }

    #[test]
    fn weights_within_the_tolerance_are_sound_and_others_are_not() {
        assert!(of(1e-6).is_sound && of(0.0).is_sound);
        let verification = of(1.1e-6);
        assert_eq!((verification.is_sound, verification.is_within_tolerance), (false, Some(false)));
        assert!(verification.message.contains("1.1e-6, 1e-6 is allowed"), "{}", verification.message);
    }

    #[test]
    fn a_damaged_file_is_counted_and_nothing_is_said_of_weights() {
        let file = |problem: Option<&str>| CheckedFile {
            node: NodeId::new(),
            name: "model.safetensors".into(),
            size_bytes: 1,
            sha256: "0".into(),
            problem: problem.map(str::to_owned),
        };
        let verification = Verification::damaged(vec![file(None), file(Some("is gone"))]);
        assert!(!verification.is_sound && verification.is_within_tolerance.is_none());
        assert!(verification.message.starts_with("1 of 2 files"), "{}", verification.message);
    }
}
