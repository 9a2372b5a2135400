//! What is deleted and what is not: by request, by the policies of jobs, and by the collector.

mod bulk;
mod collector;
mod lineage;
mod policies;

use std::time::Duration;

use relora::{
    db::imports,
    domain::ids::{NodeId, ProjectId},
    storage::Key,
    worker::collect,
};
use reqwest::Method;
use serde_json::{Value, json};
use sqlx::PgPool;

use crate::{
    app::{TestApp, send},
    lineage::insert_node,
};

/// Of a node that [`insert_node`] has made.
const NODE_BYTES: i64 = 12;

async fn execute(app: &TestApp, statement: &'static str, id: &str) {
    let result = sqlx::query(statement).bind(id).execute(&app.pool).await.unwrap();
    assert!(result.rows_affected() > 0, "{statement} {id}");
}

async fn pin(app: &TestApp, id: &str) -> Value {
    let answer = send(app.request(Method::PUT, &format!("/v1/checkpoints/{id}/pin"))).await;
    assert_eq!(answer.status, 200, "{}", answer.text());
    answer.json()
}

/// The steps of the checkpoints of a job that are there, the lowest first.
async fn steps(app: &TestApp, job: &str) -> Vec<i64> {
    sqlx::query_scalar(
        "select step from nodes where job_id = $1 and kind = 'checkpoint' and deleted_at is null order by step",
    )
    .bind(job)
    .fetch_all(&app.pool)
    .await
    .unwrap()
}

async fn object_keys(app: &TestApp, node: &str) -> Vec<Key> {
    let keys: Vec<String> = sqlx::query_scalar("select object_key from node_files where node_id = $1")
        .bind(node)
        .fetch_all(&app.pool)
        .await
        .unwrap();
    assert!(!keys.is_empty());
    keys.into_iter().map(Key::from).collect()
}

async fn num_stored(app: &TestApp, keys: &[Key]) -> usize {
    let mut num = 0;
    for key in keys {
        num += usize::from(app.store.head(key).await.unwrap().is_some());
    }
    num
}

#[sqlx::test]
async fn a_deleted_checkpoint_is_a_node_without_files_and_its_objects_go_afterwards(pool: PgPool) {
    let app = TestApp::start(pool).await;
    let job = app.given_job().await;
    let base = insert_node(&app, &job, "base", 10, None).await;
    let id = insert_node(&app, &job, "checkpoint", 20, Some(&base)).await;
    let path = format!("/v1/checkpoints/{id}");
    let keys = object_keys(&app, &id).await;
    assert_eq!(app.find_job(&job).await.json()["stored_bytes"], 2 * NODE_BYTES);
    assert_eq!(app.get("/v1/usage").await.json()["checkpoints_bytes"], NODE_BYTES);

    let answer = app.delete(&path).await;
    assert_eq!((answer.status.as_u16(), answer.bytes.len()), (204, 0));
    assert_eq!(app.get("/v1/checkpoints?include_superseded=true").await.json()["data"], json!([]));
    let node = app.get(&path).await.json();
    assert!(node["deleted_at"].is_string(), "{node}");
    assert_eq!((&node["files"], &node["size_bytes"], &node["parent"]), (&json!([]), &json!(0), &json!(base)));
    assert_eq!(app.get(&format!("{path}/files/model.safetensors")).await.problem(410).0, "deleted");
    let pinned = send(app.request(Method::PUT, &format!("{path}/pin"))).await;
    assert_eq!(pinned.problem(410).0, "deleted");
    assert_eq!(app.delete(&path).await.status, 204, "deleting twice is no mistake");
    assert_eq!(app.find_job(&job).await.json()["stored_bytes"], NODE_BYTES);

    assert_eq!(num_stored(&app, &keys).await, 2, "objects are the collector's");
    assert_eq!(collect::delete_queued(&app.pool, &app.store).await.unwrap(), 2);
    assert_eq!(num_stored(&app, &keys).await, 0);
    assert_eq!(num_stored(&app, &object_keys(&app, &base).await).await, 2);
}

