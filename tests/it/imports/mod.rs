//! Checkpoints from outside: the fixtures, and imports that succeed.

mod jobs;
mod refusals;
mod uploads;

use std::{borrow::Cow, collections::BTreeMap};

use relora::domain::{checkpoint, spec::ModelSpec};
use reqwest::{
    Method,
    multipart::{Form, Part},
};
use safetensors::{Dtype, View};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use sqlx::PgPool;

use crate::app::{Answer, TestApp, send, spec};

type Files = BTreeMap<String, Vec<u8>>;

fn config() -> Value {
    json!({
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 300, "hidden_size": 16,
        "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
        "hidden_act": "silu", "max_position_embeddings": 64, "rms_norm_eps": 1e-5, "eos_token_id": 1,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}, "tie_word_embeddings": false
    })
}

fn tokenizer(num_tokens: i64) -> Value {
    let vocab: BTreeMap<_, _> = (0..num_tokens).map(|id| (format!("t{id}"), id)).collect();
    json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": [], "normalizer": null,
        "pre_tokenizer": {"type": "Whitespace"}, "post_processor": null, "decoder": null,
        "model": {"type": "WordLevel", "vocab": vocab, "unk_token": "t0"}
    })
}

struct Zeros {
    dtype: Dtype,
    shape: Vec<usize>,
}

impl View for &Zeros {
    fn dtype(&self) -> Dtype {
        self.dtype
    }

    fn shape(&self) -> &[usize] {
        &self.shape
    }

    fn data(&self) -> Cow<'_, [u8]> {
        vec![0; self.data_len()].into()
    }

    fn data_len(&self) -> usize {
        self.shape.iter().product::<usize>() * self.dtype.bitsize() / 8
    }
}

fn tensors() -> BTreeMap<String, Zeros> {
    let model: ModelSpec = checkpoint::model_of_config(config()).unwrap();
    let tensors = checkpoint::tensors(&model).into_iter();
    let zeros = |shape: Vec<i64>| Zeros { dtype: Dtype::F32, shape: shape.into_iter().map(|n| n as usize).collect() };
    tensors.map(|tensor| (tensor.name, zeros(tensor.shape))).collect()
}

fn safetensors(tensors: &BTreeMap<String, Zeros>) -> Vec<u8> {
    safetensors::serialize(tensors.iter(), None).unwrap()
}

/// A checkpoint in one file, with a tokenizer.
fn files() -> Files {
    let json = |value: Value| value.to_string().into_bytes();
    Files::from([
        ("config.json".to_owned(), json(config())),
        ("model.safetensors".to_owned(), safetensors(&tensors())),
        ("tokenizer.json".to_owned(), json(tokenizer(290))),
        ("tokenizer_config.json".to_owned(), json(json!({"eos_token": "t1"}))),
    ])
}

/// The same in two shards.
fn sharded() -> Files {
    let mut first = tensors();
    let second = first.split_off("model.layers.1");
    let names = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"];
    let map: BTreeMap<_, _> = [(&first, names[0]), (&second, names[1])]
        .into_iter()
        .flat_map(|(tensors, file)| tensors.keys().map(move |tensor| (tensor.clone(), file)))
        .collect();
    let mut files = files();
    files.remove("model.safetensors");
    files.insert(names[0].into(), safetensors(&first));
    files.insert(names[1].into(), safetensors(&second));
    files.insert("model.safetensors.index.json".into(), json!({"weight_map": map}).to_string().into_bytes());
    files
}

fn form(files: Files) -> Form {
    let part = |form: Form, (name, content)| form.part("file", Part::bytes(content).file_name(name));
    files.into_iter().fold(Form::new(), part)
}

async fn import_form(app: &TestApp, form: Form) -> Answer {
    send(app.request(Method::POST, "/v1/checkpoints").multipart(form)).await
}

async fn import(app: &TestApp, files: Files) -> Answer {
    import_form(app, form(files)).await
}

async fn given_import(app: &TestApp) -> String {
    let answer = import(app, files()).await;
    assert_eq!(answer.status, 201, "{}", answer.text());
    answer.id()
}

/// Refused, with these pointers, and nothing of it is kept.
#[track_caller]
fn assert_refused(app: &TestApp, answer: &Answer, pointers: &[&str]) {
    assert_eq!(answer.problem(422).0, "invalid_checkpoint");
    let mut wanted = pointers.to_vec();
    wanted.sort_unstable();
    assert_eq!(answer.pointers(), wanted, "{}", answer.text());
    assert_eq!(app.stored_objects(), [""; 0]);
}

