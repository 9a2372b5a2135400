//! Imports point down, and what belongs to one layer is named in no other.

use std::{
    fs,
    path::{Path, PathBuf},
};

/// A word, and the only places below src/ that may use it.
const OWNERS: [(&str, &[&str]); 9] = [
    ("sqlx::query", &["db/"]),
    ("tch::", &["train/"]),
    ("unsafe ", &["train/native/"]),
    ("aws_sdk_s3", &["storage/", "config/"]),
    ("env::var", &["config/"]),
    ("axum::", &["api/"]),
    ("crate::api", &["api/", "serve.rs", "cli.rs"]),
    ("crate::worker", &["worker/", "serve.rs", "cli.rs"]),
    ("crate::client", &["client/", "cli.rs"]),
];

fn sources(folder: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path());
    entries.flat_map(|path| if path.is_dir() { sources(&path) } else { vec![path] }).collect()
}

#[test]
fn every_layer_keeps_to_itself() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut strays = Vec::new();
    let is_test = |path: &PathBuf| path.ends_with("tests.rs");
    for path in sources(&root).into_iter().filter(|path| !is_test(path)) {
        let name = path.strip_prefix(&root).unwrap().to_str().unwrap().to_owned();
        let text = fs::read_to_string(&path).unwrap();
        for (number, line) in text.lines().enumerate().filter(|(_, line)| !line.trim_start().starts_with("//")) {
            for (word, owners) in OWNERS {
                let begins_a_word = line
                    .find(word)
                    .is_some_and(|at| !line[..at].ends_with(|before: char| before.is_alphanumeric() || before == '_'));
                if begins_a_word && !owners.iter().any(|owner| name.starts_with(owner)) {
                    strays.push(format!("{name}:{}: {word}", number + 1));
                }
            }
        }
    }
    assert!(strays.is_empty(), "in the wrong layer:\n{}", strays.join("\n"));
}

#[test]
fn the_domain_names_no_other_layer() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("src/domain");
    for path in sources(&root) {
        for word in fs::read_to_string(&path).unwrap().split("crate::").skip(1) {
            assert!(word.starts_with("domain"), "{} names crate::{:.20}", path.display(), word);
        }
    }
}
