use serde_json::json;
use sqlx::PgPool;

use crate::app::{TestApp, spec};

#[sqlx::test]
async fn a_tokenization_is_queued_with_its_defaults(pool: PgPool) {
    let app = TestApp::start(pool).await;
    let dataset = app.given_dataset("some text").await;
    let answer = app.create_tokenization(&json!({"dataset": dataset})).await;
    assert_eq!(answer.status, 201, "{answer:?}");
    let tokenization = answer.json();
    assert_eq!(tokenization["state"], "queued");
    assert_eq!(tokenization["dataset"], dataset);
    assert_eq!(tokenization["vocab_size"], 8192);
    assert_eq!(tokenization["validation_frac"], 0.05);
    assert_eq!(tokenization["files"], json!([]));
    let items: Vec<(String, String)> =
        sqlx::query_as("select kind, state from work_items").fetch_all(&app.pool).await.unwrap();
    assert_eq!(items, [("ingest".to_owned(), "queued".to_owned())]);
    assert_eq!(app.get(&format!("/v1/tokenizations/{}", answer.id())).await.json(), tokenization);
}

#[sqlx::test]
async fn every_mistake_is_named_and_nothing_is_queued(pool: PgPool) {
    let app = TestApp::start(pool).await;
    let answer = app.create_tokenization(&json!({"vocab_size": 259, "validation_frac": 0.0, "colour": 1})).await;
    assert_eq!(answer.problem(422).0, "invalid_body");
    assert_eq!(answer.pointers(), ["/colour", "/dataset", "/validation_frac", "/vocab_size"]);
    let answer =
        app.create_tokenization(&json!({"dataset": "ds_x", "vocab_size": 65537, "validation_frac": 0.51})).await;
    assert_eq!(answer.pointers(), ["/validation_frac", "/vocab_size"]);
    assert_eq!(app.create_tokenization(&json!({"dataset": "ds_x"})).await.pointers(), ["/dataset"]);

    let empty = app.given_empty_dataset().await;
    let (code, detail) = app.create_tokenization(&json!({"dataset": empty})).await.problem(409);
    assert_eq!(code, "dataset_not_ready");
    assert!(detail.contains("empty"), "{detail}");
    let queued: i64 = sqlx::query_scalar("select count(*) from work_items").fetch_one(&app.pool).await.unwrap();
    assert_eq!(queued, 0);
}

#[sqlx::test]
async fn a_list_can_be_of_one_dataset(pool: PgPool) {
    let app = TestApp::start(pool).await;
    let (one, other) = (app.given_dataset("a").await, app.given_dataset("b").await);
    let first = app.create_tokenization(&json!({"dataset": one})).await.id();
    app.create_tokenization(&json!({"dataset": other})).await;
    let second = app.create_tokenization(&json!({"dataset": one, "vocab_size": 300})).await.id();
    let page = app.get(&format!("/v1/tokenizations?dataset={one}")).await.json();
    let ids: Vec<_> = page["data"].as_array().unwrap().iter().map(|t| t["id"].as_str().unwrap()).collect();
    assert_eq!(ids, [second, first]);
    assert_eq!(app.get("/v1/tokenizations").await.json()["data"].as_array().unwrap().len(), 3);
}

#[sqlx::test]
async fn files_of_a_ready_tokenization_are_listed(pool: PgPool) {
    let app = TestApp::start(pool).await;
    let (_, id) = app.given_tokens().await;
    sqlx::query("insert into tokenization_files values ($1, 'tokenizer.json', 'k', 12, 'abc')")
        .bind(&id)
        .execute(&app.pool)
        .await
        .unwrap();
    let tokenization = app.get(&format!("/v1/tokenizations/{id}")).await.json();
    assert_eq!(tokenization["train_tokens"], 1000);
    assert_eq!(tokenization["files"], json!([{"name": "tokenizer.json", "size_bytes": 12, "sha256": "abc"}]));
}

#[sqlx::test]
async fn a_tokenization_is_deleted_unless_a_job_or_a_worker_needs_it(pool: PgPool) {
    let app = TestApp::start(pool).await;
    let (dataset, used) = app.given_tokens().await;
    let job = app.create_job(&spec(&dataset)).await.id();
    let (code, detail) = app.delete(&format!("/v1/tokenizations/{used}")).await.problem(409);
    assert_eq!(code, "in_use");
    assert!(detail.contains(&job), "{detail}");

    let id = app.create_tokenization(&json!({"dataset": dataset})).await.id();
    let path = format!("/v1/tokenizations/{id}");
    sqlx::query("update work_items set state = 'leased' where state = 'queued' and kind = 'ingest'")
        .execute(&app.pool)
        .await
        .unwrap();
    assert_eq!(app.delete(&path).await.problem(409).0, "busy");
    sqlx::query("update work_items set state = 'queued' where state = 'leased'").execute(&app.pool).await.unwrap();
    assert_eq!(app.delete(&path).await.status, 204);
    assert_eq!(app.get(&path).await.status, 404);
    let left: i64 =
        sqlx::query_scalar("select count(*) from work_items where kind = 'ingest'").fetch_one(&app.pool).await.unwrap();
    assert_eq!(left, 1, "the work is gone with it");
}
