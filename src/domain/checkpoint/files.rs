//! The files of a checkpoint by name.

use std::collections::BTreeSet;

use crate::domain::{
    data::{TOKENIZER_CONFIG_FILE, TOKENIZER_FILE},
    lineage::MODEL_FILE,
    problem::Problem,
};

pub const CONFIG_FILE: &str = "config.json";
pub const GENERATION_CONFIG_FILE: &str = "generation_config.json";
/// Which shard holds which tensor.
pub const INDEX_FILE: &str = "model.safetensors.index.json";
pub const SPECIAL_TOKENS_FILE: &str = "special_tokens_map.json";

/// What a tokenizer consists of; only the first is always there.
pub const TOKENIZER_FILES: [&str; 3] = [TOKENIZER_FILE, TOKENIZER_CONFIG_FILE, SPECIAL_TOKENS_FILE];

/// What is taken, in words.
pub const TAKEN_FILES: &str = "model.safetensors, or model-00001-of-0000N.safetensors and so on with \
    model.safetensors.index.json; config.json, generation_config.json, tokenizer.json, tokenizer_config.json and \
    special_tokens_map.json";

/// The (number, count) of `model-00001-of-00002.safetensors`.
fn shard_number(name: &str) -> Option<(u32, u32)> {
    let is_number = |text: &str| text.len() == 5 && text.bytes().all(|byte| byte.is_ascii_digit());
    let number = |text: &str| is_number(text).then(|| text.parse::<u32>().ok()).flatten();
    let (index, count) = name.strip_prefix("model-")?.strip_suffix(".safetensors")?.split_once("-of-")?;
    let (index, count) = (number(index)?, number(count)?);
    (1..=count).contains(&index).then_some((index, count))
}

pub fn is_weights(name: &str) -> bool {
    name == MODEL_FILE || shard_number(name).is_some()
}

pub fn is_taken(name: &str) -> bool {
    is_weights(name) || max_bytes(name).is_some()
}

/// Whether a trainer that begins with the checkpoint reads the file.
pub fn is_staged(name: &str) -> bool {
    is_weights(name) || [CONFIG_FILE, INDEX_FILE].contains(&name)
}

/// The limit of a file that is read whole.
pub fn max_bytes(name: &str) -> Option<u64> {
    match name {
        // Sizes and names, some kilobytes.
        CONFIG_FILE => Some(64 << 10),
        GENERATION_CONFIG_FILE | SPECIAL_TOKENS_FILE => Some(1 << 20),
        // Lists every added token.
        TOKENIZER_CONFIG_FILE => Some(8 << 20),
        // A line for each tensor.
        INDEX_FILE => Some(4 << 20),
        TOKENIZER_FILE => Some(64 << 20),
        _ => None,
    }
}

/// The problem of a file above [`max_bytes`].
pub fn too_large(name: &str, limit_bytes: u64) -> Problem {
    Problem::at(&[name], format!("has more than the {limit_bytes} bytes that are taken of it"))
}

/// What is wrong with these files as a set: what is missing, and what excludes each other.
pub fn check_set(names: &BTreeSet<&str>) -> Vec<Problem> {
    let mut problems = Vec::new();
    let mut problem = |name: &str, message: String| problems.push(Problem::at(&[name], message));
    let shards: BTreeSet<_> = names.iter().filter_map(|name| shard_number(name)).collect();
    let counts: BTreeSet<_> = shards.iter().map(|(_, count)| *count).collect();

    if !names.contains(CONFIG_FILE) {
        problem(CONFIG_FILE, "is missing: it says which model the weights are".into());
    }
    match (names.contains(MODEL_FILE), counts.first()) {
        (false, None) => problem(MODEL_FILE, format!("is missing; taken are {TAKEN_FILES}")),
        (true, Some(_)) => problem(MODEL_FILE, "lies beside shards: send the one or the others".into()),
        (true, None) if names.contains(INDEX_FILE) => problem(INDEX_FILE, "names shards, and there are none".into()),
        (true, None) => {}
        (false, Some(&count)) => {
            if !names.contains(INDEX_FILE) {
                problem(INDEX_FILE, "is missing: shards come with their index".into());
            }
            if counts.len() > 1 {
                problem(INDEX_FILE, format!("lies beside shards of several sets: of {counts:?} files"));
            } else if shards.len() < count as usize {
                let missing = (1..=count).filter(|&index| !shards.contains(&(index, count))).take(super::MAX_PROBLEMS);
                missing.for_each(|index| {
                    problem(&format!("model-{index:05}-of-{count:05}.safetensors"), "is missing".into());
                });
            }
        }
    }
    problems
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pointers(names: &[&str]) -> Vec<String> {
        check_set(&names.iter().copied().collect()).into_iter().map(|problem| problem.pointer).collect()
    }

    #[test]
    fn names_of_the_layout_are_taken_and_no_others() {
        for name in ["model.safetensors", "model-00001-of-00001.safetensors", "model-00002-of-00012.safetensors"] {
            assert!(is_weights(name) && is_taken(name) && is_staged(name), "{name}");
        }
        for name in ["config.json", "tokenizer.json", "special_tokens_map.json", "model.safetensors.index.json"] {
            assert!(is_taken(name) && !is_weights(name), "{name}");
        }
        for name in [
            "model-00000-of-00002.safetensors",
            "model-00003-of-00002.safetensors",
            "model-1-of-2.safetensors",
            "model-+0001-of-00002.safetensors",
            "README.md",
            "tokenizer.model",
            "manifest.json",
            "a/config.json",
            "",
        ] {
            assert!(!is_taken(name), "{name}");
        }
    }

    #[test]
    fn a_set_says_what_it_lacks() {
        assert_eq!(pointers(&["config.json", "model.safetensors"]), [""; 0]);
        let (first, second) = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors");
        assert_eq!(pointers(&["config.json", INDEX_FILE, first, second]), [""; 0]);
        assert_eq!(pointers(&[]), ["/config.json", "/model.safetensors"]);
        assert_eq!(pointers(&["config.json", "model.safetensors", INDEX_FILE]), [format!("/{INDEX_FILE}")]);
        assert_eq!(pointers(&["config.json", "model.safetensors", first]), ["/model.safetensors"]);
        assert_eq!(pointers(&["config.json", second]), [format!("/{INDEX_FILE}"), format!("/{first}")]);
        let other = "model-00001-of-00003.safetensors";
        assert_eq!(pointers(&["config.json", INDEX_FILE, first, other]), [format!("/{INDEX_FILE}")]);
    }
}
