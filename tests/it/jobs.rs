use bytes::Bytes;
use relora::storage::Key;
use serde_json::{Value, json};
use sqlx::PgPool;

use crate::app::{TestApp, spec};

async fn num_queued(app: &TestApp) -> i64 {
    sqlx::query_scalar("select count(*) from work_items where kind = 'train'").fetch_one(&app.pool).await.unwrap()
}

async fn insert_worker(app: &TestApp, num_gpus: i64) {
    sqlx::query("insert into workers (id, name, version, device, num_gpus) values ($1, 'w', '0', 'cuda', $2)")
        .bind(format!("worker_{num_gpus}"))
        .bind(num_gpus)
        .execute(&app.pool)
        .await
        .unwrap();
}

#[sqlx::test]
async fn a_job_is_queued_with_its_spec_completed(pool: PgPool) {
    let app = TestApp::start(pool).await;
    let (dataset, tokenization) = app.given_tokens().await;
    let answer = app.create_job(&spec(&dataset)).await;
    assert_eq!(answer.status, 201, "{answer:?}");
    let job = answer.json();
    assert_eq!(job["state"], "queued");
    assert_eq!(job["name"], "small");
    assert_eq!((&job["wait_reason"], &job["queue_position"]), (&json!("no_worker"), &json!(1)));
    assert_eq!(job["spec"]["tokenization"], tokenization);
    assert_eq!(job["spec"]["optimizer"]["learning_rate"], 1e-3);
    assert_eq!(job["spec"]["model"]["vocab_size"], 300);
    assert_eq!(job["progress"]["num_steps"], 40);
    assert_eq!(job["progress"]["total_restarts"], 3);
    assert_eq!((&job["progress"]["step"], &job["progress"]["eta_s"]), (&json!(0), &json!(null)));
    assert_eq!(job, app.find_job(&answer.id()).await.json());

    let item: (String, String, i64, i64) = sqlx::query_as(
        "select w.kind, w.device, w.num_gpus, w.priority from work_items w join jobs j on j.work_item_id = w.id",
    )
    .fetch_one(&app.pool)
    .await
    .unwrap();
    assert_eq!(item, ("train".into(), "auto".into(), 1, 0));
}

#[sqlx::test]
async fn every_mistake_in_a_spec_is_reported_at_once_and_nothing_is_queued(pool: PgPool) {
    let app = TestApp::start(pool).await;
    app.given_tokens().await;
    let answer = app
        .create_job(&json!({
            "dataset": "ds_missing",
            "colour": "red",
            "seed": "zero",
            "name": "a\0b",
            "labels": {"team\0": "x", "ok": "y"},
            "model": {"preset": "llama-9m", "heads": 4},
            "method": {"type": "relora", "rank": 128, "restart_every_steps": 7},
            "schedule": {"num_steps": 100},
            "batch": {"num_seqs": 2, "sequence_length": 16},
            "resources": {"num_gpus": 9},
        }))
        .await;
    assert_eq!(answer.problem(422).0, "invalid_spec");
    assert_eq!(
        answer.pointers(),
        [
            "/colour",
            "/dataset",
            "/labels/team\0",
            "/method/rank",
            "/method/restart_every_steps",
            "/model/heads",
            "/name",
            "/resources/num_gpus",
            "/seed",
        ]
    );
    assert_eq!(num_queued(&app).await, 0);
}

