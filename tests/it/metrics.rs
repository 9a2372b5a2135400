use serde_json::{Value, json};
use sqlx::PgPool;

use crate::app::TestApp;

/// Two attempts: the first reached step 5, the second went on from step 3.
async fn given_metrics(app: &TestApp) -> String {
    let id = app.given_job().await;
    sqlx::query("insert into workers (id, name, version, device, num_gpus) values ('w', 'w', '0', 'cpu', 0)")
        .execute(&app.pool)
        .await
        .unwrap();
    sqlx::query(
        "insert into attempts (work_item_id, lease_epoch, worker_id, start_step)
         select work_item_id, epoch, 'w', start from jobs, (values (1, 0), (2, 3)) a (epoch, start) where id = $1",
    )
    .bind(&id)
    .execute(&app.pool)
    .await
    .unwrap();
    sqlx::query(
        "insert into job_metrics (job_id, lease_epoch, step, name, value)
         select $1, 1, step, 'loss', 100 + step from generate_series(1, 5) step
         union all select $1, 2, 4, 'loss', 204
         union all select $1, 1, 3, 'eval_loss', 103
         union all select $1, 2, 3, 'eval_loss', 203
         union all select $1, 1, 0, 'eval_loss', 100",
    )
    .bind(&id)
    .execute(&app.pool)
    .await
    .unwrap();
    id
}

async fn list(app: &TestApp, id: &str, query: &str) -> (Vec<(i64, String, f64)>, Value) {
    let page = app.get(&format!("/v1/jobs/{id}/metrics{query}")).await.json();
    let values = page["data"].as_array().unwrap().iter().map(|metric| {
        (
            metric["step"].as_i64().unwrap(),
            metric["name"].as_str().unwrap().to_owned(),
            metric["value"].as_f64().unwrap(),
        )
    });
    (values.collect(), page["next_cursor"].clone())
}

#[sqlx::test]
async fn each_step_has_the_value_of_the_attempt_that_survived(pool: PgPool) {
    let app = TestApp::start(pool).await;
    let id = given_metrics(&app).await;
    let (losses, next_cursor) = list(&app, &id, "?name=loss").await;
    let values: Vec<_> = losses.iter().map(|(step, _, value)| (*step, *value)).collect();
    assert_eq!(values, [(1, 101.0), (2, 102.0), (3, 103.0), (4, 204.0)]);
    assert_eq!(next_cursor, json!(null));

    let (evals, _) = list(&app, &id, "?name=eval_loss").await;
    assert_eq!(evals.iter().map(|(step, _, value)| (*step, *value)).collect::<Vec<_>>(), [(0, 100.0), (3, 203.0)]);
}

#[sqlx::test]
async fn metrics_page_by_whole_steps(pool: PgPool) {
    let app = TestApp::start(pool).await;
    let id = given_metrics(&app).await;
    let (all, _) = list(&app, &id, "").await;
    assert_eq!(all.len(), 6);

    let mut paged = Vec::new();
    let mut query = "?limit=2".to_owned();
    loop {
        let (values, next_cursor) = list(&app, &id, &query).await;
        paged.extend(values);
        let Some(cursor) = next_cursor.as_str() else { break };
        query = format!("?limit=2&cursor={cursor}");
    }
    assert_eq!(paged, all);
    let (later, _) = list(&app, &id, "?after_step=2&name=loss").await;
    assert_eq!(later.iter().map(|(step, ..)| *step).collect::<Vec<_>>(), [3, 4]);
    for bad in ["?limit=0", "?limit=10001", "?name=colour", "?after_step=x"] {
        assert_eq!(app.get(&format!("/v1/jobs/{id}/metrics{bad}")).await.status, 400, "{bad}");
    }
}
