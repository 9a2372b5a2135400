//! Restarts that are verified and materialized: the API, the queue, and a worker whose trainer is a stand-in. What the
//! real trainer computes is tested with it.

use std::{os::unix::fs::PermissionsExt, path::Path, time::Duration};

use bytes::Bytes;
use relora::{
    config::AgentConfig,
    db::{
        leases::{self, Lease, WorkKind, WriteError},
        recovery,
        upkeep::{self, Task},
        workers,
    },
    domain::{
        ids::{NodeId, WorkerId},
        job::{Failure, FailureKind},
        lineage::{self, NodeKind},
        offer::Offer,
        spec::Device,
    },
    shutdown::Shutdown,
    storage::Key,
    worker,
};
use reqwest::Method;
use serde_json::{Value, json};
use sqlx::PgPool;
use tempfile::TempDir;

use crate::app::{Answer, TestApp, send};

/// A job with a base and two restarts, after updates 10, 20 and 30.
struct Chain {
    job: String,
    base: String,
    first: String,
    second: String,
}

async fn given_chain(app: &TestApp) -> Chain {
    let job = app.given_job().await;
    app.set_job_state(&job, "succeeded").await;
    let base = insert_node(app, &job, "base", 10, 0, None).await;
    let first = insert_node(app, &job, "restart", 20, 1, Some(&base)).await;
    let second = insert_node(app, &job, "restart", 30, 2, Some(&first)).await;
    Chain { job, base, first, second }
}

/// A node with files in the store, the manifest last.
async fn insert_node(app: &TestApp, job: &str, kind: &str, step: i64, restart: i64, parent: Option<&str>) -> String {
    let id = NodeId::new().to_string();
    sqlx::query(
        "insert into nodes (id, project_id, job_id, parent_id, kind, lease_epoch, step, restart)
         values ($1, $2, $3, $4, $5, 1, $6, $7)",
    )
    .bind(&id)
    .bind(app.project().await)
    .bind(job)
    .bind(parent)
    .bind(kind)
    .bind(step)
    .bind(restart)
    .execute(&app.pool)
    .await
    .unwrap();
    let (names, node_kind) = match kind {
        "restart" => (&["adapter_config.json", "adapter_model.safetensors"][..], NodeKind::Restart),
        "base" => (&["config.json", "model.safetensors", "tokenizer.json"][..], NodeKind::Base),
        _ => (&["config.json", "model.safetensors"][..], NodeKind::Checkpoint),
    };
    let mut facts = Vec::new();
    for name in names {
        let content = format!("{kind} {restart}: {name};");
        let (size_bytes, sha256) = insert_file(app, &id, name, content.into()).await;
        facts.push((*name, size_bytes, sha256));
    }
    let facts = facts.iter().map(|(name, size_bytes, sha256)| (*name, *size_bytes, sha256.as_str()));
    let manifest = lineage::manifest(node_kind, step, restart, facts);
    insert_file(app, &id, "manifest.json", manifest.to_string().into()).await;
    id
}

async fn insert_file(app: &TestApp, node: &str, name: &str, content: Bytes) -> (i64, String) {
    let stored = app.store.put_bytes(&key(node, name), content).await.unwrap();
    sqlx::query("insert into node_files (node_id, name, object_key, size_bytes, sha256) values ($1, $2, $3, $4, $5)")
        .bind(node)
        .bind(name)
        .bind(key(node, name).as_str())
        .bind(stored.bytes as i64)
        .bind(&stored.sha256)
        .execute(&app.pool)
        .await
        .unwrap();
    (stored.bytes as i64, stored.sha256)
}

fn key(node: &str, name: &str) -> Key {
    Key::from(format!("n/{node}/{name}"))
}

async fn ask(app: &TestApp, restart: &str, verb: &str) -> Answer {
    send(app.request(Method::POST, &format!("/v1/restarts/{restart}/{verb}"))).await
}

/// The identifier of a task that is to be done, or is at work already where there is a worker.
async fn given_task(app: &TestApp, restart: &str, verb: &str) -> String {
    let answer = ask(app, restart, verb).await;
    assert_eq!(answer.status, 202, "{answer:?}");
    let state = answer.json()["state"].clone();
    assert!(state == "queued" || state == "running", "{answer:?}");
    answer.id()
}

