use std::{borrow::Cow, collections::BTreeMap};

use futures_util::stream;
use relora::domain::{checkpoint, spec::ModelSpec};
use reqwest::{
    Body, Method,
    multipart::{Form, Part},
};
use safetensors::{Dtype, View};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use sqlx::PgPool;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
};

use crate::app::{Answer, MAX_UPLOAD_BYTES, TestApp, send, spec};

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
async fn names_that_are_not_taken_are_refused_all_at_once(pool: PgPool) {
    let app = TestApp::start(pool).await;
    let mut form = form(files()).text("name", "").text("colour", "red");
    for name in ["README.md", "tokenizer.model", "weights/model.safetensors", "../config.json", "config.json"] {
        form = form.part("file", Part::bytes(b"x".to_vec()).file_name(name));
    }
    let answer = import_form(&app, form).await;
    let pointers = [
        "/README.md",
        "/..~1config.json",
        "/colour",
        "/config.json",
        "/name",
        "/tokenizer.model",
        "/weights~1model.safetensors",
    ];
    assert_refused(&app, &answer, &pointers);
    assert!(answer.text().contains("model.safetensors.index.json"), "says what is taken: {}", answer.text());
    assert_eq!(num_nodes(&app).await, 0);
}

#[sqlx::test]
async fn a_checkpoint_that_lacks_files_says_which(pool: PgPool) {
    let app = TestApp::start(pool).await;
    let empty = import_form(&app, Form::new().text("name", "mine")).await;
    assert_refused(&app, &empty, &["/config.json", "/model.safetensors"]);
    let mut files = sharded();
    files.remove("model-00001-of-00002.safetensors");
    files.remove("config.json");
    assert_refused(&app, &import(&app, files).await, &["/config.json", "/model-00001-of-00002.safetensors"]);
    let mut files = sharded();
    files.remove("model.safetensors.index.json");
    assert_refused(&app, &import(&app, files).await, &["/model.safetensors.index.json"]);
}

#[sqlx::test]
async fn a_configuration_that_is_computed_in_another_way_is_refused(pool: PgPool) {
    let app = TestApp::start(pool).await;
    let with = |changes: Value| {
        let mut changed = config();
        changed.as_object_mut().unwrap().extend(changes.as_object().unwrap().clone());
        let mut files = files();
        files.insert("config.json".into(), changed.to_string().into_bytes());
        files
    };
    let several =
        with(json!({"model_type": "qwen2", "attention_bias": true, "rope_parameters": {"rope_type": "yarn"}}));
    assert_refused(
        &app,
        &import(&app, several).await,
        &["/config.json/attention_bias", "/config.json/model_type", "/config.json/rope_parameters"],
    );
    let mut broken = files();
    broken.insert("config.json".into(), b"{".to_vec());
    broken.insert("tokenizer_config.json".into(), b"[]".to_vec());
    assert_refused(&app, &import(&app, broken).await, &["/config.json", "/tokenizer_config.json"]);
}