async fn num_nodes(app: &TestApp) -> i64 {
    sqlx::query_scalar("select count(*) from nodes").fetch_one(&app.pool).await.unwrap()
}

#[sqlx::test]
async fn an_import_is_the_root_of_a_lineage(pool: PgPool) {
    let app = TestApp::start(pool).await;
    let answer = import_form(&app, form(files()).text("name", "mine")).await;
    assert_eq!(answer.status, 201, "{}", answer.text());
    let node = answer.json();
    assert_eq!((&node["kind"], &node["name"]), (&json!("checkpoint"), &json!("mine")));
    for field in ["job", "parent", "lease_epoch"] {
        assert_eq!(node[field], Value::Null, "{field}");
    }
    assert_eq!((&node["step"], &node["restart"], &node["superseded"]), (&json!(0), &json!(0), &json!(false)));

    let names: Vec<_> = node["files"].as_array().unwrap().iter().map(|file| file["name"].as_str().unwrap()).collect();
    assert_eq!(names, ["config.json", "manifest.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"]);
    for (name, content) in files() {
        let file = node["files"].as_array().unwrap().iter().find(|file| file["name"] == name.as_str()).unwrap();
        assert_eq!(file["sha256"], hex::encode(Sha256::digest(&content)), "{name}");
        assert_eq!(app.get(file["url"].as_str().unwrap()).await.bytes, content, "{name}");
    }
    let manifest = app.get(&format!("/v1/checkpoints/{}/files/manifest.json", answer.id())).await.json();
    assert_eq!((&manifest["kind"], manifest["files"].as_array().unwrap().len()), (&json!("checkpoint"), 4));
    assert_eq!(app.get("/v1/checkpoints").await.json()["data"], json!([node]));
}

#[sqlx::test]
async fn shards_are_taken_with_their_index_and_half_precision_too(pool: PgPool) {
    let app = TestApp::start(pool).await;
    assert_eq!(import(&app, sharded()).await.status, 201);

    let mut half = tensors();
    half.values_mut().zip([Dtype::BF16, Dtype::F16].into_iter().cycle()).for_each(|(t, dtype)| t.dtype = dtype);
    half.insert("model.layers.0.self_attn.rotary_emb.inv_freq".into(), Zeros { dtype: Dtype::F64, shape: vec![2] });
    let mut half_files = files();
    half_files.insert("model.safetensors".into(), safetensors(&half));
    let answer = import(&app, half_files).await;
    assert_eq!(answer.status, 201, "{}", answer.text());
    assert_eq!(answer.json()["name"], Value::Null);
}

#[sqlx::test]
async fn an_import_needs_the_scope_to_write_and_belongs_to_its_project(pool: PgPool) {
    let mut app = TestApp::start(pool).await;
    let id = given_import(&app).await;
    let (dataset, _) = app.given_tokens().await;
    let (owner, path) = (app.key.clone(), format!("/v1/checkpoints/{id}"));

    app.key = app.insert_key("others", &["read"]).await;
    assert_eq!(import(&app, files()).await.problem(403).0, "missing_scope");
    for path in [path.clone(), format!("{path}/files"), format!("{path}/files/model.safetensors")] {
        assert_eq!(app.get(&path).await.problem(404).0, "not_found", "{path}");
    }
    assert_eq!(app.get("/v1/checkpoints").await.json()["data"], json!([]));
    assert_eq!(send(app.anonymous(Method::POST, "/v1/checkpoints").multipart(form(files()))).await.status, 401);

    // A dataset of the others' own, and a checkpoint that is not theirs.
    app.key = app.insert_key("others", &["read", "write"]).await;
    let own = app.given_dataset("text").await;
    let request = json!({"dataset": own, "tokenizer_checkpoint": id});
    assert_eq!(app.create_tokenization(&request).await.pointers(), ["/tokenizer_checkpoint"]);
    app.create_tokenization(&json!({"dataset": own})).await;
    let mut spec = spec(&own);
    spec["init_checkpoint"] = json!(id);
    spec["batch"]["sequence_length"] = json!(2);
    assert_eq!(app.create_job(&spec).await.pointers(), ["/init_checkpoint"]);

    app.key = owner;
    assert_eq!(app.get(&path).await.status, 200);
    spec["dataset"] = json!(dataset);
    spec["method"]["rank"] = json!(4);
    spec.as_object_mut().unwrap().remove("model");
    assert_eq!(app.create_job(&spec).await.status, 201);
}
