//! Jobs that begin with a checkpoint, and tokens of its tokenizer.

use serde_json::{Value, json};
use sqlx::PgPool;

use super::{config, files, given_import, import};
use crate::app::{TestApp, spec};

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

#[sqlx::test]
async fn an_import_is_deleted_once_no_work_needs_it_and_nothing_begins_with_it_then(pool: PgPool) {
    let app = TestApp::start(pool).await;
    let id = given_import(&app).await;
    let path = format!("/v1/checkpoints/{id}");
    let dataset = app.given_dataset("some text").await;
    let request = json!({"dataset": dataset, "tokenizer_checkpoint": id});
    let tokenization = app.create_tokenization(&request).await.id();
    let mut spec = spec_from(&dataset, &id);
    spec["batch"]["sequence_length"] = json!(2);
    let job = app.create_job(&spec).await.id();

    let (_, detail) = app.delete(&path).await.problem(409);
    assert!(detail.contains(&tokenization) && detail.contains(&job), "{detail}");
    let unnamed = app.post("/v1/checkpoints/delete", &json!({"older_than_s": 0})).await.json();
    assert_eq!((&unnamed["num_deleted"], &unnamed["refused"]), (&json!(0), &json!([])), "imports go by name alone");
    assert_eq!(app.cancel_job(&job).await.status, 202);
    sqlx::query("update tokenizations set state = 'ready', train_tokens = 90, valid_tokens = 9")
        .execute(&app.pool)
        .await
        .unwrap();

    assert_eq!(app.delete(&path).await.status, 204);
    assert_eq!(app.create_job(&spec).await.pointers(), ["/init_checkpoint"]);
    assert_eq!(app.create_tokenization(&request).await.pointers(), ["/tokenizer_checkpoint"]);
    relora::worker::collect::delete_queued(&app.pool, &app.store).await.unwrap();
    assert!(!app.stored_objects().iter().any(|path| path.contains("/i/")), "{:?}", app.stored_objects());
}