#[sqlx::test]
async fn a_spec_is_checked_against_its_data(pool: PgPool) {
    let app = TestApp::start(pool).await;
    let (dataset, tokenization) = app.given_tokens().await;
    let with = |pointer: &str, value: Value| {
        let mut spec = spec(&dataset);
        let (parent, key) = pointer.rsplit_once('/').unwrap();
        spec.pointer_mut(parent).unwrap()[key] = value;
        spec
    };

    let too_long = app.create_job(&with("/batch/sequence_length", json!(101))).await;
    assert_eq!(too_long.pointers(), ["/batch/sequence_length"]);
    assert!(too_long.text().contains("validation data, which has 100 tokens"), "{}", too_long.text());
    assert_eq!(app.create_job(&with("/model/vocab_size", json!(299))).await.pointers(), ["/model/vocab_size"]);
    assert_eq!(app.create_job(&with("/tokenization", json!("tz_x"))).await.pointers(), ["/tokenization"]);
    assert_eq!(app.create_job(&with("/dataset", json!(null))).await.pointers(), ["/dataset"]);
    assert_eq!(app.create_job(&with("/dataset", json!(5))).await.pointers(), ["/dataset"]);

    let other = app.given_dataset("other").await;
    assert_eq!(app.create_job(&with("/dataset", json!(other))).await.pointers(), ["/tokenization"]);
    sqlx::query("update tokenizations set state = 'failed'").execute(&app.pool).await.unwrap();
    assert_eq!(app.create_job(&spec(&dataset)).await.pointers(), ["/tokenization"]);
    assert_eq!(app.create_job(&with("/tokenization", json!(tokenization))).await.pointers(), ["/tokenization"]);
    assert_eq!(num_queued(&app).await, 0);
}

#[sqlx::test]
async fn more_gpus_than_a_trainer_can_use_are_refused_and_one_is_waited_for(pool: PgPool) {
    let app = TestApp::start(pool).await;
    let (dataset, _) = app.given_tokens().await;
    let mut spec = spec(&dataset);
    spec["resources"] = json!({"device": "cuda", "num_gpus": 4});
    assert_eq!(app.create_job(&spec).await.pointers(), ["/resources/num_gpus"]);
    spec["resources"]["num_gpus"] = json!(1);
    assert_eq!(app.create_job(&spec).await.json()["wait_reason"], "no_worker");
    insert_worker(&app, 4).await;
    assert_eq!(app.create_job(&spec).await.json()["wait_reason"], "no_fitting_slot");
}

/// A living worker with one GPU or none.
async fn insert_worker_with(app: &TestApp, device: &str, memory_bytes: Option<i64>, bf16_speedup: Option<f64>) {
    sqlx::query(
        "insert into workers (id, name, version, device, num_gpus, memory_bytes, bf16_speedup)
         values (gen_random_uuid()::text, 'w', '0', $1, case when $1 = 'cuda' then 1 else 0 end, $2, $3)",
    )
    .bind(device)
    .bind(memory_bytes)
    .bind(bf16_speedup)
    .execute(&app.pool)
    .await
    .unwrap();
}

#[sqlx::test]
async fn a_model_that_fits_on_no_worker_is_refused_with_what_it_needs(pool: PgPool) {
    let app = TestApp::start(pool).await;
    let (dataset, _) = app.given_tokens().await;
    let mut spec = spec(&dataset);
    spec["model"] = json!({"preset": "llama-1b"});
    assert_eq!(app.create_job(&spec).await.status, 201, "no worker is known");

    insert_worker_with(&app, "cpu", Some(2 << 30), None).await;
    insert_worker_with(&app, "cpu", Some(8 << 30), None).await;
    let refused = app.create_job(&spec).await;
    assert_eq!(refused.problem(422).0, "invalid_spec");
    assert_eq!(refused.pointers(), ["/model"]);
    // 1,209 million parameters of 16 bytes each.
    let largest = "no worker has more than 8.00 GiB of memory: at full rank the run holds 18.0";
    for part in [largest, "by this estimate", "The model does not fit: 8.00 GiB are there, and it needs"] {
        assert!(refused.text().contains(part), "{part}: {}", refused.text());
    }
    spec["model"] = json!({"preset": "llama-9m"});
    assert_eq!(app.create_job(&spec).await.status, 201, "a small one fits");
    spec["batch"]["num_seqs"] = json!(100_000);
    spec["batch"]["micro_batch_seqs"] = json!(100_000);
    let refused = app.create_job(&spec).await;
    assert_eq!(refused.pointers(), ["/batch/micro_batch_seqs"]);
    assert!(refused.text().contains("for which a batch.micro_batch_seqs of"), "{}", refused.text());
    spec["batch"]["micro_batch_seqs"] = json!("auto");
    assert_eq!(app.create_job(&spec).await.status, 201, "as many at once as fit");

    spec["model"] = json!({"preset": "llama-1b"});
    insert_worker_with(&app, "cuda", Some(64 << 30), None).await;
    assert_eq!(app.create_job(&spec).await.status, 201, "it fits on the GPU");
    spec["resources"] = json!({"device": "cpu"});
    assert_eq!(app.create_job(&spec).await.status, 201, "nobody knows how much memory is beside that GPU");
    spec["resources"] = json!({"device": "cuda"});
    sqlx::query("update workers set memory_bytes = 1 where device = 'cuda'").execute(&app.pool).await.unwrap();
    assert_eq!(app.create_job(&spec).await.pointers(), ["/model"]);
    sqlx::query("update workers set last_seen_at = now() - interval '2 minutes' where device = 'cuda'")
        .execute(&app.pool)
        .await
        .unwrap();
    assert_eq!(app.create_job(&spec).await.status, 201, "the only GPU is gone, and another may come");
}