async fn find(app: &TestApp, task: &str) -> Value {
    app.get(&format!("/v1/lineage-tasks/{task}")).await.json()
}

fn ids(answer: &Answer) -> Vec<String> {
    answer.json()["data"].as_array().unwrap().iter().map(|task| task["id"].as_str().unwrap().to_owned()).collect()
}

#[sqlx::test]
async fn who_asks_for_what_is_being_done_gets_the_task_that_does_it(pool: PgPool) {
    let app = TestApp::start(pool).await;
    let chain = given_chain(&app).await;

    let (first, second) = tokio::join!(ask(&app, &chain.first, "materialize"), ask(&app, &chain.first, "materialize"));

    let task = first.json();
    assert_eq!((first.status.as_u16(), second.status.as_u16(), first.id()), (202, 202, second.id()));
    assert_eq!((&task["kind"], &task["state"]), (&json!("materialize"), &json!("queued")));
    assert_eq!((&task["restart"], &task["job"]), (&json!(chain.first), &json!(chain.job)));
    for field in ["checkpoint", "verification", "failure", "finished_at"] {
        assert_eq!(task[field], Value::Null, "{field}");
    }
    assert_eq!(find(&app, &first.id()).await, task);
    let verify = given_task(&app, &chain.first, "verify").await;
    let other = given_task(&app, &chain.second, "materialize").await;
    let kinds: Vec<String> = sqlx::query_scalar(
        "select kind from work_items where state = 'queued' and kind in ('verify', 'materialize') order by id",
    )
    .fetch_all(&app.pool)
    .await
    .unwrap();
    assert_eq!(kinds, ["materialize", "verify", "materialize"]);
    let of_first = app.get(&format!("/v1/lineage-tasks?restart={}", chain.first)).await;
    assert_eq!(ids(&of_first), [verify.clone(), first.id()]);
    let page = app.get(&format!("/v1/lineage-tasks?job={}&limit=2", chain.job)).await;
    assert_eq!(ids(&page), [other, verify]);
    let cursor = page.json()["next_cursor"].as_str().unwrap().to_owned();
    assert_eq!(ids(&app.get(&format!("/v1/lineage-tasks?cursor={cursor}")).await), [first.id()]);
}

#[sqlx::test]
async fn a_restart_that_is_not_there_or_is_superseded_has_no_tasks(pool: PgPool) {
    let app = TestApp::start(pool).await;
    let chain = given_chain(&app).await;
    let task = given_task(&app, &chain.first, "verify").await;
    let reader = app.insert_key("proj_reader", &["read"]).await;
    let stranger = app.insert_key("proj_other", &["read", "write"]).await;
    for verb in ["materialize", "verify"] {
        assert_eq!(ask(&app, "node_x", verb).await.problem(404).0, "not_found");
        assert_eq!(ask(&app, &chain.base, verb).await.problem(404).0, "not_found", "of another kind");
        let path = format!("/v1/restarts/{}/{verb}", chain.first);
        let forbidden = send(app.anonymous(Method::POST, &path).bearer_auth(&reader)).await;
        assert_eq!(forbidden.problem(403).0, "missing_scope");
        let foreign = send(app.anonymous(Method::POST, &path).bearer_auth(&stranger)).await;
        assert_eq!(foreign.problem(404).0, "not_found");
        let path = format!("/v1/lineage-tasks/{task}");
        assert_eq!(send(app.anonymous(Method::GET, &path).bearer_auth(&stranger)).await.problem(404).0, "not_found");
        let list = send(app.anonymous(Method::GET, "/v1/lineage-tasks").bearer_auth(&stranger)).await;
        assert_eq!(ids(&list), [""; 0]);
    }
    sqlx::query("update nodes set superseded = true where id = $1")
        .bind(&chain.second)
        .execute(&app.pool)
        .await
        .unwrap();
    for verb in ["materialize", "verify"] {
        assert_eq!(ask(&app, &chain.second, verb).await.problem(409).0, "superseded");
    }
    sqlx::query("update nodes set deleted_at = now() where id = $1")
        .bind(&chain.second)
        .execute(&app.pool)
        .await
        .unwrap();
    for verb in ["materialize", "verify"] {
        assert_eq!(ask(&app, &chain.second, verb).await.problem(410).0, "deleted");
    }
}

