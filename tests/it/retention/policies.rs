//! The policies of jobs, applied as the collector applies them.

use relora::{db::objects::CollectorPart, db::objects::take_turn, worker::collect};
use serde_json::{Value, json};
use sqlx::PgPool;

use super::{execute, pin, steps};
use crate::{
    app::{TestApp, spec},
    lineage::insert_node,
};

/// A job with this policy, and its checkpoints after every ten steps up to 60, the lowest first.
async fn given_policy(app: &TestApp, policy: Value) -> (String, Vec<String>) {
    let (dataset, _) = app.given_tokens().await;
    let mut spec = spec(&dataset);
    spec["checkpoints"] = policy;
    spec["checkpoints"]["every_steps"] = json!(10);
    let answer = app.create_job(&spec).await;
    assert_eq!(answer.status, 201, "{}", answer.text());
    let job = answer.id();
    let mut ids = Vec::new();
    for index in 1..=6 {
        ids.push(insert_node(app, &job, "checkpoint", 10 * index, None).await);
    }
    (job, ids)
}

/// What was measured at a step by the attempt of this lease epoch.
async fn evaluate(app: &TestApp, job: &str, lease_epoch: i64, step: i64, loss: f64) {
    sqlx::query(
        "insert into job_metrics (job_id, lease_epoch, step, name, value) values ($1, $2, $3, 'eval_loss', $4)",
    )
    .bind(job)
    .bind(lease_epoch)
    .bind(step)
    .bind(loss)
    .execute(&app.pool)
    .await
    .unwrap();
}

async fn apply(app: &TestApp) -> usize {
    collect::apply_policies(&app.pool).await.unwrap()
}

#[sqlx::test]
async fn without_a_policy_every_checkpoint_stays(pool: PgPool) {
    let app = TestApp::start(pool).await;
    let (job, _) = given_policy(&app, json!({})).await;
    app.set_job_state(&job, "succeeded").await;
    assert_eq!(apply(&app).await, 0);
    assert_eq!(steps(&app, &job).await, [10, 20, 30, 40, 50, 60]);
}

#[sqlx::test]
async fn the_newest_the_round_and_the_best_stay_of_each_job_by_its_own_policy(pool: PgPool) {
    let app = TestApp::start(pool).await;
    let (last, _) = given_policy(&app, json!({"keep_last": 2})).await;
    let (round, _) = given_policy(&app, json!({"keep_last": 1, "keep_every_steps": 30})).await;
    let (best, _) = given_policy(&app, json!({"keep_last": 1, "keep_best": 2})).await;
    for (step, loss) in [(10, 4.0), (20, 2.0), (30, 1.0), (40, 3.0), (60, 5.0)] {
        evaluate(&app, &best, 1, step, loss).await;
    }
    // A later attempt measured another loss at the step: that counts.
    evaluate(&app, &best, 2, 20, 9.0).await;
    assert_eq!(apply(&app).await, 4 + 4 + 3);
    assert_eq!(steps(&app, &last).await, [50, 60]);
    assert_eq!(steps(&app, &round).await, [30, 60]);
    assert_eq!(steps(&app, &best).await, [30, 40, 60]);
    assert_eq!(apply(&app).await, 0, "what is left stays");
}

#[sqlx::test]
async fn what_is_too_old_goes_but_for_pins_and_the_newest(pool: PgPool) {
    let app = TestApp::start(pool).await;
    let (job, ids) = given_policy(&app, json!({"ttl_s": 3600})).await;
    pin(&app, &ids[1]).await;
    app.set_job_state(&job, "succeeded").await;
    execute(&app, "update nodes set created_at = now() - interval '59 minutes' where job_id = $1", &job).await;
    assert_eq!(apply(&app).await, 0);
    execute(
        &app,
        "update nodes set created_at = now() - interval '2 hours' where job_id = $1 and step not in (40, 50)",
        &job,
    )
    .await;
    assert_eq!(apply(&app).await, 2);
    assert_eq!(steps(&app, &job).await, [20, 40, 50, 60]);
}

#[sqlx::test]
async fn a_policy_takes_neither_what_is_needed_nor_bases_restarts_and_states(pool: PgPool) {
    let app = TestApp::start(pool).await;
    let (job, ids) = given_policy(&app, json!({"keep_last": 1})).await;
    let base = insert_node(&app, &job, "base", 10, None).await;
    let restart = insert_node(&app, &job, "restart", 20, Some(&base)).await;
    insert_node(&app, &job, "state", 20, Some(&restart)).await;
    let next = app.given_job().await;
    sqlx::query("update jobs set init_node_id = $1 where id = $2")
        .bind(&ids[2])
        .bind(&next)
        .execute(&app.pool)
        .await
        .unwrap();
    assert_eq!(apply(&app).await, 4);
    assert_eq!(steps(&app, &job).await, [30, 60]);
    let others: i64 =
        sqlx::query_scalar("select count(*) from nodes where kind <> 'checkpoint' and deleted_at is null")
            .fetch_one(&app.pool)
            .await
            .unwrap();
    assert_eq!(others, 3);
    app.set_job_state(&next, "cancelled").await;
    assert_eq!(apply(&app).await, 1);
    assert_eq!(steps(&app, &job).await, [60]);
}

#[sqlx::test]
async fn a_superseded_checkpoint_goes_when_the_later_attempt_has_got_as_far(pool: PgPool) {
    let app = TestApp::start(pool).await;
    let (job, ids) = given_policy(&app, json!({"keep_last": 5})).await;
    execute(&app, "update nodes set superseded = true where step > 30 and job_id = $1", &job).await;
    assert_eq!(apply(&app).await, 0);
    execute(&app, "update nodes set superseded = false where id = $1", &ids[4]).await;
    assert_eq!(apply(&app).await, 1);
    assert_eq!(steps(&app, &job).await, [10, 20, 30, 50, 60]);
}

#[sqlx::test]
async fn of_all_workers_one_gets_the_turn_until_it_is_due_again(pool: PgPool) {
    let app = TestApp::start(pool).await;
    let asks = (0..8).map(|_| take_turn(&app.pool, CollectorPart::Retention, 60.0));
    let taken = futures_util::future::join_all(asks).await;
    assert_eq!(taken.into_iter().filter(|taken| *taken.as_ref().unwrap()).count(), 1);
    assert!(take_turn(&app.pool, CollectorPart::Sweep, 60.0).await.unwrap(), "another part is another turn");
    execute(&app, "update collector_turns set due_at = now() where part = $1", "retention").await;
    assert!(take_turn(&app.pool, CollectorPart::Retention, 60.0).await.unwrap());
}
