//! The bases, restarts and states of a job, which go together or not at all.

use relora::worker::collect;
use serde_json::json;
use sqlx::PgPool;

use super::{NODE_BYTES, execute, num_stored, object_keys};
use crate::{app::TestApp, lineage::insert_node};

struct Lineage {
    job: String,
    base: String,
    restart: String,
    checkpoint: String,
    state: String,
}

impl Lineage {
    async fn of_a_job_that_succeeded(app: &TestApp) -> Self {
        let job = app.given_job().await;
        let base = insert_node(app, &job, "base", 10, None).await;
        let restart = insert_node(app, &job, "restart", 20, Some(&base)).await;
        let checkpoint = insert_node(app, &job, "checkpoint", 20, Some(&restart)).await;
        let state = insert_node(app, &job, "state", 20, Some(&restart)).await;
        app.set_job_state(&job, "succeeded").await;
        Self { job, base, restart, checkpoint, state }
    }

    fn path(&self) -> String {
        format!("/v1/jobs/{}/lineage", self.job)
    }
}

#[sqlx::test]
async fn the_lineage_of_a_finished_job_is_deleted_and_its_checkpoints_stay(pool: PgPool) {
    let app = TestApp::start(pool).await;
    let lineage = Lineage::of_a_job_that_succeeded(&app).await;
    let mut keys = object_keys(&app, &lineage.base).await;
    keys.extend(object_keys(&app, &lineage.restart).await);
    keys.extend(object_keys(&app, &lineage.state).await);
    let kept = object_keys(&app, &lineage.checkpoint).await;

    let dry = app.delete(&format!("{}?dry_run=true", lineage.path())).await.json();
    assert_eq!((&dry["num_deleted"], &dry["freed_bytes"]), (&json!(3), &json!(3 * NODE_BYTES)));
    assert_eq!(app.get(&format!("/v1/bases/{}", lineage.base)).await.json()["deleted_at"], json!(null));

    let mut real = app.delete(&lineage.path()).await.json();
    assert_eq!(real["dry_run"], false);
    real["dry_run"] = json!(true);
    assert_eq!(real, dry, "a dry run says what comes true");
    let restart = app.get(&format!("/v1/restarts/{}", lineage.restart)).await.json();
    assert!(restart["deleted_at"].is_string(), "{restart}");
    assert_eq!(restart["parent"], lineage.base, "the row still tells where the weights came from");
    assert_eq!(app.get("/v1/restarts").await.json()["data"], json!([]));
    let states: i64 =
        sqlx::query_scalar("select count(*) from nodes where kind = 'state'").fetch_one(&app.pool).await.unwrap();
    assert_eq!(states, 0, "nobody goes on from a state without files");

    collect::delete_queued(&app.pool, &app.store).await.unwrap();
    assert_eq!((num_stored(&app, &keys).await, num_stored(&app, &kept).await), (0, 2));
    assert_eq!(app.delete(&lineage.path()).await.json()["num_deleted"], 0, "deleting it twice is no mistake");
    assert_eq!(app.delete("/v1/jobs/job_x/lineage").await.problem(404).0, "not_found");
}

#[sqlx::test]
async fn a_job_that_is_not_finished_keeps_its_lineage(pool: PgPool) {
    let app = TestApp::start(pool).await;
    let lineage = Lineage::of_a_job_that_succeeded(&app).await;
    for state in ["queued", "running", "paused", "cancelling"] {
        app.set_job_state(&lineage.job, state).await;
        let (code, detail) = app.delete(&lineage.path()).await.problem(409);
        assert!(code == "job_not_finished" && detail.contains(state), "{code} {detail}");
    }
    assert_eq!(app.find_job(&lineage.job).await.json()["stored_bytes"], 4 * NODE_BYTES);
}

#[sqlx::test]
async fn a_descendant_in_another_job_keeps_the_whole_lineage_and_is_named(pool: PgPool) {
    let app = TestApp::start(pool).await;
    let lineage = Lineage::of_a_job_that_succeeded(&app).await;
    let next = app.given_job().await;
    let child = insert_node(&app, &next, "checkpoint", 10, Some(&lineage.base)).await;
    let (code, detail) = app.delete(&lineage.path()).await.problem(409);
    assert_eq!(code, "in_use");
    assert!(detail.contains(&format!("{child}, of another job, has {} as its parent", lineage.base)), "{detail}");
    assert_eq!(app.find_job(&lineage.job).await.json()["stored_bytes"], 4 * NODE_BYTES, "all or nothing");

    assert_eq!(app.delete(&format!("/v1/checkpoints/{child}")).await.status, 204);
    sqlx::query("update jobs set init_node_id = $1 where id = $2")
        .bind(&lineage.base)
        .bind(&next)
        .execute(&app.pool)
        .await
        .unwrap();
    let (_, detail) = app.delete(&lineage.path()).await.problem(409);
    assert!(detail.contains(&format!("{next} begins with {}", lineage.base)), "{detail}");
    app.set_job_state(&next, "cancelled").await;
    assert_eq!(app.delete(&lineage.path()).await.json()["num_deleted"], 3);
}

#[sqlx::test]
async fn a_checkpoint_is_deleted_although_another_job_descends_from_it(pool: PgPool) {
    let app = TestApp::start(pool).await;
    let lineage = Lineage::of_a_job_that_succeeded(&app).await;
    let next = app.given_job().await;
    let child = insert_node(&app, &next, "base", 5, Some(&lineage.checkpoint)).await;
    execute(&app, "update jobs set state = 'succeeded', finished_at = now() where id = $1", &next).await;
    assert_eq!(app.delete(&format!("/v1/checkpoints/{}", lineage.checkpoint)).await.status, 204);
    assert_eq!(app.get(&format!("/v1/bases/{child}")).await.json()["parent"], lineage.checkpoint);
}