#[sqlx::test]
async fn a_lineage_stays_while_a_task_works_on_it(pool: PgPool) {
    let app = TestApp::start(pool).await;
    let chain = given_chain(&app).await;
    let task = given_task(&app, &chain.first, "verify").await;
    let path = format!("/v1/jobs/{}/lineage", chain.job);

    let (code, detail) = send(app.request(Method::DELETE, &path)).await.problem(409);

    assert_eq!(code, "in_use", "{detail}");
    assert!(detail.contains(&format!("{task} works on {}", chain.first)), "{detail}");
    let lease = claim(&app, WorkKind::Verify).await;
    begin(&app, &lease).await;
    upkeep::fail(&app.pool, &lease, &Failure::new(FailureKind::Data, "m")).await.unwrap();
    let deleted = send(app.request(Method::DELETE, &path)).await;
    assert_eq!((deleted.status.as_u16(), &deleted.json()["num_deleted"]), (200, &json!(3)));
}

#[sqlx::test]
async fn a_checkpoint_that_is_there_is_not_made_again(pool: PgPool) {
    let app = TestApp::start(pool).await;
    let chain = given_chain(&app).await;
    let later = insert_node(&app, &chain.job, "checkpoint", 25, 1, Some(&chain.first)).await;
    let merged = insert_node(&app, &chain.job, "checkpoint", 20, 1, Some(&chain.first)).await;

    let task = ask(&app, &chain.first, "materialize").await.json();

    assert_eq!((&task["state"], &task["checkpoint"]), (&json!("succeeded"), &json!(merged)), "not {later}");
    assert!(task["finished_at"].is_string());
    assert_eq!(ask(&app, &chain.first, "materialize").await.json(), task);
    let queued: i64 = sqlx::query_scalar("select count(*) from work_items where kind = 'materialize'")
        .fetch_one(&app.pool)
        .await
        .unwrap();
    assert_eq!(queued, 0);

    // It is made once the other one's files are gone.
    sqlx::query("update nodes set deleted_at = now() where id = $1").bind(&merged).execute(&app.pool).await.unwrap();
    given_task(&app, &chain.first, "materialize").await;
}

/// What a worker computes with.
fn numerics() -> Value {
    json!({"device": "cpu", "cpu_capability": "", "num_threads": 1, "libtorch": "2", "trainer": "0"})
}

async fn claim(app: &TestApp, kind: WorkKind) -> Lease {
    let id = WorkerId::new();
    let offer = Offer { device: Device::Cpu, num_gpus: 0, memory_bytes: None, bf16_speedup: None };
    let numerics = serde_json::from_value(numerics()).unwrap();
    workers::register(&app.pool, &id, "test", &offer, &numerics).await.unwrap();
    let mut connection = app.pool.acquire().await.unwrap();
    leases::claim(&mut connection, &id, kind, Device::Cpu, 0, 30.0).await.unwrap().expect("something is queued")
}

async fn begin(app: &TestApp, lease: &Lease) -> Task {
    let mut connection = app.pool.acquire().await.unwrap();
    upkeep::begin_attempt(&mut connection, lease).await.unwrap()
}

#[sqlx::test]
async fn a_worker_that_lost_its_lease_makes_no_checkpoint(pool: PgPool) {
    let app = TestApp::start(pool).await;
    let chain = given_chain(&app).await;
    let id = given_task(&app, &chain.second, "materialize").await;
    let zombie = claim(&app, WorkKind::Materialize).await;
    let task = begin(&app, &zombie).await;
    assert_eq!(find(&app, &id).await["state"], "running");
    assert_eq!(
        task.chain.iter().map(|node| node.id.as_str()).collect::<Vec<_>>(),
        [&chain.base, &chain.first, &chain.second]
    );
    assert_eq!((task.step, task.number), (30, 2));

    leases::expire_all(&app.pool).await.unwrap();
    assert_eq!(recovery::requeue_expired(&app.pool, 0.0).await.unwrap(), 1);

    assert_eq!(find(&app, &id).await["state"], "queued");
    let lost = upkeep::complete_materialize(&app.pool, &zombie, &task, &[]).await;
    assert!(matches!(lost, Err(WriteError::LeaseLost)));
    let lost = upkeep::fail(&app.pool, &zombie, &Failure::new(FailureKind::Data, "m")).await;
    assert!(matches!(lost, Err(WriteError::LeaseLost)));
    let checkpoints: i64 =
        sqlx::query_scalar("select count(*) from nodes where materialized").fetch_one(&app.pool).await.unwrap();
    assert_eq!(checkpoints, 0);
}

