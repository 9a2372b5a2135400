//! Reads a raw dataset as documents, split into training and validation text.
//!
//! Whole documents are held out, chosen by a hash of their text: a document that occurs twice lands on
//! one side, and the choice does not depend on the order. A dataset of a single document is cut once,
//! between two lines.

use std::{
    fs::File,
    io::{BufRead, BufReader},
    path::{Path, PathBuf},
};

use anyhow::{Context, Result};
use serde::Deserialize;
use sha2::{Digest, Sha256};

/// A piece of a document, on one side of the split.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Chunk {
    pub text: String,
    pub held_out: bool,
    pub ends_document: bool,
}

/// A raw dataset whose split is decided.
#[derive(Debug)]
pub struct Documents {
    path: PathBuf,
    is_jsonl: bool,
    split: Split,
    pub num_train: i64,
    pub num_valid: i64,
}

#[derive(Debug, Clone, Copy)]
enum Split {
    /// Documents whose hash is at most this are held out.
    ByDocument { largest_held_out: u64 },
    /// What comes after this many bytes of the only document is held out.
    WithinDocument { train_bytes: usize },
}

#[derive(Deserialize)]
struct JsonDocument {
    text: String,
}

/// Long documents are passed on in pieces of about this size.
const CHUNK_BYTES: usize = 1 << 20;

impl Documents {
    /// Decides which text is held out; reads JSON lines once for that.
    pub fn open(path: &Path, is_jsonl: bool, validation_frac: f64) -> Result<Self> {
        let within = |num_bytes: u64| Split::WithinDocument {
            train_bytes: (num_bytes as f64 * (1.0 - validation_frac)) as usize,
        };
        let documents = |split, num_train: usize, num_valid: usize| Self {
            path: path.to_owned(),
            is_jsonl,
            split,
            num_train: num_train as i64,
            num_valid: num_valid as i64,
        };
        if !is_jsonl {
            let num_bytes = path.metadata().with_context(|| format!("read {}", path.display()))?.len();
            return Ok(documents(within(num_bytes), 1, 1));
        }
        let (mut hashes, mut num_bytes) = (Vec::new(), 0);
        for text in json_texts(path)? {
            let text = text?;
            num_bytes = text.len() as u64;
            hashes.push(hash(&text));
        }
        hashes.sort_unstable();
        let wanted = (validation_frac * hashes.len() as f64).round().max(1.0) as usize;
        let largest_held_out = hashes.get(wanted - 1).copied().unwrap_or(0);
        let num_held_out = hashes.partition_point(|&hash| hash <= largest_held_out);
        if num_held_out == hashes.len() {
            // One document, or copies of one.
            return Ok(documents(within(num_bytes), 1, 1));
        }
        Ok(documents(Split::ByDocument { largest_held_out }, hashes.len() - num_held_out, num_held_out))
    }

    /// All text in order, in pieces.
    pub fn chunks(&self) -> Result<Box<dyn Iterator<Item = Result<Chunk>> + Send>> {
        let split = self.split;
        match split {
            Split::WithinDocument { train_bytes } if !self.is_jsonl => {
                let file = File::open(&self.path).with_context(|| format!("read {}", self.path.display()))?;
                Ok(Box::new(TextChunks {
                    reader: BufReader::with_capacity(CHUNK_BYTES, file),
                    train_bytes,
                    read_bytes: 0,
                }))
            }
            _ => Ok(Box::new(json_texts(&self.path)?.flat_map(move |text| match text {
                Ok(text) => cut(&text, split).into_iter().map(Ok).collect(),
                Err(error) => vec![Err(error)],
            }))),
        }
    }
}

fn json_texts(path: &Path) -> Result<impl Iterator<Item = Result<String>> + Send + use<>> {
    let lines = BufReader::new(File::open(path).with_context(|| format!("read {}", path.display()))?).lines();
    Ok(lines.filter(|line| !matches!(line, Ok(line) if line.trim().is_empty())).map(|line| {
        let document: JsonDocument = serde_json::from_str(&line?).context("read a document's line")?;
        Ok(document.text)
    }))
}

/// Reads a file that is one document, a piece at a time.
struct TextChunks {
    reader: BufReader<File>,
    train_bytes: usize,
    read_bytes: usize,
}

impl TextChunks {
    fn read(&mut self) -> Result<Option<Chunk>> {
        let left_to_train_bytes = self.train_bytes.saturating_sub(self.read_bytes);
        let held_out = left_to_train_bytes == 0;
        let wanted_bytes = if held_out { CHUNK_BYTES } else { left_to_train_bytes.min(CHUNK_BYTES) };
        let mut text = String::new();
        while self.reader.read_line(&mut text).context("read the text")? > 0 {
            let at_word = self.reader.fill_buf()?.first().is_none_or(|next| next.is_ascii_graphic());
            if text.len() >= wanted_bytes && at_word {
                break;
            }
        }
        self.read_bytes += text.len();
        let ends_document = self.reader.fill_buf()?.is_empty();
        Ok((!text.is_empty()).then_some(Chunk { text, held_out, ends_document }))
    }
}