#[sqlx::test]
async fn a_job_that_needs_more_memory_than_there_is_says_that_it_waits_for_it(pool: PgPool) {
    let app = TestApp::start(pool).await;
    let (dataset, _) = app.given_tokens().await;
    let mut spec = spec(&dataset);
    spec["model"] = json!({"preset": "llama-1b"});
    let job = app.create_job(&spec).await.json();
    assert_eq!(job["wait_reason"], "no_worker");
    let reason =
        async || app.get(&format!("/v1/jobs/{}", job["id"].as_str().unwrap())).await.json()["wait_reason"].clone();
    insert_worker_with(&app, "cpu", Some(8 << 30), None).await;
    assert_eq!(reason().await, "not_enough_memory");
    insert_worker_with(&app, "cuda", Some(8 << 30), None).await;
    assert_eq!(reason().await, "not_enough_memory");
    insert_worker_with(&app, "cuda", Some(64 << 30), None).await;
    assert_eq!(reason().await, "no_fitting_slot");
    sqlx::query("update workers set is_draining = true where device = 'cuda'").execute(&app.pool).await.unwrap();
    assert_eq!(reason().await, "not_enough_memory");
    insert_worker_with(&app, "cpu", None, None).await;
    assert_eq!(reason().await, "no_fitting_slot", "it may do");
}

#[sqlx::test]
async fn bf16_that_is_slower_wherever_the_job_may_run_is_warned_of(pool: PgPool) {
    let app = TestApp::start(pool).await;
    let (dataset, _) = app.given_tokens().await;
    let mut spec = spec(&dataset);
    let warns = async |spec: &Value| {
        let job = app.create_job(spec).await.json();
        let warnings = job["warnings"].as_array().unwrap().iter().map(|warning| warning.as_str().unwrap().to_owned());
        warnings.filter(|warning| warning.starts_with("/precision: ")).collect::<Vec<_>>()
    };
    spec["precision"] = json!("bf16");
    assert_eq!(warns(&spec).await, [""; 0], "no worker is known");
    insert_worker_with(&app, "cpu", None, Some(0.25)).await;
    insert_worker_with(&app, "cpu", None, Some(0.5)).await;
    let warnings = warns(&spec).await;
    assert!(warnings.len() == 1 && warnings[0].contains("0.50 times the rate"), "{warnings:?}");
    insert_worker_with(&app, "cuda", None, Some(12.0)).await;
    assert_eq!(warns(&spec).await, [""; 0], "it may run on the GPU");
    spec["precision"] = json!("fp32");
    assert_eq!(warns(&spec).await, [""; 0]);
}

#[sqlx::test]
async fn what_the_trainer_is_left_to_choose_is_shown_once_it_has_chosen(pool: PgPool) {
    let app = TestApp::start(pool).await;
    let (dataset, _) = app.given_tokens().await;
    let mut spec = spec(&dataset);
    let job = app.create_job(&spec).await;
    assert_eq!(job.json()["spec"]["batch"]["micro_batch_seqs"], "auto");
    assert_eq!(job.json()["spec"]["memory"]["merged_weights"], "auto");
    assert_eq!(job.json()["choices"], json!(null));
    let choices = json!({"micro_batch_seqs": 2, "merged_weights": "resident"});
    sqlx::query("update jobs set choices = $1").bind(&choices).execute(&app.pool).await.unwrap();
    let chosen = app.find_job(&job.id()).await.json();
    assert_eq!((&chosen["choices"], &chosen["spec"]), (&choices, &job.json()["spec"]));

    spec["memory"] = json!({"frozen_weights": "int8", "merged_weights": "resident", "offload": true});
    assert_eq!(app.create_job(&spec).await.pointers(), ["/memory/merged_weights", "/memory/offload"]);
}

