//! Many checkpoints at once: which are selected, and that a dry run is the real one but for what it leaves.

use serde_json::{Value, json};
use sqlx::PgPool;

use super::{NODE_BYTES, execute, pin, steps};
use crate::{app::TestApp, lineage::insert_node};

async fn delete(app: &TestApp, request: &Value) -> Value {
    let answer = app.post("/v1/checkpoints/delete", request).await;
    assert_eq!(answer.status, 200, "{}", answer.text());
    answer.json()
}

/// The checkpoints of a job after every ten steps, the lowest first.
async fn given_checkpoints(app: &TestApp, num: i64) -> (String, Vec<String>) {
    let job = app.given_job().await;
    let mut ids = Vec::new();
    for index in 1..=num {
        ids.push(insert_node(app, &job, "checkpoint", 10 * index, None).await);
    }
    (job, ids)
}

#[sqlx::test]
async fn a_dry_run_says_what_the_real_one_does_and_leaves_everything(pool: PgPool) {
    let app = TestApp::start(pool).await;
    let (job, ids) = given_checkpoints(&app, 5).await;
    let (other, _) = given_checkpoints(&app, 2).await;
    pin(&app, &ids[1]).await;
    let mut request = json!({"job": job, "keep_last": 2, "dry_run": true});

    let dry = delete(&app, &request).await;
    assert_eq!(steps(&app, &job).await, [10, 20, 30, 40, 50]);
    request["dry_run"] = json!(false);
    let mut real = delete(&app, &request).await;
    assert_eq!(steps(&app, &job).await, [20, 40, 50]);
    assert_eq!(steps(&app, &other).await, [10, 20]);
    assert_eq!((&dry["dry_run"], &real["dry_run"]), (&json!(true), &json!(false)));
    real["dry_run"] = json!(true);
    assert_eq!(real, dry);

    assert_eq!((&real["num_deleted"], &real["freed_bytes"]), (&json!(2), &json!(2 * NODE_BYTES)));
    assert_eq!(real["deleted"], json!([ids[0], ids[2]]));
    let refused = json!([{
        "id": ids[1], "reason": "pinned", "user": null, "message": format!("{} is pinned; unpin it first", ids[1])
    }]);
    assert_eq!(real["refused"], refused);
}

#[sqlx::test]
async fn every_condition_narrows_the_selection(pool: PgPool) {
    let app = TestApp::start(pool).await;
    let (job, ids) = given_checkpoints(&app, 5).await;
    execute(&app, "update nodes set created_at = now() - interval '1 hour' where step < 40 and job_id = $1", &job)
        .await;
    execute(&app, "update nodes set superseded = true where id = $1", &ids[2]).await;
    let dry = async |mut request: Value| {
        request["dry_run"] = json!(true);
        delete(&app, &request).await["deleted"].clone()
    };

    assert_eq!(dry(json!({"older_than_s": 1800})).await, json!(ids[..3]));
    assert_eq!(dry(json!({"older_than_s": 7200})).await, json!([]));
    assert_eq!(dry(json!({"superseded": true})).await, json!([ids[2]]));
    assert_eq!(dry(json!({"job": job, "superseded": false})).await, json!([ids[0], ids[1], ids[3], ids[4]]));
    // The newest two of the lineage are 40 and 50.
    assert_eq!(dry(json!({"keep_last": 2})).await, json!(ids[..3]));
    assert_eq!(dry(json!({"keep_last": 0, "superseded": false})).await.as_array().unwrap().len(), 4);
    assert_eq!(dry(json!({"ids": [ids[0], ids[4]], "older_than_s": 1800})).await, json!([ids[0]]));
    assert_eq!(dry(json!({"job": "job_x"})).await, json!([]));
    assert_eq!(steps(&app, &job).await.len(), 5);
}

#[sqlx::test]
async fn every_one_that_is_refused_is_named_with_its_reason(pool: PgPool) {
    let app = TestApp::start(pool).await;
    let (_, ids) = given_checkpoints(&app, 4).await;
    pin(&app, &ids[0]).await;
    let next = app.given_job().await;
    sqlx::query("update jobs set init_node_id = $1 where id = $2")
        .bind(&ids[1])
        .bind(&next)
        .execute(&app.pool)
        .await
        .unwrap();
    let (_, tokenization) = app.given_tokens().await;
    sqlx::query("update tokenizations set tokenizer_node_id = $1, state = 'running' where id = $2")
        .bind(&ids[2])
        .bind(&tokenization)
        .execute(&app.pool)
        .await
        .unwrap();

    let mut asked = ids.clone();
    asked.push("node_x".into());
    let answer = delete(&app, &json!({"ids": asked})).await;
    assert_eq!(answer["deleted"], json!([ids[3]]));
    let mut refused: Vec<_> = answer["refused"].as_array().unwrap().iter().collect();
    refused.sort_by_key(|refusal| refusal["reason"].to_string());
    let reasons: Vec<_> =
        refused.iter().map(|refusal| (&refusal["reason"], &refusal["id"], &refusal["user"])).collect();
    assert_eq!(
        reasons,
        [
            (&json!("begins_job"), &json!(ids[1]), &json!(next)),
            (&json!("not_found"), &json!("node_x"), &json!(null)),
            (&json!("pinned"), &json!(ids[0]), &json!(null)),
            (&json!("tokenizes"), &json!(ids[2]), &json!(tokenization)),
        ]
    );
    let again = delete(&app, &json!({"ids": [ids[3]]})).await;
    assert_eq!((&again["num_deleted"], &again["refused"]), (&json!(0), &json!([])), "it is deleted already");
}

#[sqlx::test]
async fn a_request_that_selects_nothing_or_makes_no_sense_is_refused(pool: PgPool) {
    let app = TestApp::start(pool).await;
    let (job, _) = given_checkpoints(&app, 1).await;
    let pointers = async |request: Value| app.post("/v1/checkpoints/delete", &request).await.pointers();
    assert_eq!(pointers(json!({})).await, [""]);
    assert_eq!(pointers(json!({"dry_run": true})).await, [""]);
    assert_eq!(pointers(json!({"older_than_s": -1, "keep_last": -1})).await, ["/keep_last", "/older_than_s"]);
    assert_eq!(pointers(json!({"ids": vec!["node_x"; 1001]})).await, ["/ids"]);
    assert_eq!(pointers(json!({"job": job, "older": 3, "superseded": "yes"})).await, ["/older", "/superseded"]);
    assert_eq!(steps(&app, &job).await, [10]);
}
