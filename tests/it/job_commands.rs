//! Pause, resume, retry, forced cancellation and forks over HTTP.

use reqwest::Method;
use serde_json::{Value, json};
use sqlx::PgPool;

use crate::app::{Answer, TestApp, send};

async fn give(app: &TestApp, id: &str, command: &str) -> Answer {
    send(app.request(Method::POST, &format!("/v1/jobs/{id}/{command}"))).await
}

async fn item(app: &TestApp) -> (String, String) {
    sqlx::query_as("select state, desired from work_items where kind = 'train'").fetch_one(&app.pool).await.unwrap()
}

fn state(answer: &Answer) -> Value {
    assert_eq!(answer.status, 202, "{answer:?}");
    answer.json()["state"].clone()
}

#[sqlx::test]
async fn a_queued_job_is_paused_and_resumed_at_once(pool: PgPool) {
    let app = TestApp::start(pool).await;
    let id = app.given_job().await;
    for _ in 0..2 {
        let paused = give(&app, &id, "pause").await;
        assert_eq!((state(&paused), &paused.json()["wait_reason"]), (json!("paused"), &json!("paused")));
    }
    assert_eq!(item(&app).await.0, "paused");
    for _ in 0..2 {
        assert_eq!(state(&give(&app, &id, "resume").await), "queued");
    }
    assert_eq!(item(&app).await.0, "queued");
    let events = app.list_job_events(&id, "").await.json();
    let types: Vec<_> = events["data"].as_array().unwrap().iter().map(|e| e["type"].as_str().unwrap()).collect();
    assert_eq!(types, ["submitted", "paused", "resumed"]);
}

#[sqlx::test]
async fn a_running_job_is_paused_through_its_worker(pool: PgPool) {
    let app = TestApp::start(pool).await;
    let id = app.given_job().await;
    app.set_job_state(&id, "running").await;
    assert_eq!(state(&give(&app, &id, "pause").await), "pausing");
    assert_eq!(item(&app).await, ("leased".into(), "pause".into()));
    let (code, detail) = give(&app, &id, "resume").await.problem(409);
    assert_eq!(code, "wrong_job_state");
    assert!(detail.contains("pausing"), "{detail}");
    // Whoever changes their mind may still cancel, and then insist.
    assert_eq!(state(&give(&app, &id, "cancel").await), "cancelling");
    assert_eq!(item(&app).await.1, "cancel");
    assert_eq!(state(&give(&app, &id, "cancel?force=true").await), "cancelling");
    assert_eq!(item(&app).await.1, "kill");
}

#[sqlx::test]
async fn a_failed_job_is_retried_with_fresh_budgets(pool: PgPool) {
    let app = TestApp::start(pool).await;
    let id = app.given_job().await;
    assert_eq!(give(&app, &id, "retry").await.problem(409).0, "wrong_job_state");
    app.set_job_state(&id, "failed").await;
    sqlx::query("update work_items set infra_failures = 9, user_failures = 9").execute(&app.pool).await.unwrap();
    let retried = give(&app, &id, "retry").await;
    assert_eq!(state(&retried), "queued");
    assert_eq!((&retried.json()["failure"], &retried.json()["finished_at"]), (&json!(null), &json!(null)));
    let budgets: (i64, i64) =
        sqlx::query_as("select infra_failures, user_failures from work_items where kind = 'train'")
            .fetch_one(&app.pool)
            .await
            .unwrap();
    assert_eq!(budgets, (0, 0));

    // Without tokens it would wait for ever.
    app.set_job_state(&id, "failed").await;
    sqlx::query("update tokenizations set state = 'failed'").execute(&app.pool).await.unwrap();
    assert_eq!(give(&app, &id, "retry").await.problem(409).0, "tokens_failed");
    sqlx::query("update tokenizations set state = 'ready'").execute(&app.pool).await.unwrap();

    // What it began with is gone, and nothing is stored that it could go on from.
    app.set_job_state(&id, "failed").await;
    sqlx::query(
        r#"with init as (
            insert into nodes (id, project_id, kind, step, restart, model, name, deleted_at)
            select 'node_gone', project_id, 'checkpoint', 0, 0, '{}', 'n', now() from jobs where id = $1
         )
         update jobs set init_node_id = 'node_gone' where id = $1"#,
    )
    .bind(&id)
    .execute(&app.pool)
    .await
    .unwrap();
    assert_eq!(give(&app, &id, "retry").await.problem(409).0, "nothing_to_go_on_from");
    assert_eq!(app.find_job(&id).await.json()["state"], "failed");
}

#[sqlx::test]
async fn commands_need_a_job_of_the_own_project_and_the_right_to_write(pool: PgPool) {
    let mut app = TestApp::start(pool).await;
    let id = app.given_job().await;
    let (stranger, reader) = (app.insert_key("other", &["read", "write"]).await, {
        let project = app.project().await;
        app.insert_key(&project, &["read"]).await
    });
    for command in ["pause", "resume", "retry", "cancel?force=true"] {
        app.key.clone_from(&stranger);
        assert_eq!(give(&app, &id, command).await.status, 404);
        app.key.clone_from(&reader);
        assert_eq!(give(&app, &id, command).await.status, 403);
    }
}

#[sqlx::test]
async fn a_fork_begins_with_the_checkpoint_and_the_changed_spec(pool: PgPool) {
    let app = TestApp::start(pool).await;
    let id = app.given_job().await;
    sqlx::query(
        "insert into nodes (id, project_id, job_id, kind, lease_epoch, step, restart)
         select 'node_a', project_id, id, 'checkpoint', 1, 20, 1 from jobs where id = $1",
    )
    .bind(&id)
    .execute(&app.pool)
    .await
    .unwrap();
    let fork = app.post("/v1/checkpoints/node_a/fork", &json!({"seed": 5, "name": "second"})).await;
    assert_eq!(fork.status, 201, "{fork:?}");
    let spec = fork.json()["spec"].clone();
    assert_eq!(
        (&spec["init_checkpoint"], &spec["seed"], &spec["name"]),
        (&json!("node_a"), &json!(5), &json!("second"))
    );
    assert_eq!((&spec["method"]["warm_start_steps"], &spec["batch"]["skip_seqs"]), (&json!(0), &json!(80)));
    assert_eq!(spec["model"], app.find_job(&id).await.json()["spec"]["model"]);

    let refused = app.post("/v1/checkpoints/node_a/fork", &json!({"method": {"rank": -1}, "sed": 1})).await;
    assert_eq!(refused.problem(422).0, "invalid_spec");
    assert_eq!(refused.pointers(), ["/method/rank", "/sed"]);
    assert_eq!(app.post("/v1/checkpoints/node_b/fork", &json!({})).await.status, 404);
}
