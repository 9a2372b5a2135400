use reqwest::Method;
use serde_json::json;
use sqlx::PgPool;

use crate::app::{TestApp, send};

#[sqlx::test]
async fn every_refusal_is_problem_json(pool: PgPool) {
    let app = TestApp::start(pool).await;
    let post = |body: &'static str, content_type: &'static str| {
        send(app.request(Method::POST, "/v1/datasets").header("content-type", content_type).body(body))
    };

    assert_eq!(app.get("/v1/nowhere").await.problem(404).0, "not_found");
    assert_eq!(app.get("/").await.problem(404).0, "not_found");
    let not_allowed = send(app.request(Method::PATCH, "/v1/datasets")).await;
    assert_eq!(not_allowed.problem(405).0, "method_not_allowed");
    assert!(not_allowed.header("allow").contains("POST"), "{not_allowed:?}");
    assert_eq!(post("{}", "text/plain").await.problem(415).0, "unsupported_media_type");
    assert_eq!(post("{\"name\":", "application/json").await.problem(400).0, "malformed_json");
    assert_eq!(post("\u{0}", "application/json").await.problem(400).0, "malformed_json");
    let large = json!({"name": "x".repeat(3 << 20)});
    assert_eq!(app.create_dataset(&large).await.problem(413).0, "too_large");
}

#[sqlx::test]
async fn a_malformed_identifier_names_nothing(pool: PgPool) {
    let app = TestApp::start(pool).await;
    for id in ["x", "%00", "ds_%00", "%ff%fe", "ds_0", "'%20or%201=1", "%2e%2e"] {
        for collection in ["datasets", "tokenizations", "jobs", "bases", "restarts", "checkpoints"] {
            assert_eq!(app.get(&format!("/v1/{collection}/{id}")).await.status, 404, "{collection} {id}");
        }
    }
}

#[sqlx::test]
async fn a_query_that_is_not_understood_is_refused(pool: PgPool) {
    let app = TestApp::start(pool).await;
    for query in [
        "limit=0",
        "limit=501",
        "limit=x",
        "limit=1&limit=2",
        "cursor=garbage",
        "cursor=ds_%00",
        "cursor=",
        "colour=red",
        "state=sleeping",
    ] {
        let answer = app.get(&format!("/v1/jobs?{query}")).await;
        let (code, detail) = answer.problem(400);
        assert_eq!(code, "invalid_query", "{query}");
        assert!(!detail.is_empty());
    }
    assert_eq!(app.get("/v1/tokenizations?dataset=%00").await.status, 400);
}

#[sqlx::test]
async fn every_mistake_in_a_body_is_named(pool: PgPool) {
    let app = TestApp::start(pool).await;
    let name = |body| {
        let app = &app;
        async move { app.create_dataset(&body).await }
    };
    for body in [json!({}), json!({"name": null}), json!({"name": ""}), json!({"name": 1}), json!({"name": "a\0b"})] {
        let answer = name(body.clone()).await;
        assert_eq!(answer.problem(422).0, "invalid_body", "{body}");
        assert_eq!(answer.pointers(), ["/name"], "{body}");
    }
    assert_eq!(name(json!({"name": "x".repeat(201)})).await.pointers(), ["/name"]);
    assert_eq!(name(json!({"name": 1, "colour": "red", "a/b": 2})).await.pointers(), ["/a~1b", "/colour", "/name"]);
    assert_eq!(name(json!(["text"])).await.pointers(), [""]);
    assert_eq!(name(json!({"name": "é".repeat(200)})).await.status, 201);
}

#[sqlx::test]
async fn a_request_keeps_the_number_that_it_came_with(pool: PgPool) {
    let app = TestApp::start(pool).await;
    let answer = send(app.request(Method::GET, "/v1/jobs/job_x").header("x-request-id", "mine")).await;
    answer.problem(404);
    assert_eq!(answer.json()["request_id"], "mine");
}