#[sqlx::test]
async fn a_spec_that_is_no_object_or_no_json_is_refused(pool: PgPool) {
    let app = TestApp::start(pool).await;
    for body in [json!([1]), json!("spec"), json!(null), json!(7)] {
        let answer = app.create_job(&body).await;
        assert_eq!(answer.problem(422).0, "invalid_spec", "{body}");
        assert_eq!(answer.pointers(), [""], "{body}");
    }
    assert_eq!(app.create_job(&json!({})).await.problem(422).0, "invalid_spec");
    let huge = app.request(reqwest::Method::POST, "/v1/jobs").header("content-type", "application/json");
    let answer = crate::app::send(huge.body("{\"seed\": 1e400}")).await;
    assert_eq!(answer.problem(400).0, "malformed_json");
}

#[sqlx::test]
async fn a_queued_job_says_why_it_waits_and_where(pool: PgPool) {
    let app = TestApp::start(pool).await;
    let (dataset, _) = app.given_tokens().await;
    let mut spec = spec(&dataset);
    let first = app.create_job(&spec).await.id();
    let second = app.create_job(&spec).await.id();
    spec["priority"] = json!(5);
    let urgent = app.create_job(&spec).await.id();
    for (id, position) in [(&urgent, 1), (&first, 2), (&second, 3)] {
        assert_eq!(app.find_job(id).await.json()["queue_position"], position);
    }

    sqlx::query("update work_items set eligible_at = now() + interval '1 minute' where kind = 'train'")
        .execute(&app.pool)
        .await
        .unwrap();
    assert_eq!(app.find_job(&first).await.json()["wait_reason"], "backoff");
    sqlx::query("update tokenizations set state = 'running'").execute(&app.pool).await.unwrap();
    assert_eq!(app.find_job(&first).await.json()["wait_reason"], "dataset_not_ready");
    app.set_job_state(&first, "running").await;
    let running = app.find_job(&first).await.json();
    assert_eq!((&running["wait_reason"], &running["queue_position"]), (&json!(null), &json!(null)));
}

#[sqlx::test]
async fn a_running_job_says_how_long_it_will_take(pool: PgPool) {
    let app = TestApp::start(pool).await;
    let id = app.given_job().await;
    app.set_job_state(&id, "running").await;
    sqlx::query(
        "insert into job_progress (job_id, lease_epoch, step, loss, learning_rate, tokens_per_s, num_tokens, num_restarts)
         values ($1, 1, 30, 2.5, 0.001, 64, 3840, 2)",
    )
    .bind(&id)
    .execute(&app.pool)
    .await
    .unwrap();
    let progress = app.find_job(&id).await.json()["progress"].clone();
    assert_eq!(progress["step"], 30);
    assert_eq!(progress["loss"], 2.5);
    assert_eq!(progress["num_restarts"], 2);
    assert_eq!(progress["eta_s"], 20.0, "10 steps of 4 x 32 tokens at 64 per second");
}

#[sqlx::test]
async fn a_queued_job_is_cancelled_at_once(pool: PgPool) {
    let app = TestApp::start(pool).await;
    let id = app.given_job().await;
    let answer = app.cancel_job(&id).await;
    assert_eq!(answer.status, 202, "{answer:?}");
    assert_eq!(answer.json()["state"], "cancelled");
    assert!(answer.json()["finished_at"].is_string());
    let item: String =
        sqlx::query_scalar("select state from work_items where kind = 'train'").fetch_one(&app.pool).await.unwrap();
    assert_eq!(item, "done");

    assert_eq!(app.cancel_job(&id).await.status, 202, "cancelling twice is no mistake");
    let events = app.list_job_events(&id, "").await.json();
    let types: Vec<_> = events["data"].as_array().unwrap().iter().map(|e| e["type"].as_str().unwrap()).collect();
    assert_eq!(types, ["submitted", "cancelled"]);
}

