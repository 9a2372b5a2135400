//! A folder as a dataset: which of its files are documents, and each as a JSON line.
//!
//! The order is that of the relative paths, so that the same folder gives the same bytes everywhere.

use std::{
    fs,
    path::{Path, PathBuf},
};

use anyhow::Context as _;
use serde::Serialize;

/// Which files of a folder are taken. Hidden ones and links to folders never are.
#[derive(Debug, Clone, Default)]
pub struct Selection {
    /// File name endings such as `.py`; all files if empty.
    pub include: Vec<String>,
    /// Names of files and folders that are left out.
    pub exclude: Vec<String>,
}

/// A file that becomes a document.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SourceFile {
    pub path: PathBuf,
    /// Relative to the folder, with `/` between its parts.
    pub source: String,
    pub size_bytes: u64,
}

impl Selection {
    /// Every selected file below `folder`, sorted.
    pub fn files(&self, folder: &Path) -> anyhow::Result<Vec<SourceFile>> {
        let mut files = Vec::new();
        self.collect(folder, "", &mut files)?;
        files.sort_by(|a, b| a.source.cmp(&b.source));
        Ok(files)
    }

    fn collect(&self, folder: &Path, prefix: &str, files: &mut Vec<SourceFile>) -> anyhow::Result<()> {
        let entries = fs::read_dir(folder).with_context(|| format!("read the folder {}", folder.display()))?;
        for entry in entries {
            let entry = entry.with_context(|| format!("read the folder {}", folder.display()))?;
            let name = entry.file_name().to_string_lossy().into_owned();
            if name.starts_with('.') || self.exclude.contains(&name) {
                continue;
            }
            let (path, source) = (entry.path(), format!("{prefix}{name}"));
            if entry.file_type()?.is_dir() {
                self.collect(&path, &format!("{source}/"), files)?;
            } else if self.is_included(&name) {
                // A link may lead nowhere, or to a folder that contains this one.
                let Ok(metadata) = fs::metadata(&path) else { continue };
                if metadata.is_file() {
                    files.push(SourceFile { path, source, size_bytes: metadata.len() });
                }
            }
        }
        Ok(())
    }

    fn is_included(&self, name: &str) -> bool {
        self.include.is_empty() || self.include.iter().any(|ending| name.ends_with(ending.as_str()))
    }
}

/// A document as the API takes it.
#[derive(Serialize)]
struct Document<'a> {
    source: &'a str,
    text: &'a str,
}

/// The file's JSON line, or why it cannot be a document.
pub fn json_line(file: &SourceFile, content: &[u8]) -> Result<Vec<u8>, String> {
    let text = match std::str::from_utf8(content) {
        Ok("") => return Err("is empty".into()),
        Ok(text) => text,
        Err(error) => return Err(format!("is not UTF-8 at byte {}", error.valid_up_to())),
    };
    let mut line = serde_json::to_vec(&Document { source: &file.source, text }).map_err(|error| error.to_string())?;
    line.push(b'\n');
    Ok(line)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn source_file(source: &str) -> SourceFile {
        SourceFile { path: PathBuf::from(source), source: source.into(), size_bytes: 0 }
    }

    #[test]
    fn files_are_selected_by_ending_and_name_and_come_sorted() {
        let folder = std::env::temp_dir().join(format!("relora-folder-{}", std::process::id()));
        for name in ["b/x.py", "b.py", "a/y.py", "a/y.txt", "test/z.py", ".git/w.py"] {
            let path = folder.join(name);
            fs::create_dir_all(path.parent().expect("has a parent")).expect("makes the folder");
            fs::write(path, "x").expect("writes");
        }
        let selection = Selection { include: vec![".py".into()], exclude: vec!["test".into()] };
        let files = selection.files(&folder).expect("reads the folder");
        fs::remove_dir_all(&folder).expect("removes the folder");
        let sources: Vec<_> = files.iter().map(|file| file.source.as_str()).collect();
        assert_eq!(sources, ["a/y.py", "b.py", "b/x.py"]);
    }

    #[test]
    fn a_document_is_one_line_whatever_its_text() {
        let line = json_line(&source_file("a.py"), "one\n\"two\"\u{2028}".as_bytes()).expect("is UTF-8");
        assert_eq!(line, "{\"source\":\"a.py\",\"text\":\"one\\n\\\"two\\\"\u{2028}\"}\n".as_bytes());
    }

    #[test]
    fn a_file_that_is_no_text_says_where() {
        assert_eq!(json_line(&source_file("a"), b"ab\xff"), Err("is not UTF-8 at byte 2".into()));
        assert_eq!(json_line(&source_file("a"), b""), Err("is empty".into()));
    }
}
