use relora::db::keys;
use reqwest::Method;
use serde_json::json;
use sqlx::PgPool;

use crate::app::{TestApp, send, spec};

const PATHS: [&str; 9] = [
    "/v1/datasets",
    "/v1/datasets/ds_x/content",
    "/v1/tokenizations",
    "/v1/jobs",
    "/v1/jobs/job_x/events/stream",
    "/v1/bases",
    "/v1/restarts",
    "/v1/checkpoints",
    "/v1/checkpoints/node_x/files/model.safetensors",
];

#[sqlx::test]
async fn nothing_is_shown_without_a_key(pool: PgPool) {
    let app = TestApp::start(pool).await;
    for path in PATHS {
        let answer = send(app.anonymous(Method::GET, path)).await;
        assert_eq!(answer.problem(401).0, "unauthenticated", "{path}");
        assert!(answer.header("www-authenticate").starts_with("Bearer"));
    }
}

#[sqlx::test]
async fn a_key_that_is_unknown_revoked_or_of_another_scheme_opens_nothing(pool: PgPool) {
    let app = TestApp::start(pool).await;
    let unknown = app.anonymous(Method::GET, "/v1/jobs").bearer_auth("rl_unknown");
    assert_eq!(send(unknown).await.status, 401);
    let basic = app.anonymous(Method::GET, "/v1/jobs").header("authorization", format!("Basic {}", app.key));
    assert_eq!(send(basic).await.status, 401);

    assert_eq!(app.get("/v1/jobs").await.status, 200);
    sqlx::query("update api_keys set revoked_at = now()").execute(&app.pool).await.unwrap();
    assert_eq!(app.get("/v1/jobs").await.status, 401);
}

#[sqlx::test]
async fn a_key_that_may_only_read_changes_nothing(pool: PgPool) {
    let mut app = TestApp::start(pool).await;
    app.key = app.insert_key("readers", &["read"]).await;
    assert_eq!(app.get("/v1/datasets").await.status, 200);
    let answer = app.create_dataset(&json!({"name": "text"})).await;
    let (code, detail) = answer.problem(403);
    assert_eq!(code, "missing_scope");
    assert!(detail.contains("write"));

    app.key = app.insert_key("readers", &["write"]).await;
    assert_eq!(app.create_dataset(&json!({"name": "text"})).await.status, 201);
    assert_eq!(app.get("/v1/datasets").await.problem(403).0, "missing_scope");
}

#[sqlx::test]
async fn objects_of_another_project_do_not_exist(pool: PgPool) {
    let mut app = TestApp::start(pool).await;
    let (dataset, tokenization) = app.given_tokens().await;
    let job = app.create_job(&spec(&dataset)).await.id();

    app.key = app.insert_key("others", &["read", "write"]).await;
    for path in [
        format!("/v1/datasets/{dataset}"),
        format!("/v1/datasets/{dataset}/content"),
        format!("/v1/tokenizations/{tokenization}"),
        format!("/v1/jobs/{job}"),
        format!("/v1/jobs/{job}/events"),
        format!("/v1/jobs/{job}/events/stream"),
        format!("/v1/jobs/{job}/metrics"),
        format!("/v1/jobs/{job}/logs"),
    ] {
        assert_eq!(app.get(&path).await.problem(404).0, "not_found", "{path}");
    }
    for path in [format!("/v1/datasets/{dataset}"), format!("/v1/tokenizations/{tokenization}")] {
        assert_eq!(app.delete(&path).await.status, 404, "{path}");
    }
    assert_eq!(app.cancel_job(&job).await.status, 404);
    assert_eq!(app.upload_dataset_content(&dataset, "text/plain", "x").await.status, 404);
    assert_eq!(app.create_job(&spec(&dataset)).await.pointers(), ["/dataset"]);
    assert_eq!(app.create_tokenization(&json!({"dataset": dataset})).await.pointers(), ["/dataset"]);
    for list in ["/v1/datasets", "/v1/tokenizations", "/v1/jobs"] {
        assert_eq!(app.get(list).await.json(), json!({"data": [], "next_cursor": null}), "{list}");
    }
}

#[sqlx::test]
async fn of_servers_that_start_together_one_makes_the_first_key(pool: PgPool) {
    let starts = (0..5).map(|_| keys::ensure_first_key(&pool));
    let made: Vec<_> = futures_util::future::join_all(starts).await.into_iter().filter_map(Result::unwrap).collect();
    assert_eq!(made.len(), 1);
    assert!(made[0].starts_with("rl_") && made[0].len() == 67, "{}", made[0]);
    assert!(keys::find_grant(&pool, &made[0]).await.unwrap().is_some_and(|grant| grant.scopes.len() == 2));
}