impl Iterator for TextChunks {
    type Item = Result<Chunk>;

    fn next(&mut self) -> Option<Self::Item> {
        self.read().transpose()
    }
}

fn hash(text: &str) -> u64 {
    let digest = Sha256::digest(text.as_bytes());
    u64::from_be_bytes(digest[..8].try_into().expect("a SHA-256 has 32 bytes"))
}

fn cut(text: &str, split: Split) -> Vec<Chunk> {
    let (first, rest, held_out) = match split {
        Split::ByDocument { largest_held_out } => (text, "", hash(text) <= largest_held_out),
        Split::WithinDocument { train_bytes } => {
            let at = next_cut(text, train_bytes);
            (&text[..at], &text[at..], false)
        }
    };
    let mut chunks = Vec::new();
    for (mut part, held_out) in [(first, held_out), (rest, true)] {
        while !part.is_empty() {
            let at = next_cut(part, CHUNK_BYTES);
            chunks.push(Chunk { text: part[..at].to_owned(), held_out, ends_document: false });
            part = &part[at..];
        }
    }
    if let Some(last) = chunks.last_mut() {
        last.ends_document = true;
    }
    chunks
}

/// The first place at or after `from_bytes` where a line begins with something other than white
/// space. There the tokenizer's words end anyway, so that pieces give the same tokens as the whole.
fn next_cut(text: &str, from_bytes: usize) -> usize {
    let mut from = from_bytes;
    while let Some(newline) = text.as_bytes().get(from..).and_then(|rest| rest.iter().position(|&b| b == b'\n')) {
        let at = from + newline + 1;
        match text[at..].chars().next() {
            Some(next) if next.is_whitespace() => from = at,
            _ => return at,
        }
    }
    text.len()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn write(name: &str, content: &str) -> PathBuf {
        let path = std::env::temp_dir().join(format!("relora-documents-{}-{name}", std::process::id()));
        std::fs::write(&path, content).unwrap();
        path
    }

    fn split_of(path: &Path, is_jsonl: bool, validation_frac: f64) -> (String, String, Documents) {
        let documents = Documents::open(path, is_jsonl, validation_frac).unwrap();
        let (mut train, mut valid) = (String::new(), String::new());
        for chunk in documents.chunks().unwrap() {
            let chunk = chunk.unwrap();
            let side = if chunk.held_out { &mut valid } else { &mut train };
            side.push_str(&chunk.text);
            if chunk.ends_document {
                side.push('|');
            }
        }
        std::fs::remove_file(path).unwrap();
        (train, valid, documents)
    }

    #[test]
    fn whole_documents_are_held_out_and_copies_stay_together() {
        let lines: String = (0..100).map(|i| format!("{{\"text\": \"document {}\"}}\n", i / 2)).collect();
        let (train, valid, documents) = split_of(&write("jsonl", &lines), true, 0.1);
        assert_eq!((documents.num_train, documents.num_valid), (90, 10));
        for i in 0..50 {
            let name = format!("document {i}|");
            let sides = (train.matches(&name).count(), valid.matches(&name).count());
            assert!(sides == (2, 0) || sides == (0, 2), "{name} occurs {sides:?} times");
        }
    }

    #[test]
    fn a_single_document_is_cut_between_two_lines() {
        let text: String = (0..200).map(|i| format!("line {i}\n  and its tail\n")).collect();
        let (train, valid, _) = split_of(&write("text", &text), false, 0.25);
        assert_eq!(format!("{train}{valid}"), format!("{text}|"));
        assert!(train.ends_with("tail\n") && valid.starts_with("line "));
        let held_out_frac = valid.len() as f64 / text.len() as f64;
        assert!((held_out_frac - 0.25).abs() < 0.01, "{held_out_frac}");
    }

    #[test]
    fn long_documents_come_in_pieces_that_add_up() {
        let line = "word ".repeat(99) + "\n";
        let text = line.repeat(3 * CHUNK_BYTES / line.len());
        let path = write("long", &text);
        let documents = Documents::open(&path, false, 0.1).unwrap();
        let chunks: Vec<_> = documents.chunks().unwrap().map(Result::unwrap).collect();
        assert!(chunks.len() >= 3);
        assert_eq!(chunks.iter().map(|chunk| chunk.text.as_str()).collect::<String>(), text);
        assert_eq!(chunks.iter().filter(|chunk| chunk.ends_document).count(), 1);
        std::fs::remove_file(path).unwrap();
    }
}