#[sqlx::test]
async fn tensors_that_do_not_fit_the_configuration_are_named(pool: PgPool) {
    let app = TestApp::start(pool).await;
    let with = |tensors: &BTreeMap<String, Zeros>| {
        let mut files = files();
        files.insert("model.safetensors".into(), safetensors(tensors));
        files
    };
    let mut wrong = tensors();
    wrong.remove("lm_head.weight");
    wrong.insert("model.norm.bias".into(), Zeros { dtype: Dtype::F32, shape: vec![16] });
    wrong.get_mut("model.norm.weight").unwrap().shape = vec![17];
    wrong.get_mut("model.embed_tokens.weight").unwrap().dtype = Dtype::F64;
    let answer = import(&app, with(&wrong)).await;
    let pointers = ["lm_head.weight", "model.embed_tokens.weight", "model.norm.bias", "model.norm.weight"]
        .map(|tensor| format!("/model.safetensors/{tensor}"));
    assert_refused(&app, &answer, &pointers.each_ref().map(String::as_str));

    let mut moved = sharded();
    let index = String::from_utf8(moved["model.safetensors.index.json"].clone()).unwrap();
    let index = index.replace(r#""lm_head.weight":"model-00001"#, r#""lm_head.weight":"model-00002"#);
    moved.insert("model.safetensors.index.json".into(), index.into_bytes());
    let pointer = "/model.safetensors.index.json/weight_map/lm_head.weight";
    assert_refused(&app, &import(&app, moved).await, &[pointer, pointer]);
}

#[sqlx::test]
async fn a_damaged_weight_file_is_named(pool: PgPool) {
    let app = TestApp::start(pool).await;
    let whole = files()["model.safetensors"].clone();
    let mut long_header = whole.clone();
    long_header[..8].copy_from_slice(&(whole.len() as u64).to_le_bytes());
    for (content, says) in [
        (whole[..whole.len() - 1].to_vec(), "is cut short"),
        (whole[..100].to_vec(), "is cut short"),
        (whole[..4].to_vec(), "is cut short"),
        (Vec::new(), "is cut short"),
        (long_header, "is cut short"),
        ([&whole[..], b"x"].concat(), "1 bytes after its last tensor"),
        (vec![0xff; 64], "is damaged"),
        ([&10_u64.to_le_bytes()[..], b"not a json"].concat(), "cannot be used"),
    ] {
        let mut files = files();
        files.insert("model.safetensors".into(), content);
        let answer = import(&app, files).await;
        assert_refused(&app, &answer, &["/model.safetensors"]);
        assert!(answer.text().contains(says), "{says}: {}", answer.text());
    }
}

#[sqlx::test]
async fn a_tokenizer_that_cannot_be_used_is_refused(pool: PgPool) {
    let app = TestApp::start(pool).await;
    let with = |tokenizer: String| {
        let mut files = files();
        files.insert("tokenizer.json".into(), tokenizer.into_bytes());
        files
    };
    let answer = import(&app, with(tokenizer(301).to_string())).await;
    assert_refused(&app, &answer, &["/tokenizer.json"]);
    assert!(answer.text().contains("up to the id 300; the vocab_size in config.json is 300"), "{}", answer.text());
    assert_refused(&app, &import(&app, with("{}".into())).await, &["/tokenizer.json"]);
    assert_eq!(import(&app, with(tokenizer(300).to_string())).await.status, 201);
}

#[sqlx::test]
async fn what_is_too_large_is_refused(pool: PgPool) {
    let app = TestApp::start(pool).await;
    let large = |size_bytes: u64| {
        let chunks = (0..size_bytes / 65_536 + 1).map(|_| Ok::<_, std::io::Error>(vec![b' '; 65_536]));
        Part::stream(Body::wrap_stream(stream::iter(chunks)))
    };
    let form = |name: &'static str, size_bytes| Form::new().part("file", large(size_bytes).file_name(name));
    let answer = import_form(&app, form("model.safetensors", MAX_UPLOAD_BYTES)).await;
    assert_eq!(answer.problem(413).0, "too_large");
    assert_eq!(app.stored_objects(), [""; 0]);
    let answer = import_form(&app, form("config.json", 2 << 20)).await;
    assert_refused(&app, &answer, &["/config.json"]);
    assert!(answer.text().contains("1048576 bytes"), "{}", answer.text());
}

#[sqlx::test]
async fn a_body_that_is_no_form_is_refused(pool: PgPool) {
    let app = TestApp::start(pool).await;
    let post = |content_type: &'static str, body: Vec<u8>| {
        send(app.request(Method::POST, "/v1/checkpoints").header("content-type", content_type).body(body))
    };
    for content_type in ["application/json", "multipart/form-data", "text/plain"] {
        assert_eq!(post(content_type, b"{}".to_vec()).await.problem(415).0, "unsupported_media_type");
    }
    let form = "multipart/form-data; boundary=x";
    for body in
        ["", "--y\r\n\r\n", "--x\r\nContent-Disposition: form-data; name=\"file\"; filename=\"config.json\"\r\n\r\n{"]
    {
        assert_eq!(post(form, body.into()).await.problem(400).0, "malformed_multipart", "{body:?}");
    }
    let header = [b"--x\r\nX-Long: ".to_vec(), vec![b'a'; 4 << 20]].concat();
    let (code, detail) = post(form, header).await.problem(400);
    assert_eq!(code, "malformed_multipart");
    assert!(detail.contains("header of a part is too long"), "{detail}");
    assert_eq!(app.stored_objects(), [""; 0]);
}

