//! The headers of safetensors files: read, and compared with the tensors that a model has.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
};

use safetensors::{
    Dtype,
    tensor::{Metadata, TensorInfo},
};
use serde::{
    Deserialize, Deserializer,
    de::{Error as _, IgnoredAny, MapAccess, Visitor},
};
use serde_json::Value;

use super::{INDEX_FILE, MAX_PROBLEMS, tensors::tensors};
use crate::domain::{problem::Problem, spec::ModelSpec};

/// A header lists tensors, some hundred bytes each: the largest model that is taken needs less than 1 MiB.
const MAX_HEADER_BYTES: u64 = 4 << 20;
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
    let cannot_be_used = |error: &dyn fmt::Display| format!("has a header that cannot be used: {error}");
    let Tensors(mut tensors) = serde_json::from_slice(header).map_err(|error| cannot_be_used(&error))?;
    tensors.sort_by_key(|(_, info)| info.data_offsets);
    let metadata = Metadata::new(None, tensors).map_err(|error| cannot_be_used(&error))?;
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

/// The tensors of a header. What its writer noted beside them may be anything, and is not kept.
struct Tensors(Vec<(String, TensorInfo)>);

impl<'de> Deserialize<'de> for Tensors {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_map(TensorsVisitor).map(Self)
    }
}

struct TensorsVisitor;

impl<'de> Visitor<'de> for TensorsVisitor {
    type Value = Vec<(String, TensorInfo)>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object of tensors")
    }

    fn visit_map<M: MapAccess<'de>>(self, mut map: M) -> Result<Self::Value, M::Error> {
        let mut tensors = BTreeMap::new();
        while let Some(name) = map.next_key::<String>()? {
            if name == "__metadata__" {
                map.next_value::<IgnoredAny>()?;
                continue;
            }
            let info = map.next_value()?;
            if tensors.insert(name, info).is_some() {
                return Err(M::Error::custom("a tensor is there twice"));
            }
        }
        Ok(tensors.into_iter().collect())
    }
}

/// What keeps these files from being the weights of the model: tensors that are missing, misshapen, in another number
/// format, there twice, or unknown.
pub fn check_tensors(model: &ModelSpec, shards: &[Shard]) -> Vec<Problem> {
    let mut problems = Vec::new();
    let mut found = BTreeMap::<_, &Shard>::new();
    for shard in shards {
        for name in shard.header.offset_keys() {
            match found.get(&name) {
                Some(other) => {
                    let message = format!("is also in {}", other.file);
                    problems.push(Problem::at(&[&shard.file, &name], message));
                }
                None => _ = found.insert(name, shard),
            }
        }
    }
    let place_of_missing = match shards {
        [shard] => shard.file.as_str(),
        _ => INDEX_FILE,
    };
    for wanted in tensors(model) {
        let Some(shard) = found.remove(&wanted.name) else {
            problems.push(Problem::at(&[place_of_missing, &wanted.name], "is missing"));
            continue;
        };
        let Some(info) = shard.header.info(&wanted.name) else { continue };
        if !info.shape.iter().map(|&n| n as i64).eq(wanted.shape.iter().copied()) {
            let (has, wants) = (shape_text(&info.shape), &wanted.shape);
            let message = format!("has the shape {has}; by config.json it is {wants:?}");
            problems.push(Problem::at(&[&shard.file, &wanted.name], message));
        }
        if WeightDtype::of(info.dtype).is_none() {
            let message = format!("is {}; taken are F32, F16 and BF16", info.dtype);
            problems.push(Problem::at(&[&shard.file, &wanted.name], message));
        }
    }
    let unknown = found.into_iter().filter(|(name, _)| !is_ignored(name, model));
    let is_unknown = "is no tensor of the model in config.json";
    problems.extend(unknown.map(|(name, shard)| Problem::at(&[&shard.file, &name], is_unknown)).take(MAX_PROBLEMS));
    problems.truncate(MAX_PROBLEMS);
    problems
}

/// A shape as it is shown: one of noise could have millions of dimensions.
fn shape_text(shape: &[usize]) -> String {
    const MAX_SHOWN: usize = 8;
    match shape.get(..MAX_SHOWN) {
        Some(shown) if shape.len() > MAX_SHOWN => format!("{shown:?} and {} more", shape.len() - MAX_SHOWN),
        _ => format!("{shape:?}"),
    }
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

/// What the index says otherwise than the shards do. An index that cannot be read is one problem.
pub fn check_index(index: Value, shards: &[Shard]) -> Vec<Problem> {
    // serde reads a struct from a list too, element by element: nobody means that.
    if !index.is_object() {
        return vec![Problem::at(&[INDEX_FILE], "is no JSON object")];
    }
    let weight_map = match serde_json::from_value::<Index>(index) {
        Ok(Index { weight_map: Some(weight_map) }) => weight_map,
        Ok(Index { weight_map: None }) => return vec![Problem::at(&[INDEX_FILE, "weight_map"], "is missing")],
        Err(error) => return vec![Problem::at(&[INDEX_FILE, "weight_map"], format!("cannot be read: {error}"))],
    };
    let names: Vec<_> = shards.iter().map(|shard| (shard.header.offset_keys(), shard.file.as_str())).collect();
    let said: BTreeSet<_> = weight_map.iter().map(|(tensor, file)| (tensor.as_str(), file.as_str())).collect();
    let is: BTreeSet<_> =
        names.iter().flat_map(|(tensors, file)| tensors.iter().map(move |tensor| (tensor.as_str(), *file))).collect();
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
        for bad in [json!([]), json!({"weight_map": {"a": 1}}), json!({"weight_map": {"a": 1, "b": 2}}), json!({})] {
            assert_eq!(check_index(bad, &shards).len(), 1);
        }
    }

    #[test]
    fn a_header_is_read_without_its_notes_and_takes_no_tensor_twice() {
        let tensor = |name: &str, start: u64| {
            format!(r#""{name}":{{"dtype":"F32","shape":[2],"data_offsets":[{start},{}]}}"#, start + 8)
        };
        let notes = r#""__metadata__":{"format":"pt","deep":[{"a":1}]}"#;
        let noted = format!("{{{},{notes},{}}}", tensor("b", 8), tensor("a", 0));
        let header = read_header(noted.as_bytes(), 8 + noted.len() as u64 + 16).unwrap();
        assert_eq!(header.offset_keys(), ["a", "b"]);
        assert!(header.metadata().is_none());
        let twice = format!("{{{},{}}}", tensor("a", 0), tensor("a", 8));
        assert!(read_header(twice.as_bytes(), 8 + twice.len() as u64 + 16).unwrap_err().contains("twice"));
    }

    #[test]
    fn a_shape_of_noise_is_shown_in_part() {
        assert_eq!(shape_text(&[2, 3]), "[2, 3]");
        assert_eq!(shape_text(&[1; 1_000]), "[1, 1, 1, 1, 1, 1, 1, 1] and 992 more");
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