#[sqlx::test]
async fn what_needs_a_checkpoint_keeps_it_and_is_named(pool: PgPool) {
    let app = TestApp::start(pool).await;
    let job = app.given_job().await;
    let id = insert_node(&app, &job, "checkpoint", 20, None).await;
    let path = format!("/v1/checkpoints/{id}");

    assert_eq!(pin(&app, &id).await["pinned"], true);
    let (code, detail) = app.delete(&path).await.problem(409);
    assert!(code == "in_use" && detail.contains(&format!("{id} is pinned")), "{code} {detail}");
    let unpinned = send(app.request(Method::DELETE, &format!("{path}/pin"))).await;
    assert_eq!((unpinned.status.as_u16(), &unpinned.json()["pinned"]), (200, &json!(false)));

    let next = app.given_job().await;
    sqlx::query("update jobs set init_node_id = $1 where id = $2")
        .bind(&id)
        .bind(&next)
        .execute(&app.pool)
        .await
        .unwrap();
    let (_, detail) = app.delete(&path).await.problem(409);
    assert!(detail.contains(&format!("{next} begins with {id}")), "{detail}");
    app.set_job_state(&next, "running").await;
    assert_eq!(app.delete(&path).await.status, 409);
    app.set_job_state(&next, "succeeded").await;

    let (_, tokenization) = app.given_tokens().await;
    sqlx::query("update tokenizations set tokenizer_node_id = $1, state = 'queued' where id = $2")
        .bind(&id)
        .bind(&tokenization)
        .execute(&app.pool)
        .await
        .unwrap();
    let (_, detail) = app.delete(&path).await.problem(409);
    assert!(detail.contains(&format!("{tokenization} uses the tokenizer of {id}")), "{detail}");
    execute(&app, "update tokenizations set state = 'failed' where id = $1", &tokenization).await;

    assert_eq!(app.get(&path).await.json()["deleted_at"], json!(null), "a refusal deletes nothing");
    assert_eq!(app.delete(&path).await.status, 204);
}

#[sqlx::test]
async fn a_job_that_is_being_submitted_keeps_what_it_begins_with(pool: PgPool) {
    let app = TestApp::start(pool).await;
    let job = app.given_job().await;
    let id = insert_node(&app, &job, "checkpoint", 20, None).await;
    let (project, next) = (ProjectId::from(app.project().await), app.given_job().await);
    let mut submission = app.pool.begin().await.unwrap();
    let facts = imports::find_facts(&mut submission, &project, &NodeId::from(id.clone())).await.unwrap();
    assert!(facts.is_some());
    let deletion = tokio::spawn(send(app.request(Method::DELETE, &format!("/v1/checkpoints/{id}"))));
    tokio::time::sleep(Duration::from_millis(300)).await;
    assert!(!deletion.is_finished(), "it waits until the submission has ended");
    sqlx::query("update jobs set init_node_id = $1 where id = $2")
        .bind(&id)
        .bind(&next)
        .execute(&mut *submission)
        .await
        .unwrap();
    submission.commit().await.unwrap();
    let (_, detail) = deletion.await.unwrap().problem(409);
    assert!(detail.contains(&next), "{detail}");
}

#[sqlx::test]
async fn only_checkpoints_are_deleted_and_pinned_by_themselves(pool: PgPool) {
    let app = TestApp::start(pool).await;
    let job = app.given_job().await;
    let base = insert_node(&app, &job, "base", 10, None).await;
    for (method, path) in [
        (Method::DELETE, format!("/v1/checkpoints/{base}")),
        (Method::PUT, format!("/v1/checkpoints/{base}/pin")),
        (Method::DELETE, "/v1/checkpoints/node_x".into()),
        (Method::DELETE, "/v1/checkpoints/node_x/pin".into()),
    ] {
        assert_eq!(send(app.request(method, &path)).await.problem(404).0, "not_found", "{path}");
    }
    assert_eq!(app.delete(&format!("/v1/bases/{base}")).await.problem(405).0, "method_not_allowed");
}