#[sqlx::test]
async fn a_task_is_tried_again_until_the_budget_is_spent(pool: PgPool) {
    let app = TestApp::start(pool).await;
    let chain = given_chain(&app).await;
    let id = given_task(&app, &chain.first, "verify").await;
    for attempt in 0..6 {
        assert_eq!(find(&app, &id).await["state"], "queued", "before attempt {attempt}");
        sqlx::query("update work_items set eligible_at = now()").execute(&app.pool).await.unwrap();
        let lease = claim(&app, WorkKind::Verify).await;
        begin(&app, &lease).await;
        upkeep::fail(&app.pool, &lease, &Failure::new(FailureKind::Infrastructure, "killed")).await.unwrap();
    }
    let task = find(&app, &id).await;
    assert_eq!((&task["state"], &task["failure"]["kind"]), (&json!("failed"), &json!("infrastructure")));
    assert!(task["finished_at"].is_string());
    assert_ne!(given_task(&app, &chain.first, "verify").await, id, "whoever asks again gets another try");
}

/// A worker whose trainer joins files in the place of adding tensors. It ends with the value.
struct Worker {
    shutdown: Shutdown,
    folder: TempDir,
}

impl Worker {
    /// `rebuild` is what the stand-in does when it is asked to rebuild, in the language of the shell.
    fn start(app: &TestApp, rebuild: &str) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let trainer = folder.path().join("trainer");
        let probe = json!({
            "device": "cpu", "num_gpus": 0, "memory_bytes": null, "bf16_speedup": null, "gpu_problem": null,
            "numerics": numerics(),
        });
        let script = format!("#!/bin/sh\nset -eu\nif [ \"$1\" = --probe ]; then echo '{probe}'; exit; fi\n{rebuild}\n");
        write_executable(&trainer, &script);
        let config = AgentConfig {
            name: "test".into(),
            work_dir: folder.path().join("work"),
            trainer,
            trainer_threads: 1,
            lease_s: 30,
            stop_grace_s: 1,
            max_outage_s: 60,
            visible_gpus: None,
            max_local_bytes: None,
            checkpoint_lag_s: 60,
        };
        let shutdown = Shutdown::new();
        tokio::spawn(worker::run(config, app.pool.clone(), app.store.clone(), shutdown.clone()));
        Self { shutdown, folder }
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        self.shutdown.trigger();
    }
}

fn write_executable(path: &Path, content: &str) {
    // A file that is open for writing, also in a process that was forked meanwhile, cannot be executed.
    let unfinished = path.with_extension("tmp");
    std::fs::write(&unfinished, content).unwrap();
    std::fs::set_permissions(&unfinished, std::fs::Permissions::from_mode(0o755)).unwrap();
    std::fs::rename(unfinished, path).unwrap();
}

/// Joins the weights of its base and its deltas, keeps what it was asked, and says that a kind differs by 3e-9.
const JOIN: &str = r#"
echo "$@" > "$(dirname "$0")/asked"
shift; base=$1; shift
weights=$(cat "$base/model.safetensors"); out=; compare=
while [ $# -gt 0 ]; do case "$1" in
    --threads) shift 2;;
    --out) out=$2; shift 2;;
    --compare) compare=$2; shift 2;;
    *) weights="$weights$(cat "$1/adapter_model.safetensors")"; shift;;
esac; done
if [ -n "$out" ]; then
    mkdir "$out"; printf %s "$weights" > "$out/model.safetensors"; cp "$base/config.json" "$base/tokenizer.json" "$out"
fi
[ -z "$compare" ] || test -e "$compare/model.safetensors"
echo '{"outcome":"done","differences":'"$([ -n "$compare" ] && echo '{"q_proj":{"max_abs":1e-9,"max_rel":3e-9}}' || echo '{}')"'}'
"#;

