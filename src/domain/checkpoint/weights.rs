//! The headers of safetensors files: read, and compared with the tensors that a model has.

use std::collections::{BTreeMap, BTreeSet};

use safetensors::{Dtype, tensor::Metadata};
use serde::Deserialize;
use serde_json::Value;

use super::{INDEX_FILE, MAX_PROBLEMS, tensors::tensors};
use crate::domain::{problem::Problem, spec::ModelSpec};

/// A header lists tensors, some hundred bytes each.
const MAX_HEADER_BYTES: u64 = 16 << 20;
/// The length of the header stands before it.
const PREFIX_BYTES: u64 = 8;

/// A weight file by its name, and what its header says.
#[derive(Debug)]
pub struct Shard {
    pub file: String,
    pub header: Metadata,
}

/// Number formats that are read; each value is one that fp32 holds too.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum WeightDtype {
    F32,
    F16,
    Bf16,
}

impl WeightDtype {
    pub fn of(dtype: Dtype) -> Option<Self> {
        match dtype {
            Dtype::F32 => Some(Self::F32),
            Dtype::F16 => Some(Self::F16),
            Dtype::BF16 => Some(Self::Bf16),
            _ => None,
        }
    }
}

/// How long the header is that begins after `prefix`, the first bytes of a file.
pub fn header_bytes(prefix: &[u8], file_bytes: u64) -> Result<u64, String> {
    let prefix: [u8; PREFIX_BYTES as usize] =
        prefix.try_into().map_err(|_| format!("has {file_bytes} bytes: it is cut short"))?;
    let header_bytes = u64::from_le_bytes(prefix);
    if header_bytes > MAX_HEADER_BYTES {
        return Err(format!(
            "says that its header has {header_bytes} bytes, {MAX_HEADER_BYTES} are taken: it is damaged"
        ));
    }
    if header_bytes > file_bytes.saturating_sub(PREFIX_BYTES) {
        return Err(format!(
            "says that its header has {header_bytes} bytes, the file has {file_bytes}: it is cut short"
        ));
    }
    Ok(header_bytes)
}

/// Reads a header. Its tensors lie one after another, without gaps, up to the end of the file.
pub fn read_header(header: &[u8], file_bytes: u64) -> Result<Metadata, String> {
    let metadata: Metadata =
        serde_json::from_slice(header).map_err(|error| format!("has a header that cannot be used: {error}"))?;
    let has_bytes = file_bytes - PREFIX_BYTES - header.len() as u64;
    let wants_bytes = metadata.data_len() as u64;
    if wants_bytes > has_bytes {
        return Err(format!("is cut short: its tensors take {wants_bytes} bytes, {has_bytes} are there"));
    }
    if wants_bytes < has_bytes {
        return Err(format!("has {} bytes after its last tensor: it is damaged", has_bytes - wants_bytes));
    }
    Ok(metadata)
}

/// What keeps these files from being the weights of the model: tensors that are missing, misshapen, in another number
/// format, there twice, or unknown.
pub fn check_tensors(model: &ModelSpec, shards: &[Shard]) -> Vec<Problem> {
    let mut problems = Vec::new();
    let mut found = BTreeMap::new();
    for shard in shards {
        for name in shard.header.offset_keys() {
            match found.get(&name) {
                Some(other) => {
                    problems.push(Problem::at(&[&shard.file, &name], format!("is also in {other}")));
                }
                None => _ = found.insert(name, &shard.file),
            }
        }
    }
    let place_of_missing = match shards {
        [shard] => shard.file.as_str(),
        _ => INDEX_FILE,
    };
    for wanted in tensors(model) {
        let Some(file) = found.remove(&wanted.name) else {
            problems.push(Problem::at(&[place_of_missing, &wanted.name], "is missing"));
            continue;
        };
        let info = shards.iter().find(|shard| &shard.file == file).and_then(|shard| shard.header.info(&wanted.name));
        let Some(info) = info else { continue };
        if !info.shape.iter().map(|&n| n as i64).eq(wanted.shape.iter().copied()) {
            let message = format!("has the shape {:?}; by config.json it is {:?}", info.shape, wanted.shape);
            problems.push(Problem::at(&[file, &wanted.name], message));
        }
        if WeightDtype::of(info.dtype).is_none() {
            let message = format!("is {}; taken are F32, F16 and BF16", info.dtype);
            problems.push(Problem::at(&[file, &wanted.name], message));
        }
    }
    let unknown = found.into_iter().filter(|(name, _)| !is_ignored(name, model));
    problems
        .extend(unknown.map(|(name, file)| Problem::at(&[file, &name], "is no tensor of the model in config.json")));
    problems.truncate(MAX_PROBLEMS);
    problems
}

