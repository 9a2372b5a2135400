//! The collector and the store: what it deletes, what it never touches, and a store that does not answer.

use std::time::Duration;

use bytes::Bytes;
use chrono::{DateTime, Utc};
use relora::{
    domain::ids::{DatasetId, JobId, NodeId, TokenizationId},
    embedded::S3,
    storage::{Key, Store},
    worker::collect::{self, Swept},
};
use sqlx::PgPool;

use super::{execute, num_stored, object_keys};
use crate::{app::TestApp, lineage::insert_node};

async fn put(store: &Store, key: Key) -> Key {
    store.put_bytes(&key, Bytes::from_static(b"12345")).await.unwrap();
    key
}

async fn queued(pool: &PgPool) -> Vec<String> {
    sqlx::query_scalar("select object_key from deleted_objects order by 1").fetch_all(pool).await.unwrap()
}

/// A time before which everything here was written.
fn later() -> DateTime<Utc> {
    Utc::now() + Duration::from_secs(60)
}

#[sqlx::test]
async fn an_object_that_is_gone_already_is_deleted_all_the_same(pool: PgPool) {
    let app = TestApp::start(pool).await;
    let job = app.given_job().await;
    let id = insert_node(&app, &job, "checkpoint", 10, None).await;
    let keys = object_keys(&app, &id).await;
    app.store.delete(&keys[..1]).await.unwrap();
    assert_eq!(app.delete(&format!("/v1/checkpoints/{id}")).await.status, 204);
    assert_eq!(collect::delete_queued(&app.pool, &app.store).await.unwrap(), 2);
    assert_eq!((num_stored(&app, &keys).await, queued(&app.pool).await), (0, vec![]));
}

#[sqlx::test]
async fn what_a_store_that_is_down_does_not_confirm_is_deleted_when_it_is_back(pool: PgPool) {
    let app = TestApp::start(pool).await;
    let job = app.given_job().await;
    let id = insert_node(&app, &job, "checkpoint", 10, None).await;
    assert_eq!(app.delete(&format!("/v1/checkpoints/{id}")).await.status, 204);
    let waiting = queued(&app.pool).await;
    assert_eq!(waiting.len(), 2);

    let folder = tempfile::tempdir().unwrap();
    let s3 = S3::start(folder.path(), 0).await.unwrap();
    let store = Store::connect(s3.store()).await.unwrap();
    let orphan = put(&store, Key::attempt(&JobId::from(job), 1, "checkpoints/99/model.safetensors")).await;
    s3.stop().await.unwrap();
    assert!(collect::delete_queued(&app.pool, &store).await.is_err());
    assert!(collect::sweep(&app.pool, &store, later()).await.is_err());
    assert_eq!(queued(&app.pool).await, waiting, "nothing is half marked");

    // At the same address, as after a restart.
    let s3 = S3::start(folder.path(), 0).await.unwrap();
    let store = Store::connect(s3.store()).await.unwrap();
    assert!(store.head(&orphan).await.unwrap().is_some());
    assert_eq!(collect::delete_queued(&app.pool, &store).await.unwrap(), 2);
    assert_eq!(collect::sweep(&app.pool, &store, later()).await.unwrap().num_objects, 1);
    assert_eq!(queued(&app.pool).await, [""; 0]);
}

#[sqlx::test]
async fn an_object_that_a_row_names_again_is_not_deleted(pool: PgPool) {
    let app = TestApp::start(pool).await;
    let job = app.given_job().await;
    let id = insert_node(&app, &job, "checkpoint", 10, None).await;
    let keys = object_keys(&app, &id).await;
    sqlx::query("insert into deleted_objects (object_key) select object_key from node_files")
        .execute(&app.pool)
        .await
        .unwrap();
    assert_eq!(collect::delete_queued(&app.pool, &app.store).await.unwrap(), 0);
    assert_eq!(num_stored(&app, &keys).await, 2);
}