async fn wait_for_end(app: &TestApp, task: &str) -> Value {
    for _ in 0..600 {
        let found = find(app, task).await;
        if ["succeeded", "failed"].iter().any(|state| found["state"] == **state) {
            return found;
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    panic!("the task has no end: {}", find(app, task).await);
}

#[sqlx::test]
async fn a_materialized_restart_is_a_checkpoint_like_every_other(pool: PgPool) {
    let app = TestApp::start(pool).await;
    let chain = given_chain(&app).await;
    let _worker = Worker::start(&app, JOIN);

    let task = wait_for_end(&app, &given_task(&app, &chain.second, "materialize").await).await;

    assert_eq!(task["state"], "succeeded", "{task}");
    let id = task["checkpoint"].as_str().unwrap();
    let node = app.get(&format!("/v1/checkpoints/{id}")).await.json();
    assert_eq!((&node["job"], &node["parent"]), (&json!(chain.job), &json!(chain.second)));
    assert_eq!((&node["step"], &node["restart"]), (&json!(30), &json!(2)));
    assert_eq!((&node["materialized"], &node["lease_epoch"]), (&json!(true), &Value::Null));
    assert_eq!((&node["superseded"], &node["name"]), (&json!(false), &Value::Null));
    let names: Vec<_> = node["files"].as_array().unwrap().iter().map(|file| file["name"].clone()).collect();
    assert_eq!(names, ["config.json", "manifest.json", "model.safetensors", "tokenizer.json"]);
    let download = async |name: &str| app.get(&format!("/v1/checkpoints/{id}/files/{name}")).await;
    let weights =
        "base 0: model.safetensors;restart 1: adapter_model.safetensors;restart 2: adapter_model.safetensors;";
    assert_eq!(download("model.safetensors").await.text(), weights);
    let manifest = download("manifest.json").await.json();
    assert_eq!(
        (&manifest["kind"], &manifest["step"], &manifest["restart"]),
        (&json!("checkpoint"), &json!(30), &json!(2))
    );
    for file in manifest["files"].as_array().unwrap() {
        let mut listed = file.clone();
        listed["url"] = json!(format!("/v1/checkpoints/{id}/files/{}", file["name"].as_str().unwrap()));
        assert!(node["files"].as_array().unwrap().contains(&listed), "{listed}");
    }
    assert_eq!(ids(&app.get(&format!("/v1/checkpoints?job={}", chain.job)).await), [id]);

    assert_eq!(ask(&app, &chain.second, "materialize").await.json(), task, "there is nothing left to do");
    let body = json!({"dataset": app.given_dataset("text").await, "tokenizer_checkpoint": id});
    let pointers = app.create_tokenization(&body).await.pointers();
    assert_eq!(
        pointers,
        ["/tokenizer_checkpoint"],
        "it is found, and its stand-in of a tokenizer names no end of text"
    );
}

#[sqlx::test]
async fn a_restart_is_compared_with_the_checkpoint_at_its_step(pool: PgPool) {
    let app = TestApp::start(pool).await;
    let chain = given_chain(&app).await;
    let worker = Worker::start(&app, JOIN);

    let alone = wait_for_end(&app, &given_task(&app, &chain.second, "verify").await).await["verification"].clone();

    assert_eq!((&alone["is_sound"], &alone["is_within_tolerance"]), (&json!(true), &Value::Null), "{alone}");
    assert_eq!((&alone["compared_with"], &alone["differences"]), (&Value::Null, &json!({})));
    assert!(alone["message"].as_str().unwrap().contains("no checkpoint"), "{alone}");
    assert_eq!(alone["files"].as_array().unwrap().len(), 4 + 3 + 3);

    let merged = insert_node(&app, &chain.job, "checkpoint", 30, 2, Some(&chain.second)).await;
    let compared = wait_for_end(&app, &given_task(&app, &chain.second, "verify").await).await["verification"].clone();

    assert_eq!((&compared["is_sound"], &compared["is_within_tolerance"]), (&json!(true), &json!(true)), "{compared}");
    assert_eq!(compared["compared_with"], json!(merged));
    assert_eq!(compared["differences"], json!({"q_proj": {"max_abs": 1e-9, "max_rel": 3e-9}}));
    assert_eq!(compared["files"].as_array().unwrap().len(), 4 + 3 + 3 + 3);
    assert!(compared["files"].as_array().unwrap().iter().all(|file| file["problem"].is_null()));
    let asked = std::fs::read_to_string(worker.folder.path().join("asked")).unwrap();
    let nodes: Vec<_> = asked.split_whitespace().filter_map(|word| word.rsplit('/').next()).collect();
    let expected = ["--rebuild", &chain.base, &chain.first, &chain.second, "--threads", "1", "--compare", &merged];
    assert_eq!(nodes, expected);
    let checkpoints: i64 =
        sqlx::query_scalar("select count(*) from nodes where materialized").fetch_one(&app.pool).await.unwrap();
    assert_eq!(checkpoints, 0, "a check makes nothing");
}

#[sqlx::test]
async fn a_damaged_or_missing_file_is_found_and_named(pool: PgPool) {
    let app = TestApp::start(pool).await;
    let chain = given_chain(&app).await;
    let _worker = Worker::start(&app, JOIN);
    app.store.put_bytes(&key(&chain.base, "model.safetensors"), "damaged".into()).await.unwrap();
    app.store.delete(&[key(&chain.first, "adapter_config.json")]).await.unwrap();
    sqlx::query("update node_files set sha256 = $2 where node_id = $1 and name = 'adapter_config.json'")
        .bind(&chain.second)
        .bind("0".repeat(64))
        .execute(&app.pool)
        .await
        .unwrap();

    let task = wait_for_end(&app, &given_task(&app, &chain.second, "verify").await).await;

    let verification = &task["verification"];
    assert_eq!((&task["state"], &verification["is_sound"]), (&json!("succeeded"), &json!(false)), "{task}");
    let files = verification["files"].as_array().unwrap().iter().filter(|file| !file["problem"].is_null());
    let found: Vec<_> = files.map(|file| (file["node"].as_str().unwrap(), file["name"].as_str().unwrap())).collect();
    let expected = [
        (&chain.base, "model.safetensors"),
        (&chain.first, "adapter_config.json"),
        (&chain.second, "adapter_config.json"),
        (&chain.second, "manifest.json"),
    ];
    assert_eq!(found, expected.map(|(node, name)| (node.as_str(), name)));

    let task = wait_for_end(&app, &given_task(&app, &chain.first, "materialize").await).await;
    assert_eq!((&task["state"], &task["failure"]["kind"]), (&json!("failed"), &json!("data")), "{task}");
    assert_eq!(task["failure"]["retryable"], false);
    assert!(task["failure"]["message"].as_str().unwrap().contains("damaged"), "{task}");
}

#[sqlx::test]
async fn what_the_trainer_refuses_fails_a_materialization_and_is_what_a_check_finds(pool: PgPool) {
    let app = TestApp::start(pool).await;
    let chain = given_chain(&app).await;
    let refuse =
        "echo why >&2; echo '{\"outcome\":\"failed\",\"kind\":\"data\",\"message\":\"q_proj is missing\"}'; exit 1";
    let _worker = Worker::start(&app, refuse);

    let materialize = wait_for_end(&app, &given_task(&app, &chain.first, "materialize").await).await;
    let verify = wait_for_end(&app, &given_task(&app, &chain.first, "verify").await).await;

    let failure = json!({"kind": "data", "message": "q_proj is missing", "retryable": false, "log_tail": "why"});
    assert_eq!((&materialize["state"], &materialize["failure"]), (&json!("failed"), &failure));
    assert_eq!((&verify["state"], &verify["verification"]["is_sound"]), (&json!("succeeded"), &json!(false)));
    assert!(verify["verification"]["message"].as_str().unwrap().contains("q_proj is missing"), "{verify}");
}

#[sqlx::test]
async fn a_lineage_without_its_base_is_refused(pool: PgPool) {
    let app = TestApp::start(pool).await;
    let chain = given_chain(&app).await;
    let _worker = Worker::start(&app, JOIN);
    sqlx::query("update nodes set parent_id = null where id = $1").bind(&chain.first).execute(&app.pool).await.unwrap();

    let task = wait_for_end(&app, &given_task(&app, &chain.second, "materialize").await).await;

    assert_eq!((&task["state"], &task["failure"]["kind"]), (&json!("failed"), &json!("data")));
    assert!(task["failure"]["message"].as_str().unwrap().contains("not whole"), "{task}");
}
