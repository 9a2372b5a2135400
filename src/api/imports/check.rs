//! Looks at the stored files of an import: small ones as a whole, of weights the headers alone.

use std::collections::BTreeSet;

use bytes::Bytes;
use serde_json::Value;
use tokenizers::Tokenizer;

use crate::{
    api::error::{ApiError, ApiResult},
    db::nodes::StoredFile,
    domain::{
        checkpoint::{
            CONFIG_FILE, GENERATION_CONFIG_FILE, INDEX_FILE, MAX_PROBLEMS, SPECIAL_TOKENS_FILE, Shard, check_index,
            check_set, check_tensors, header_bytes, is_weights, max_bytes, read_config, read_header,
        },
        data::{TOKENIZER_CONFIG_FILE, TOKENIZER_FILE},
        problem::Problem,
        spec::ModelSpec,
    },
    storage::{Key, Store},
};

/// The model of a checkpoint that can be continued from; else every problem with its files.
pub async fn check(store: &Store, files: &[StoredFile]) -> ApiResult<ModelSpec> {
    let mut problems = check_set(&files.iter().map(|file| file.name.as_str()).collect::<BTreeSet<_>>());
    let is_complete = problems.is_empty();
    let json = read_json(store, files, &mut problems).await?;
    let find = |name: &str| json.iter().find(|(known, _)| known == name).map(|(_, json)| json.clone());

    let model = find(CONFIG_FILE).and_then(|config| {
        let (model, more) = read_config(config);
        problems.extend(more.into_iter().map(|problem| problem.within(CONFIG_FILE)));
        model
    });
    if let Some(shards) = read_headers(store, files, &mut problems).await?.filter(|_| is_complete) {
        problems.extend(model.iter().flat_map(|model| check_tensors(model, &shards)));
        problems.extend(find(INDEX_FILE).into_iter().flat_map(|index| check_index(index, &shards)));
    }
    if let Some(file) = files.iter().find(|file| file.name == TOKENIZER_FILE) {
        let content = read_whole(store, file).await?;
        let vocab_size = model.as_ref().map(|model| model.vocab_size);
        // Seconds of work for a large vocabulary.
        let checked = tokio::task::spawn_blocking(move || check_tokenizer(&content, vocab_size)).await;
        let problem = checked.unwrap_or_else(|_| Some("cannot be read by the tokenizers library".into()));
        problems.extend(problem.map(|message| Problem::at(&[TOKENIZER_FILE], message)));
    }
    match model {
        Some(model) if problems.is_empty() => Ok(model),
        _ => {
            problems.truncate(MAX_PROBLEMS);
            Err(ApiError::InvalidCheckpoint(problems))
        }
    }
}

/// The JSON files, apart from the tokenizer, which has a reader of its own.
async fn read_json(
    store: &Store,
    files: &[StoredFile],
    problems: &mut Vec<Problem>,
) -> ApiResult<Vec<(String, Value)>> {
    const NAMES: [&str; 5] =
        [CONFIG_FILE, INDEX_FILE, GENERATION_CONFIG_FILE, TOKENIZER_CONFIG_FILE, SPECIAL_TOKENS_FILE];
    let mut read = Vec::new();
    for file in files.iter().filter(|file| NAMES.contains(&file.name.as_str())) {
        match serde_json::from_slice::<Value>(&read_whole(store, file).await?) {
            Ok(json) if json.is_object() => read.push((file.name.clone(), json)),
            Ok(_) => problems.push(Problem::at(&[&file.name], "is no JSON object")),
            Err(error) => problems.push(Problem::at(&[&file.name], format!("is not JSON: {error}"))),
        }
    }
    Ok(read)
}

/// The headers of all weight files; `None` if one cannot be used, which is then among the problems.
async fn read_headers(
    store: &Store,
    files: &[StoredFile],
    problems: &mut Vec<Problem>,
) -> ApiResult<Option<Vec<Shard>>> {
    let mut shards = Vec::new();
    let mut are_whole = true;
    for file in files.iter().filter(|file| is_weights(&file.name)) {
        let file_bytes = file.size_bytes.unsigned_abs();
        let prefix = read_range(store, file, 0, file_bytes.min(8)).await?;
        let header = match header_bytes(&prefix, file_bytes) {
            Ok(header_bytes) => {
                let header = read_range(store, file, 8, header_bytes).await?;
                read_header(&header, file_bytes)
            }
            Err(reason) => Err(reason),
        };
        match header {
            Ok(header) => shards.push(Shard { file: file.name.clone(), header }),
            Err(reason) => {
                are_whole = false;
                problems.push(Problem::at(&[&file.name], reason));
            }
        }
    }
    Ok(are_whole.then_some(shards))
}

async fn read_whole(store: &Store, file: &StoredFile) -> ApiResult<Bytes> {
    Ok(store.get_bytes(&Key::from(file.object_key.clone()), max_bytes(&file.name).unwrap_or(0)).await?)
}

async fn read_range(store: &Store, file: &StoredFile, start: u64, len_bytes: u64) -> ApiResult<Bytes> {
    let key = Key::from(file.object_key.clone());
    Ok(store.get_range_bytes(&key, start..start + len_bytes).await?)
}

fn check_tokenizer(content: &[u8], vocab_size: Option<i64>) -> Option<String> {
    let tokenizer = match Tokenizer::from_bytes(content) {
        Ok(tokenizer) => tokenizer,
        Err(error) => return Some(format!("cannot be read by the tokenizers library: {error}")),
    };
    let last_id = tokenizer.get_vocab(true).values().copied().max().map(i64::from);
    match (last_id, vocab_size) {
        (None, _) => Some("has no tokens".into()),
        (Some(last_id), Some(vocab_size)) if last_id >= vocab_size => {
            Some(format!("has tokens up to the id {last_id}; the vocab_size in config.json is {vocab_size}"))
        }
        _ => None,
    }
}