#[sqlx::test]
async fn an_import_that_breaks_off_leaves_nothing(pool: PgPool) {
    let app = TestApp::start(pool).await;
    let mut connection = TcpStream::connect(app.address).await.unwrap();
    let head = format!(
        "POST /v1/checkpoints HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {}\r\n\
         content-type: multipart/form-data; boundary=x\r\ncontent-length: 1000\r\n\r\n\
         --x\r\nContent-Disposition: form-data; name=\"file\"; filename=\"config.json\"\r\n\r\n{{}}\r\n\
         --x\r\nContent-Disposition: form-data; name=\"file\"; filename=\"model.safetensors\"\r\n\r\nabc",
        app.key
    );
    connection.write_all(head.as_bytes()).await.unwrap();
    while app.stored_objects().is_empty() {
        tokio::time::sleep(std::time::Duration::from_millis(10)).await;
    }
    drop(connection);
    while !app.stored_objects().is_empty() {
        tokio::time::sleep(std::time::Duration::from_millis(10)).await;
    }
    assert_eq!(num_nodes(&app).await, 0);
}

#[sqlx::test]
async fn a_server_that_stops_or_has_no_space_takes_nothing(pool: PgPool) {
    let full = TestApp::start_without_space(pool).await;
    assert_eq!(import(&full, files()).await.problem(503).0, "unavailable");
    assert_eq!((num_nodes(&full).await, full.stored_objects().len()), (0, 0));

    let app = TestApp::start(full.pool.clone()).await;
    let mut connection = TcpStream::connect(app.address).await.unwrap();
    let head = format!(
        "POST /v1/checkpoints HTTP/1.1\r\nhost: x\r\nconnection: close\r\nauthorization: Bearer {}\r\n\
         content-type: multipart/form-data; boundary=x\r\ncontent-length: 200\r\n\r\n\
         --x\r\nContent-Disposition: form-data; name=\"file\"; filename=\"config.json\"\r\n\r\n{{}}\r\n--x\r\n",
        full.key
    );
    connection.write_all(head.as_bytes()).await.unwrap();
    while app.stored_objects().is_empty() {
        tokio::time::sleep(std::time::Duration::from_millis(10)).await;
    }
    app.shutdown.trigger();
    let mut answer = String::new();
    connection.read_to_string(&mut answer).await.unwrap();
    assert!(answer.starts_with("HTTP/1.1 503") && answer.contains("stopping"), "{answer}");
    assert_eq!((num_nodes(&app).await, app.stored_objects().len()), (0, 0));
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

/// A spec that begins with a checkpoint and leaves the model to it.
fn spec_from(dataset: &str, checkpoint: &str) -> Value {
    let mut spec = spec(dataset);
    spec["init_checkpoint"] = json!(checkpoint);
    spec["method"]["rank"] = json!(4);
    spec.as_object_mut().unwrap().remove("model");
    spec
}

#[sqlx::test]
async fn a_job_takes_its_model_from_the_checkpoint_that_it_begins_with(pool: PgPool) {
    let app = TestApp::start(pool).await;
    let id = given_import(&app).await;
    let (dataset, _) = app.given_tokens().await;
    let answer = app.create_job(&spec_from(&dataset, &id)).await;
    assert_eq!(answer.status, 201, "{}", answer.text());
    let job = answer.json();
    assert_eq!(job["spec"]["init_checkpoint"], json!(id));
    assert_eq!(
        (&job["spec"]["model"]["hidden_size"], &job["spec"]["model"]["rms_norm_eps"]),
        (&json!(16), &json!(1e-5))
    );
    assert!(job["warnings"].to_string().contains("another tokenizer"), "{job}");
    let parent: String = sqlx::query_scalar("select init_node_id from jobs").fetch_one(&app.pool).await.unwrap();
    assert_eq!(parent, id);
    assert_eq!(app.create_job(&job["spec"]).await.status, 201, "a normalised spec can be sent again");

    let mut spec = spec_from(&dataset, &id);
    spec["model"] = json!({"hidden_size": 32, "num_key_value_heads": 2, "preset": "llama-60m"});
    assert_eq!(app.create_job(&spec).await.pointers(), ["/model/hidden_size", "/model/preset"]);
    for unknown in [json!("node_x"), json!(7)] {
        let mut spec = spec_from(&dataset, &id);
        spec["init_checkpoint"] = unknown;
        assert_eq!(app.create_job(&spec).await.pointers(), ["/init_checkpoint"]);
    }
    let mut spec = spec_from(&dataset, &id);
    spec.as_object_mut().unwrap().remove("init_checkpoint");
    assert_eq!(app.create_job(&spec).await.pointers(), ["/model"]);
}

#[sqlx::test]
async fn tokens_beyond_the_checkpoints_vocabulary_are_refused(pool: PgPool) {
    let app = TestApp::start(pool).await;
    let id = given_import(&app).await;
    let (dataset, tokenization) = app.given_tokens().await;
    sqlx::query("update tokenizations set vocab_size = 301").execute(&app.pool).await.unwrap();
    let answer = app.create_job(&spec_from(&dataset, &id)).await;
    assert_eq!(answer.pointers(), ["/tokenization"]);
    assert!(answer.text().contains(&tokenization) && answer.text().contains("301"), "{}", answer.text());
}

#[sqlx::test]
async fn a_job_begins_with_the_weights_of_another_job_and_descends_from_them(pool: PgPool) {
    let app = TestApp::start(pool).await;
    let first = app.given_job().await;
    let dataset = app.find_job(&first).await.json()["spec"]["dataset"].as_str().unwrap().to_owned();
    for (id, kind, is_superseded) in
        [("node_base", "base", false), ("node_old", "checkpoint", true), ("node_restart", "restart", false)]
    {
        sqlx::query(
            "insert into nodes (id, project_id, job_id, kind, lease_epoch, step, restart, superseded)
             select $1, project_id, id, $2, 1, 10, 0, $3 from jobs",
        )
        .bind(id)
        .bind(kind)
        .bind(is_superseded)
        .execute(&app.pool)
        .await
        .unwrap();
    }
    let answer = app.create_job(&spec_from(&dataset, "node_base")).await;
    assert_eq!(answer.status, 201, "{}", answer.text());
    assert_eq!(answer.json()["spec"]["model"]["hidden_size"], 128, "the sizes of llama-9m");
    assert!(answer.json()["warnings"].to_string().contains("has no tokenizer"), "{}", answer.text());
    for other in ["node_old", "node_restart"] {
        assert_eq!(app.create_job(&spec_from(&dataset, other)).await.pointers(), ["/init_checkpoint"], "{other}");
    }
}

#[sqlx::test]
async fn text_is_tokenized_with_the_tokenizer_of_a_checkpoint(pool: PgPool) {
    let app = TestApp::start(pool).await;
    let id = given_import(&app).await;
    let dataset = app.given_dataset("some text").await;
    let answer = app.create_tokenization(&json!({"dataset": dataset, "tokenizer_checkpoint": id})).await;
    assert_eq!(answer.status, 201, "{}", answer.text());
    assert_eq!((&answer.json()["tokenizer_checkpoint"], &answer.json()["vocab_size"]), (&json!(id), &json!(300)));
    let mut spec = spec_from(&dataset, &id);
    spec["batch"]["sequence_length"] = json!(2);
    let job = app.create_job(&spec).await.json();
    assert!(!job["warnings"].to_string().contains("tokenizer"), "{job}");

    let request = json!({"dataset": dataset, "tokenizer_checkpoint": id, "vocab_size": 300});
    assert_eq!(app.create_tokenization(&request).await.pointers(), ["/vocab_size"]);
    let mut silent = files();
    silent.remove("tokenizer_config.json");
    let mut config = config();
    config.as_object_mut().unwrap().remove("eos_token_id");
    silent.insert("config.json".into(), config.to_string().into_bytes());
    let silent_id = import(&app, silent.clone()).await.id();
    silent.remove("tokenizer.json");
    let bare_id = import(&app, silent).await.id();
    for (id, says) in
        [(silent_id.as_str(), "ends a text"), (&bare_id, "no tokenizer.json"), ("node_x", "no checkpoint")]
    {
        let answer = app.create_tokenization(&json!({"dataset": dataset, "tokenizer_checkpoint": id})).await;
        assert_eq!(answer.pointers(), ["/tokenizer_checkpoint"]);
        assert!(answer.text().contains(says), "{}", answer.text());
    }
}