/// Tensors that follow from others: tables of older versions, and a head that is tied to the embedding.
fn is_ignored(name: &str, model: &ModelSpec) -> bool {
    name.ends_with("rotary_emb.inv_freq") || (model.tie_word_embeddings && name == "lm_head.weight")
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct Index {
    weight_map: Option<BTreeMap<String, String>>,
}

/// What the index says otherwise than the shards do.
pub fn check_index(index: Value, shards: &[Shard]) -> Vec<Problem> {
    let (index, problems) = crate::domain::json::parse::<Index>(index);
    if let [first, ..] = &problems[..] {
        return vec![Problem::at(&[INDEX_FILE], format!("{} {}", first.pointer, first.message).trim_start())];
    }
    let Some(weight_map) = index.weight_map else {
        return vec![Problem::at(&[INDEX_FILE, "weight_map"], "is missing")];
    };
    let said: BTreeSet<_> = weight_map.iter().map(|(tensor, file)| (tensor.clone(), file.as_str())).collect();
    let is: BTreeSet<_> = shards
        .iter()
        .flat_map(|shard| shard.header.offset_keys().into_iter().map(|tensor| (tensor, shard.file.as_str())))
        .collect();
    let wrong = said.difference(&is).map(|(tensor, file)| {
        Problem::at(&[INDEX_FILE, "weight_map", tensor], format!("is said to be in {file}, and is not"))
    });
    let unsaid = is.difference(&said).map(|(tensor, file)| {
        Problem::at(&[INDEX_FILE, "weight_map", tensor], format!("is in {file}, and the index does not say so"))
    });
    wrong.chain(unsaid).take(MAX_PROBLEMS).collect()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    /// A model of one layer without a tied head, 11 tensors in all.
    fn model(tie_word_embeddings: bool) -> ModelSpec {
        serde_json::from_value(json!({
            "preset": null, "vocab_size": 10, "hidden_size": 4, "intermediate_size": 6, "num_hidden_layers": 1,
            "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 8, "rms_norm_eps": 1e-6,
            "rope_theta": 10000.0, "initializer_range": 0.02, "tie_word_embeddings": tie_word_embeddings
        }))
        .unwrap()
    }

    /// A file with these tensors; returns it as it is read.
    fn shard(file: &str, tensors: impl IntoIterator<Item = (String, Vec<i64>, &'static str)>) -> Shard {
        let (mut header, mut end) = (serde_json::Map::new(), 0);
        for (name, shape, dtype) in tensors {
            let start = end;
            end += shape.iter().product::<i64>()
                * if dtype == "F32" {
                    4
                } else if dtype == "F64" {
                    8
                } else {
                    2
                };
            header.insert(name, json!({"dtype": dtype, "shape": shape, "data_offsets": [start, end]}));
        }
        let header = Value::Object(header).to_string();
        let file_bytes = 8 + header.len() as u64 + end as u64;
        Shard { file: file.into(), header: read_header(header.as_bytes(), file_bytes).unwrap() }
    }

    fn all(model: &ModelSpec) -> Vec<(String, Vec<i64>, &'static str)> {
        tensors(model).into_iter().map(|tensor| (tensor.name, tensor.shape, "F32")).collect()
    }

    fn pointers(problems: Vec<Problem>) -> Vec<String> {
        problems.into_iter().map(|problem| problem.pointer).collect()
    }

    #[test]
    fn whole_weights_in_any_number_format_have_no_problem() {
        let model = model(false);
        let mixed = all(&model).into_iter().zip(["F32", "F16", "BF16"].into_iter().cycle());
        let mixed = mixed.map(|((name, shape, _), dtype)| (name, shape, dtype));
        assert_eq!(check_tensors(&model, &[shard("model.safetensors", mixed)]), []);
    }

    #[test]
    fn what_is_missing_misshapen_unknown_or_of_another_format_is_named() {
        let model = model(false);
        let mut tensors = all(&model);
        tensors.retain(|(name, ..)| name != "model.norm.weight");
        tensors[0].1 = vec![9, 4];
        tensors[1].2 = "F64";
        tensors.push(("score.weight".into(), vec![2, 4], "F32"));
        tensors.push(("model.layers.0.self_attn.rotary_emb.inv_freq".into(), vec![1], "F32"));
        assert_eq!(
            pointers(check_tensors(&model, &[shard("model.safetensors", tensors)])),
            [
                "/model.safetensors/model.embed_tokens.weight",
                "/model.safetensors/model.layers.0.self_attn.q_proj.weight",
                "/model.safetensors/model.norm.weight",
                "/model.safetensors/score.weight",
            ]
        );
    }

    #[test]
    fn a_tied_head_may_be_there_and_an_untied_one_must() {
        let head = ("lm_head.weight".to_owned(), vec![10, 4], "F32");
        let tied = model(true);
        let with_head = all(&tied).into_iter().chain([head]);
        assert_eq!(check_tensors(&tied, &[shard("model.safetensors", with_head)]), []);
        let untied = check_tensors(&model(false), &[shard("model.safetensors", all(&tied))]);
        assert_eq!(pointers(untied), ["/model.safetensors/lm_head.weight"]);
    }

    #[test]
    fn shards_and_their_index_must_say_the_same() {
        let model = model(false);
        let mut first = all(&model);
        let mut second = first.split_off(5);
        let map: serde_json::Map<_, _> = [("a", &first), ("b", &second)]
            .into_iter()
            .flat_map(|(file, tensors)| tensors.iter().map(move |(name, ..)| (name.clone(), json!(file))))
            .collect();
        let index = json!({"metadata": {"total_size": 1}, "weight_map": map});
        let shards = [shard("a", first.clone()), shard("b", second.clone())];
        assert_eq!(check_tensors(&model, &shards), []);
        assert_eq!(check_index(index.clone(), &shards), []);

        let moved = second.remove(0);
        let name = moved.0.clone();
        first.push(moved);
        let shards = [shard("a", first), shard("b", second)];
        let in_index = format!("/{INDEX_FILE}/weight_map/{name}");
        assert_eq!(pointers(check_index(index, &shards)), [in_index.clone(), in_index]);
        for bad in [json!([]), json!({"weight_map": {"a": 1}}), json!({})] {
            assert_eq!(check_index(bad, &shards).len(), 1);
        }
    }

    #[test]
    fn a_tensor_in_two_files_or_in_none_is_named() {
        let model = model(false);
        let (mut first, second) = (all(&model), all(&model).split_off(11));
        first.remove(0);
        let problems = check_tensors(&model, &[shard("a", first), shard("b", second)]);
        assert_eq!(
            pointers(problems),
            ["/b/lm_head.weight", "/model.safetensors.index.json/model.embed_tokens.weight"]
        );
    }

    #[test]
    fn a_file_that_is_cut_short_or_damaged_says_how() {
        assert!(header_bytes(b"abc", 3).unwrap_err().contains("cut short"));
        assert!(header_bytes(&100_u64.to_le_bytes(), 107).unwrap_err().contains("cut short"));
        assert_eq!(header_bytes(&100_u64.to_le_bytes(), 108), Ok(100));
        assert!(header_bytes(&u64::MAX.to_le_bytes(), 108).unwrap_err().contains("damaged"));

        let header = br#"{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}"#;
        let whole_bytes = 8 + header.len() as u64 + 8;
        assert!(read_header(header, whole_bytes).is_ok());
        assert!(read_header(header, whole_bytes - 1).unwrap_err().contains("cut short"));
        assert!(read_header(header, whole_bytes + 1).unwrap_err().contains("1 bytes after"));
        for (bad, says) in [
            (r#"{"a":{"dtype":"F32","shape":[2],"data_offsets":[4,12]}}"#, "`a`"),
            (r#"{"a":{"dtype":"F32","shape":[3],"data_offsets":[0,8]}}"#, "shape"),
            (r#"{"a":{"dtype":"F33","shape":[2],"data_offsets":[0,8]}}"#, "F33"),
            (r#"{"a":{"dtype":"F32","shape":[4611686018427387904,4],"data_offsets":[0,8]}}"#, "overflow"),
            ("not json", "expected"),
        ] {
            let error = read_header(bad.as_bytes(), 8 + bad.len() as u64 + 8).unwrap_err();
            assert!(error.contains(says), "{bad}: {error}");
        }
    }
}
