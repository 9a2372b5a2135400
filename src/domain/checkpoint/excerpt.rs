//! What a checkpoint is judged by: its small files as a whole, of its weights the headers alone.

use std::{
    collections::{BTreeMap, BTreeSet},
    ops::Range,
};

use bytes::Bytes;
use serde::de::IgnoredAny;
use serde_json::Value;

use super::{
    CONFIG_FILE, INDEX_FILE, MAX_PROBLEMS, Shard, check_index, check_set, check_tensors, header_bytes, is_weights,
    read_config, read_header, tokenizer::check_tokenizer,
};
use crate::domain::{data::TOKENIZER_FILE, problem::Problem, spec::ModelSpec};

/// All headers together, which are in memory at the same time.
const MAX_HEADERS_BYTES: u64 = 16 << 20;

/// The parts of a checkpoint that its check reads, wherever its files lie.
#[derive(Debug, Default)]
pub struct Excerpt {
    names: BTreeSet<String>,
    small_files: BTreeMap<String, Bytes>,
    headers: Vec<Header>,
    headers_bytes: u64,
    /// Of files that could not be looked into.
    problems: Vec<Problem>,
}

#[derive(Debug)]
struct Header {
    file: String,
    file_bytes: u64,
    content: Bytes,
}

impl Excerpt {
    pub fn add_small_file(&mut self, name: &str, content: Bytes) {
        self.names.insert(name.to_owned());
        self.small_files.insert(name.to_owned(), content);
    }

    /// Where the header of a weight file lies that begins with `prefix`; `None` if it is not to be read.
    pub fn header_range(&mut self, name: &str, prefix: &[u8], file_bytes: u64) -> Option<Range<u64>> {
        let header_bytes = header_bytes(prefix, file_bytes).and_then(|header_bytes| {
            let left_bytes = MAX_HEADERS_BYTES - self.headers_bytes;
            match header_bytes <= left_bytes {
                true => Ok(header_bytes),
                false => Err(format!(
                    "has a header of {header_bytes} bytes, with which those of all files have more than the \
                     {MAX_HEADERS_BYTES} that are taken"
                )),
            }
        });
        match header_bytes {
            Ok(header_bytes) => {
                self.headers_bytes += header_bytes;
                let start = prefix.len() as u64;
                Some(start..start + header_bytes)
            }
            Err(reason) => {
                self.add_problem(name, Problem::at(&[name], reason));
                None
            }
        }
    }

    pub fn add_header(&mut self, name: &str, content: Bytes, file_bytes: u64) {
        self.names.insert(name.to_owned());
        self.headers.push(Header { file: name.to_owned(), file_bytes, content });
    }

    /// Enters a file that is there and cannot be looked into.
    pub fn add_problem(&mut self, name: &str, problem: Problem) {
        self.names.insert(name.to_owned());
        self.problems.push(problem);
    }

    /// The model of a checkpoint that can be continued from; else every problem with its files. Takes seconds.
    pub fn check(mut self) -> Result<ModelSpec, Vec<Problem>> {
        let mut problems = check_set(&self.names.iter().map(String::as_str).collect());
        let is_complete = problems.is_empty();
        problems.append(&mut self.problems);

        let model = self.small_files.remove(CONFIG_FILE).and_then(|content| {
            let (model, more) = check_config(&content);
            problems.extend(more);
            model
        });
        let tokenizer = self.small_files.remove(TOKENIZER_FILE);
        let index = self.small_files.remove(INDEX_FILE).and_then(|content| {
            serde_json::from_slice::<Value>(&content).map_err(|error| problems.push(no_json(INDEX_FILE, &error))).ok()
        });
        for (name, content) in std::mem::take(&mut self.small_files) {
            if let Err(error) = serde_json::from_slice::<BTreeMap<String, IgnoredAny>>(&content) {
                problems.push(no_json(&name, &error));
            }
        }
        if let Some(shards) = self.shards(&mut problems).filter(|_| is_complete) {
            problems.extend(model.iter().flat_map(|model| check_tensors(model, &shards)));
            problems.extend(index.into_iter().flat_map(|index| check_index(index, &shards)));
        }
        if let Some(content) = tokenizer {
            let problem = check_tokenizer(&content, model.as_ref().map(|model| model.vocab_size));
            problems.extend(problem.map(|message| Problem::at(&[TOKENIZER_FILE], message)));
        }
        match model {
            Some(model) if problems.is_empty() => Ok(model),
            _ => Err(problems.into_iter().take(MAX_PROBLEMS).map(Problem::shortened).collect()),
        }
    }

    /// `None` if a weight file cannot be used, which is then among the problems.
    fn shards(&mut self, problems: &mut Vec<Problem>) -> Option<Vec<Shard>> {
        let num_files = self.names.iter().filter(|name| is_weights(name)).count();
        let mut shards = Vec::new();
        for Header { file, file_bytes, content } in self.headers.drain(..) {
            match read_header(&content, file_bytes) {
                Ok(header) => shards.push(Shard { file, header }),
                Err(reason) => problems.push(Problem::at(&[&file], reason)),
            }
        }
        (shards.len() == num_files).then_some(shards)
    }
}

/// The sizes that a `config.json` gives, if they make a model, and everything that is wrong with it.
pub fn check_config(content: &[u8]) -> (Option<ModelSpec>, Vec<Problem>) {
    match serde_json::from_slice::<Value>(content) {
        Ok(config) if !config.is_object() => (None, vec![Problem::at(&[CONFIG_FILE], "is no JSON object")]),
        Ok(config) => {
            let (model, problems) = read_config(config);
            (model, problems.into_iter().map(|problem| problem.within(CONFIG_FILE).shortened()).collect())
        }
        Err(error) => (None, vec![no_json(CONFIG_FILE, &error).shortened()]),
    }
}

fn no_json(name: &str, error: &serde_json::Error) -> Problem {
    Problem::at(&[name], format!("is no JSON object: {error}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pointers(excerpt: Excerpt) -> Vec<String> {
        excerpt.check().unwrap_err().into_iter().map(|problem| problem.pointer).collect()
    }

    #[test]
    fn small_files_are_judged_together() {
        let mut excerpt = Excerpt::default();
        for (name, content) in [("config.json", "[]"), ("tokenizer.json", "{"), ("generation_config.json", "7")] {
            excerpt.add_small_file(name, Bytes::from(content));
        }
        let wanted = ["/model.safetensors", "/config.json", "/generation_config.json", "/tokenizer.json"];
        assert_eq!(pointers(excerpt), wanted);
    }

    #[test]
    fn headers_that_are_large_together_are_refused_by_name() {
        let mut excerpt = Excerpt::default();
        let header_bytes = 4_u64 << 20;
        let prefix = header_bytes.to_le_bytes();
        for index in 1..=4 {
            let name = format!("model-{index:05}-of-00005.safetensors");
            assert_eq!(excerpt.header_range(&name, &prefix, 1 << 30), Some(8..8 + header_bytes));
        }
        let name = "model-00005-of-00005.safetensors";
        assert_eq!(excerpt.header_range(name, &1_u64.to_le_bytes(), 1 << 30), None);
        assert!(pointers(excerpt).contains(&format!("/{name}")));
        let too_long = (header_bytes + 1).to_le_bytes();
        assert_eq!(Excerpt::default().header_range("model.safetensors", &too_long, 1 << 30), None);
    }
}