#[sqlx::test]
async fn objects_that_no_row_names_are_swept_and_all_others_stay(pool: PgPool) {
    let app = TestApp::start(pool).await;
    let job = app.given_job().await;
    let named = object_keys(&app, &insert_node(&app, &job, "checkpoint", 10, None).await).await;
    let job = JobId::from(job);
    let tokenization: String =
        sqlx::query_scalar("select tokenization_id from jobs").fetch_one(&app.pool).await.unwrap();
    let tokenization = TokenizationId::from(tokenization);
    let tokens = put(&app.store, Key::tokenization_file(&tokenization, 1, "train.bin")).await;
    sqlx::query(
        "insert into tokenization_files (tokenization_id, name, object_key, size_bytes, sha256)
         select tokenization_id, 'train.bin', $1, 5, '' from jobs",
    )
    .bind(tokens.as_str())
    .execute(&app.pool)
    .await
    .unwrap();
    let log = put(&app.store, Key::log(&job, 1)).await;
    sqlx::query("insert into workers (id, name, version, device, num_gpus) values ('w', 'w', '1', 'cpu', 0)")
        .execute(&app.pool)
        .await
        .unwrap();
    sqlx::query(
        "insert into attempts (work_item_id, lease_epoch, worker_id, log_key) select work_item_id, 1, 'w', $1 from jobs",
    )
    .bind(log.as_str())
    .execute(&app.pool)
    .await
    .unwrap();

    let orphans = [
        put(&app.store, Key::attempt(&job, 1, "checkpoints/20/model.safetensors")).await,
        put(&app.store, Key::log(&job, 2)).await,
        put(&app.store, Key::import(&NodeId::new(), "config.json")).await,
        put(&app.store, Key::tokenization_file(&tokenization, 2, "train.bin")).await,
        put(&app.store, Key::dataset(&DatasetId::new(), "token")).await,
    ];
    let elsewhere = put(&app.store, Key::from("notes/of-somebody".to_owned())).await;
    let mut kept = named;
    kept.extend([tokens, log, elsewhere]);

    let a_day_ago = Utc::now() - Duration::from_secs(86_400);
    assert_eq!(collect::sweep(&app.pool, &app.store, a_day_ago).await.unwrap(), Swept::default(), "all are young");
    assert_eq!(num_stored(&app, &orphans).await, 5);

    let swept = collect::sweep(&app.pool, &app.store, later()).await.unwrap();
    assert_eq!(swept, Swept { num_objects: 5, bytes: 25, foreign_key: None });
    assert_eq!(num_stored(&app, &orphans).await, 0);
    assert_eq!(num_stored(&app, &kept).await, kept.len());
    let dataset: String = sqlx::query_scalar("select dataset_id from jobs").fetch_one(&app.pool).await.unwrap();
    assert_eq!(app.get(&format!("/v1/datasets/{dataset}/content")).await.text(), "some text");
}

#[sqlx::test]
async fn whoever_holds_a_lease_finds_everything_that_it_has_stored(pool: PgPool) {
    let app = TestApp::start(pool).await;
    let job = JobId::from(app.given_job().await);
    sqlx::query("insert into workers (id, name, version, device, num_gpus) values ('w', 'w', '1', 'cpu', 0)")
        .execute(&app.pool)
        .await
        .unwrap();
    // Of the job's item and of its tokenization's. An expired one may still be renewed.
    sqlx::query(
        "insert into leases (work_item_id, lease_epoch, worker_id, expires_at)
         select id, 12, 'w', now() - interval '1 hour' from work_items",
    )
    .execute(&app.pool)
    .await
    .unwrap();
    let tokenization: String =
        sqlx::query_scalar("select tokenization_id from jobs").fetch_one(&app.pool).await.unwrap();
    let tokenization = TokenizationId::from(tokenization);
    let held = [
        put(&app.store, Key::attempt(&job, 12, "states/5/state.json")).await,
        put(&app.store, Key::tokenization_file(&tokenization, 12, "train.bin")).await,
    ];
    // Their epochs begin alike, and belong to nobody.
    let lost = [
        put(&app.store, Key::attempt(&job, 1, "states/5/state.json")).await,
        put(&app.store, Key::attempt(&job, 123, "states/5/state.json")).await,
        put(&app.store, Key::tokenization_file(&tokenization, 1, "train.bin")).await,
    ];
    assert_eq!(collect::sweep(&app.pool, &app.store, later()).await.unwrap().num_objects, 3);
    assert_eq!((num_stored(&app, &held).await, num_stored(&app, &lost).await), (2, 0));

    execute(&app, "delete from leases where worker_id = $1", "w").await;
    assert_eq!(collect::sweep(&app.pool, &app.store, later()).await.unwrap().num_objects, 2);
}

#[sqlx::test]
async fn in_a_store_that_another_database_uses_too_only_orphans_of_known_jobs_are_swept(pool: PgPool) {
    let app = TestApp::start(pool).await;
    let job = JobId::from(app.given_job().await);
    let orphan = put(&app.store, Key::attempt(&job, 1, "checkpoints/20/model.safetensors")).await;
    let foreign = [
        put(&app.store, Key::attempt(&JobId::new(), 1, "checkpoints/20/model.safetensors")).await,
        put(&app.store, Key::import(&NodeId::new(), "model.safetensors")).await,
        put(&app.store, Key::dataset(&DatasetId::new(), "token")).await,
    ];
    let swept = collect::sweep(&app.pool, &app.store, later()).await.unwrap();
    assert_eq!((swept.num_objects, swept.foreign_key.as_deref()), (1, Some(foreign[0].as_str())));
    assert_eq!(num_stored(&app, &[orphan]).await, 0);
    assert_eq!(num_stored(&app, &foreign).await, 3);
}

#[sqlx::test]
async fn more_objects_than_fit_on_a_page_are_all_looked_at(pool: PgPool) {
    let app = TestApp::start(pool).await;
    let job = JobId::from(app.given_job().await);
    let keys = (0..1_005).map(|n| put(&app.store, Key::attempt(&job, 1, &format!("states/{n}/s"))));
    let keys = futures_util::future::join_all(keys).await;
    assert_eq!(collect::sweep(&app.pool, &app.store, later()).await.unwrap().num_objects, keys.len());
    assert!(app.store.list("j/", None, 10).await.unwrap().is_empty());
}