#[sqlx::test]
async fn a_running_job_is_cancelled_through_its_worker(pool: PgPool) {
    let app = TestApp::start(pool).await;
    let id = app.given_job().await;
    app.set_job_state(&id, "running").await;
    for _ in 0..2 {
        let answer = app.cancel_job(&id).await;
        assert_eq!((answer.status.as_u16(), answer.json()["state"].clone()), (202, json!("cancelling")));
    }
    let (state, desired): (String, String) =
        sqlx::query_as("select state, desired from work_items where kind = 'train'")
            .fetch_one(&app.pool)
            .await
            .unwrap();
    assert_eq!((state.as_str(), desired.as_str()), ("leased", "cancel"));
    let events = app.list_job_events(&id, "?after=1").await.json();
    assert_eq!(events["data"].as_array().unwrap().len(), 1);
    assert_eq!(events["data"][0]["type"], "cancel_requested");
}

#[sqlx::test]
async fn a_job_that_ended_is_not_cancelled(pool: PgPool) {
    let app = TestApp::start(pool).await;
    let id = app.given_job().await;
    for state in ["succeeded", "failed"] {
        app.set_job_state(&id, state).await;
        let (code, detail) = app.cancel_job(&id).await.problem(409);
        assert_eq!(code, "job_finished");
        assert!(detail.contains(state), "{detail}");
    }
    assert_eq!(app.find_job(&id).await.json()["failure"]["kind"], "data");
}

#[sqlx::test]
async fn cancellations_that_come_together_make_one_event(pool: PgPool) {
    let app = TestApp::start(pool).await;
    let id = app.given_job().await;
    let answers = futures_util::future::join_all((0..8).map(|_| app.cancel_job(&id))).await;
    assert!(answers.iter().all(|answer| answer.status == 202));
    assert_eq!(app.list_job_events(&id, "").await.json()["data"].as_array().unwrap().len(), 2);
}

#[sqlx::test]
async fn jobs_are_listed_by_state_and_in_pages(pool: PgPool) {
    let app = TestApp::start(pool).await;
    let (dataset, _) = app.given_tokens().await;
    let mut made = Vec::new();
    for _ in 0..3 {
        made.push(app.create_job(&spec(&dataset)).await.id());
    }
    app.cancel_job(&made[1]).await;
    let ids = |page: &Value| -> Vec<String> {
        page["data"].as_array().unwrap().iter().map(|job| job["id"].as_str().unwrap().to_owned()).collect()
    };
    assert_eq!(ids(&app.get("/v1/jobs?state=cancelled").await.json()), [made[1].clone()]);
    let first = app.get("/v1/jobs?limit=2").await.json();
    assert_eq!(ids(&first), [made[2].clone(), made[1].clone()]);
    let rest = app.get(&format!("/v1/jobs?limit=2&cursor={}", first["next_cursor"].as_str().unwrap())).await.json();
    assert_eq!(ids(&rest), [made[0].clone()]);
    assert_eq!(rest["next_cursor"], json!(null));
}

#[sqlx::test]
async fn the_logs_of_all_attempts_come_in_order(pool: PgPool) {
    let app = TestApp::start(pool).await;
    let id = app.given_job().await;
    let path = format!("/v1/jobs/{id}/logs");
    let empty = app.get(&path).await;
    assert_eq!((empty.status.as_u16(), empty.text()), (200, ""));

    insert_worker(&app, 0).await;
    for (lease_epoch, log) in [(1, "first\n"), (2, "second\n")] {
        let key = format!("j/{id}/{lease_epoch}/trainer.log");
        app.store.put_bytes(&Key::from(key.clone()), Bytes::from(log)).await.unwrap();
        sqlx::query(
            "insert into attempts (work_item_id, lease_epoch, worker_id, log_key, log_bytes)
             select work_item_id, $2, 'worker_0', $3, $4 from jobs where id = $1",
        )
        .bind(&id)
        .bind(i64::from(lease_epoch))
        .bind(key)
        .bind(log.len() as i64)
        .execute(&app.pool)
        .await
        .unwrap();
    }
    let logs = app.get(&path).await;
    assert_eq!(logs.text(), "first\nsecond\n");
    assert!(logs.header("content-type").starts_with("text/plain"));
}