#[sqlx::test]
async fn another_project_deletes_and_sees_nothing(pool: PgPool) {
    let mut app = TestApp::start(pool).await;
    let job = app.given_job().await;
    let base = insert_node(&app, &job, "base", 10, None).await;
    let id = insert_node(&app, &job, "checkpoint", 20, Some(&base)).await;
    app.set_job_state(&job, "succeeded").await;

    let owner = std::mem::take(&mut app.key);
    app.key = app.insert_key("others", &["read", "write"]).await;
    assert_eq!(app.delete(&format!("/v1/checkpoints/{id}")).await.status, 404);
    assert_eq!(app.delete(&format!("/v1/jobs/{job}/lineage")).await.status, 404);
    assert_eq!(send(app.request(Method::PUT, &format!("/v1/checkpoints/{id}/pin"))).await.status, 404);
    let all = app.post("/v1/checkpoints/delete", &json!({"older_than_s": 0})).await.json();
    assert_eq!((&all["num_deleted"], &all["refused"]), (&json!(0), &json!([])));
    let named = app.post("/v1/checkpoints/delete", &json!({"ids": [id]})).await.json();
    assert_eq!((&named["num_deleted"], &named["refused"][0]["reason"]), (&json!(0), &json!("not_found")));
    assert_eq!(app.get("/v1/usage").await.json()["total_bytes"], 0);

    app.key = app.insert_key("readers", &["read"]).await;
    assert_eq!(app.post("/v1/checkpoints/delete", &json!({"job": job})).await.problem(403).0, "missing_scope");
    app.key = owner;
    assert_eq!(app.get(&format!("/v1/checkpoints/{id}")).await.json()["deleted_at"], json!(null));
    assert_eq!(app.get(&format!("/v1/bases/{base}")).await.json()["size_bytes"], NODE_BYTES);
}

#[sqlx::test]
async fn usage_counts_an_object_once_and_says_what_it_is_for(pool: PgPool) {
    let app = TestApp::start(pool).await;
    let job = app.given_job().await;
    for (kind, step) in [("base", 10), ("restart", 20), ("checkpoint", 20), ("state", 25), ("state", 30)] {
        insert_node(&app, &job, kind, step, None).await;
    }
    // Both states name the same weights.
    execute(
        &app,
        "update node_files set object_key = 'shared' from nodes
         where nodes.id = node_id and kind = 'state' and node_files.name = 'model.safetensors' and job_id = $1",
        &job,
    )
    .await;
    sqlx::query("insert into workers (id, name, version, device, num_gpus) values ('w', 'w', '1', 'cpu', 0)")
        .execute(&app.pool)
        .await
        .unwrap();
    execute(
        &app,
        "insert into attempts (work_item_id, lease_epoch, worker_id, log_key, log_bytes)
         select work_item_id, 1, 'w', 'log', 100 from jobs where id = $1",
        &job,
    )
    .await;
    execute(
        &app,
        "insert into tokenization_files (tokenization_id, name, object_key, size_bytes, sha256)
         select tokenization_id, 'train.bin', 'tokens', 1000, '' from jobs where id = $1",
        &job,
    )
    .await;
    let usage = json!({
        "datasets_bytes": "some text".len(), "tokenizations_bytes": 1000, "bases_bytes": 12, "restarts_bytes": 12,
        "checkpoints_bytes": 12, "states_bytes": 14, "logs_bytes": 100, "total_bytes": 9 + 1000 + 50 + 100
    });
    assert_eq!(app.get("/v1/usage").await.json(), usage);
    assert_eq!(app.find_job(&job).await.json()["stored_bytes"], 50);
}
