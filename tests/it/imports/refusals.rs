//! What is not taken, each by name and all at once.

use std::{
    collections::BTreeMap,
    time::{Duration, Instant},
};

use reqwest::multipart::{Form, Part};
use safetensors::Dtype;
use serde_json::{Value, json};
use sqlx::PgPool;

use super::{
    Zeros, assert_refused, config, files, form, import, import_form, num_nodes, safetensors, sharded, tensors,
    tokenizer,
};
use crate::app::TestApp;

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
    let small_files_alone = ["/config.json", "/model.safetensors", "/tokenizer_config.json"];
    broken.remove("model.safetensors");
    assert_refused(&app, &import(&app, broken).await, &small_files_alone);
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
async fn a_hostile_index_costs_little(pool: PgPool) {
    let app = TestApp::start(pool).await;
    let map: BTreeMap<_, _> = (0..100_000).map(|number| (number.to_string(), number)).collect();
    let mut files = sharded();
    files.insert("model.safetensors.index.json".into(), json!({"weight_map": map}).to_string().into_bytes());
    let started = Instant::now();
    let answer = import(&app, files).await;
    assert!(started.elapsed() < Duration::from_secs(1), "{:?}", started.elapsed());
    assert_refused(&app, &answer, &["/model.safetensors.index.json/weight_map"]);
}

#[sqlx::test]
async fn what_a_refusal_quotes_is_cut(pool: PgPool) {
    let app = TestApp::start(pool).await;
    let mut wrong = tensors();
    wrong.insert("x".repeat(100_000), Zeros { dtype: Dtype::F32, shape: vec![1] });
    wrong.get_mut("model.norm.weight").unwrap().shape = vec![1; 10_000];
    let mut files = files();
    files.insert("model.safetensors".into(), safetensors(&wrong));
    let form = form(files).part("file", Part::bytes(b"x".to_vec()).file_name("y".repeat(1_000)));
    let named = import_form(&app, form).await;
    assert_eq!(named.pointers(), [format!("/{}…", "y".repeat(499))]);

    let mut files = self::files();
    files.insert("model.safetensors".into(), safetensors(&wrong));
    let answer = import(&app, files).await;
    assert_eq!(answer.pointers().len(), 2, "{}", answer.text());
    assert!(answer.text().contains("9992 more") && answer.bytes.len() < 3_000, "{}", answer.text());
    assert_eq!(app.stored_objects(), [""; 0]);
}

#[sqlx::test]
async fn files_beyond_the_largest_number_are_refused_by_name(pool: PgPool) {
    let app = TestApp::start(pool).await;
    let shards = (1..=257).map(|index| (format!("model-{index:05}-of-00257.safetensors"), Vec::new()));
    let answer = import(&app, shards.collect()).await;
    assert_refused(&app, &answer, &["/model-00257-of-00257.safetensors"]);
}
