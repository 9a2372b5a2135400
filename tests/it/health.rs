use reqwest::Method;
use sqlx::PgPool;

use crate::app::{TestApp, send};

#[sqlx::test]
async fn the_probes_need_no_key(pool: PgPool) {
    let app = TestApp::start(pool).await;
    let health = send(app.anonymous(Method::GET, "/healthz")).await;
    assert_eq!(health.json()["status"], "ok");

    let readiness = send(app.anonymous(Method::GET, "/readyz")).await;
    assert_eq!(readiness.status, 200);
    assert_eq!(readiness.json(), serde_json::json!({"ready": true, "database": "ok", "store": "ok"}));
}

#[sqlx::test]
async fn a_service_without_its_database_lives_but_is_not_ready(pool: PgPool) {
    let app = TestApp::start(pool).await;
    app.pool.close().await;
    let readiness = send(app.anonymous(Method::GET, "/readyz")).await;
    assert_eq!(readiness.status, 503);
    assert_eq!(readiness.json()["ready"], false);
    assert_eq!(readiness.json()["database"], "does not answer");
    assert_eq!(readiness.json()["store"], "ok");
    assert_eq!(send(app.anonymous(Method::GET, "/healthz")).await.status, 200);

    let answer = app.get("/v1/jobs").await;
    let (code, detail) = answer.problem(503);
    assert_eq!(code, "unavailable");
    assert!(!detail.contains("pool"), "says nothing of the inside: {detail}");
}
