//! The queue and its leases, driven through the functions of `db/` against a real database.

use std::collections::BTreeMap;

use relora::{
    db::{
        job_commands::{self, Answer, JobCommand},
        leases::{self, Lease, WorkKind, WriteError},
        nodes::{self, StoredFile},
        recovery,
        training::{self, TrainingEnd},
        workers,
    },
    domain::{
        contract::{Fingerprint, NodeReport, Numerics, StepReport},
        ids::{JobId, WorkerId},
        job::{Failure, FailureKind},
        lineage::NodeKind,
        memory,
        offer::Offer,
        spec::{Choices, DataFacts, Device, MergedPlan, TrainSpecRequest},
    },
};
use serde_json::json;
use sqlx::PgPool;

pub async fn worker(pool: &PgPool) -> WorkerId {
    worker_with(pool, Some(1 << 34)).await
}

async fn worker_with(pool: &PgPool, memory_bytes: Option<i64>) -> WorkerId {
    let id = WorkerId::new();
    let offer = Offer { device: Device::Cpu, num_gpus: 0, memory_bytes, bf16_speedup: Some(0.5) };
    workers::register(pool, &id, "test", &offer, &numerics("cpu")).await.unwrap();
    id
}

fn numerics(device: &str) -> Numerics {
    Numerics {
        device: device.into(),
        cpu_capability: String::new(),
        num_threads: 1,
        libtorch: "2".into(),
        trainer: "0".into(),
    }
}

/// A project with a ready tokenization.
pub async fn project(pool: &PgPool, tokenization_state: &str) {
    let statements = [
        "insert into projects (id, name) values ('p', 'p')".to_owned(),
        "insert into datasets (id, project_id, name) values ('d', 'p', 'd')".to_owned(),
        "insert into work_items (id, project_id, kind, state) values ('wt', 'p', 'ingest', 'done')".to_owned(),
        format!(
            "insert into tokenizations (id, project_id, dataset_id, work_item_id, state, vocab_size, validation_frac,
                train_tokens, valid_tokens)
             values ('t', 'p', 'd', 'wt', '{tokenization_state}', 300, 0.1, 1000, 100)"
        ),
    ];
    for statement in statements {
        sqlx::query(sqlx::AssertSqlSafe(statement)).execute(pool).await.unwrap();
    }
}

pub async fn job(pool: &PgPool, name: &str, priority: i64) -> JobId {
    let (request, _) = TrainSpecRequest::parse(json!({
        "dataset": "d",
        "model": {"preset": "llama-9m"},
        "method": {"type": "full"},
        "schedule": {"num_steps": 100},
        "batch": {"num_seqs": 2, "sequence_length": 16},
    }));
    let facts = DataFacts {
        dataset: "d".to_owned().into(),
        tokenization: "t".to_owned().into(),
        vocab_size: 300,
        max_train_tokens: 1_000,
        max_valid_tokens: 100,
    };
    let (spec, _) = request.normalise(Some(&facts)).unwrap();
    sqlx::query("insert into work_items (id, project_id, kind, priority) values ($1, 'p', 'train', $2)")
        .bind(format!("w-{name}"))
        .bind(priority)
        .execute(pool)
        .await
        .unwrap();
    sqlx::query(
        "insert into jobs (id, project_id, work_item_id, dataset_id, tokenization_id, name, spec)
         values ($1, 'p', $2, 'd', 't', $1, $3)",
    )
    .bind(name)
    .bind(format!("w-{name}"))
    .bind(json!(spec))
    .execute(pool)
    .await
    .unwrap();
    JobId::from(name.to_owned())
}

pub async fn claim(pool: &PgPool, worker: &WorkerId) -> Option<Lease> {
    let mut connection = pool.acquire().await.unwrap();
    leases::claim(&mut connection, worker, WorkKind::Train, Device::Cpu, 0, 30.0).await.unwrap()
}

pub async fn begin(pool: &PgPool, lease: &Lease) -> training::Training {
    let mut connection = pool.acquire().await.unwrap();
    training::begin_attempt(&mut connection, lease).await.unwrap()
}

pub async fn state(pool: &PgPool, job: &JobId) -> String {
    sqlx::query_scalar("select state from jobs where id = $1").bind(job.as_str()).fetch_one(pool).await.unwrap()
}

async fn run_out(pool: &PgPool) {
    leases::expire_all(pool).await.unwrap();
}

pub fn node(kind: NodeKind, step: i64) -> NodeReport {
    NodeReport { kind, step, restart: 0, files: vec![], stall_ms: 0, update_norms: BTreeMap::new() }
}

pub async fn commit(pool: &PgPool, lease: &Lease, job: &JobId, report: NodeReport) -> Result<(), WriteError> {
    let file = StoredFile {
        name: "f".into(),
        object_key: format!("{}-{:?}-{}", lease.lease_epoch, report.kind, report.step),
        size_bytes: 1,
        sha256: "0".repeat(64),
    };
    nodes::commit(pool, lease, &"p".to_owned().into(), job, &report, &[file], 0.0).await
}

pub fn step(step: i64) -> StepReport {
    StepReport {
        step,
        loss: step as f64,
        grad_norm: 1.0,
        learning_rate: 1e-3,
        tokens_per_s: 1.0,
        num_tokens: step,
        num_restarts: 0,
    }
}

#[sqlx::test(migrations = "./migrations")]
async fn work_is_claimed_by_priority_and_then_age_and_only_once(pool: PgPool) {
    project(&pool, "ready").await;
    for (name, priority) in [("first", 0), ("second", 0), ("urgent", 5)] {
        job(&pool, name, priority).await;
    }
    let worker = worker(&pool).await;
    for name in ["w-urgent", "w-first", "w-second"] {
        assert_eq!(claim(&pool, &worker).await.unwrap().work_item.as_str(), name);
    }
    assert_eq!(claim(&pool, &worker).await, None);
}

#[sqlx::test(migrations = "./migrations")]
async fn a_job_waits_for_its_tokens(pool: PgPool) {
    project(&pool, "running").await;
    job(&pool, "j", 0).await;
    let worker = worker(&pool).await;
    assert_eq!(claim(&pool, &worker).await, None);
    sqlx::query("update tokenizations set state = 'ready'").execute(&pool).await.unwrap();
    assert!(claim(&pool, &worker).await.is_some());
}

#[sqlx::test(migrations = "./migrations")]
async fn a_worker_leaves_what_is_too_large_for_it_to_those_with_more_memory(pool: PgPool) {
    project(&pool, "ready").await;
    let (small, unknown) = (worker_with(&pool, Some(99)).await, worker_with(&pool, None).await);
    for name in ["first", "second"] {
        job(&pool, name, 0).await;
        job(&pool, &format!("{name}-small"), 0).await;
    }
    sqlx::query("update work_items set cpu_bytes = 100 where id in ('w-first', 'w-second')")
        .execute(&pool)
        .await
        .unwrap();
    sqlx::query("update work_items set cpu_bytes = 99 where id = 'w-first-small'").execute(&pool).await.unwrap();
    for name in ["w-first-small", "w-second-small"] {
        assert_eq!(claim(&pool, &small).await.unwrap().work_item.as_str(), name);
    }
    assert_eq!(claim(&pool, &small).await, None);
    assert_eq!(claim(&pool, &unknown).await.unwrap().work_item.as_str(), "w-first");
    assert_eq!(claim(&pool, &worker_with(&pool, Some(100)).await).await.unwrap().work_item.as_str(), "w-second");
}

#[sqlx::test(migrations = "./migrations")]
async fn what_a_gpu_needs_counts_on_a_gpu_alone(pool: PgPool) {
    project(&pool, "ready").await;
    for name in ["large", "auto", "cpu"] {
        job(&pool, name, 0).await;
    }
    sqlx::query("update work_items set cpu_bytes = 100, gpu_bytes = 10").execute(&pool).await.unwrap();
    sqlx::query("update work_items set gpu_bytes = 51 where id = 'w-large'").execute(&pool).await.unwrap();
    sqlx::query("update work_items set device = 'cpu', gpu_bytes = 1000 where id = 'w-cpu'")
        .execute(&pool)
        .await
        .unwrap();
    let (cpu, gpu) = (worker_with(&pool, Some(50)).await, worker_with(&pool, Some(50)).await);
    assert_eq!(claim(&pool, &cpu).await, None);
    let mut connection = pool.acquire().await.unwrap();
    for name in [Some("w-auto"), Some("w-cpu"), None] {
        let lease = leases::claim(&mut connection, &gpu, WorkKind::Train, Device::Cuda, 1, 30.0).await.unwrap();
        let claimed = lease.as_ref().map(|lease| lease.work_item.as_str());
        assert_eq!(claimed, name, "of the CPU beside a GPU nothing is known");
    }
}

#[sqlx::test(migrations = "./migrations")]
async fn workers_that_claim_at_once_never_get_the_same_item(pool: PgPool) {
    project(&pool, "ready").await;
    for i in 0..40 {
        job(&pool, &format!("j{i}"), 0).await;
    }
    let mut claims = tokio::task::JoinSet::new();
    for _ in 0..8 {
        let (pool, id) = (pool.clone(), worker(&pool).await);
        claims.spawn(async move {
            let mut taken = Vec::new();
            while let Some(lease) = claim(&pool, &id).await {
                taken.push(lease.work_item);
            }
            taken
        });
    }
    let mut taken = claims.join_all().await.concat();
    taken.sort();
    taken.dedup();
    assert_eq!(taken.len(), 40);
}

#[sqlx::test(migrations = "./migrations")]
async fn an_expired_lease_that_nobody_took_is_renewed(pool: PgPool) {
    project(&pool, "ready").await;
    job(&pool, "j", 0).await;
    let lease = claim(&pool, &worker(&pool).await).await.unwrap();
    run_out(&pool).await;
    leases::heartbeat(&pool, &lease, 30.0).await.unwrap();
    assert_eq!(recovery::requeue_expired(&pool, 0.0).await.unwrap(), 0);
}

#[sqlx::test(migrations = "./migrations")]
async fn a_worker_that_lost_its_lease_can_write_nothing(pool: PgPool) {
    project(&pool, "ready").await;
    let job = job(&pool, "j", 0).await;
    let worker = worker(&pool).await;
    let zombie = claim(&pool, &worker).await.unwrap();
    begin(&pool, &zombie).await;
    run_out(&pool).await;
    assert_eq!(recovery::requeue_expired(&pool, 0.0).await.unwrap(), 1);
    assert_eq!(state(&pool, &job).await, "queued");
    let lease = claim(&pool, &worker).await.unwrap();
    assert_eq!(lease.lease_epoch, zombie.lease_epoch + 1);

    let lost = |outcome: Result<(), WriteError>| assert!(matches!(outcome, Err(WriteError::LeaseLost)));
    lost(leases::heartbeat(&pool, &zombie, 30.0).await.map(|_| ()));
    lost(training::append_steps(&pool, &zombie, &job, &[step(1)]).await);
    lost(commit(&pool, &zombie, &job, node(NodeKind::Checkpoint, 1)).await);
    lost(training::set_log(&pool, &zombie, "k", 1).await);
    lost(training::finish(&pool, &zombie, &TrainingEnd::Succeeded).await);
    let written: i64 = sqlx::query_scalar("select (select count(*) from nodes) + (select count(*) from job_metrics)")
        .fetch_one(&pool)
        .await
        .unwrap();
    assert_eq!(written, 0);

    training::finish(&pool, &lease, &TrainingEnd::Succeeded).await.unwrap();
    assert_eq!(state(&pool, &job).await, "succeeded");
}

#[sqlx::test(migrations = "./migrations")]
async fn another_attempt_goes_on_from_the_last_state_and_supersedes_what_came_after(pool: PgPool) {
    project(&pool, "ready").await;
    let job = job(&pool, "j", 0).await;
    let worker = worker(&pool).await;
    let first = claim(&pool, &worker).await.unwrap();
    assert!(begin(&pool, &first).await.resume.is_none());
    commit(&pool, &first, &job, node(NodeKind::Base, 0)).await.unwrap();
    commit(&pool, &first, &job, node(NodeKind::Checkpoint, 10)).await.unwrap();
    commit(&pool, &first, &job, node(NodeKind::State, 10)).await.unwrap();
    commit(&pool, &first, &job, node(NodeKind::Checkpoint, 20)).await.unwrap();
    training::append_steps(&pool, &first, &job, &(1..=25).map(step).collect::<Vec<_>>()).await.unwrap();
    run_out(&pool).await;
    recovery::requeue_expired(&pool, 0.0).await.unwrap();

    let second = claim(&pool, &worker).await.unwrap();
    let resume = begin(&pool, &second).await.resume.unwrap();

    assert_eq!(resume.step, 10);
    let superseded: Vec<i64> =
        sqlx::query_scalar("select step from nodes where superseded order by step").fetch_all(&pool).await.unwrap();
    assert_eq!(superseded, [20]);
    commit(&pool, &second, &job, node(NodeKind::Checkpoint, 20)).await.unwrap();
    let parents: Vec<Option<String>> =
        sqlx::query_scalar("select parent_id from nodes where kind = 'checkpoint'").fetch_all(&pool).await.unwrap();
    assert!(parents.iter().all(Option::is_some), "every checkpoint descends from the base");
}

#[sqlx::test(migrations = "./migrations")]
async fn what_the_first_attempt_chose_holds_for_all_that_follow(pool: PgPool) {
    project(&pool, "ready").await;
    let job = job(&pool, "j", 0).await;
    let worker = worker(&pool).await;
    let chosen = |micro_batch_seqs| Choices { micro_batch_seqs, merged_weights: MergedPlan::Scratch };
    for (attempt, micro_batch_seqs) in [2, 1].into_iter().enumerate() {
        let lease = claim(&pool, &worker).await.unwrap();
        let training = begin(&pool, &lease).await;
        let earlier = (attempt > 0).then(|| chosen(2));
        assert_eq!(training.choices, earlier);
        assert_eq!(training.settled_spec().choices(), earlier);
        assert_eq!(training.spec.choices(), None, "the spec stays as it was submitted");
        let fingerprint = Fingerprint { numerics: numerics("cpu"), micro_batch_seqs };
        training::mark_running(&pool, &lease, &job, &fingerprint, &chosen(micro_batch_seqs)).await.unwrap();
        training::finish(&pool, &lease, &TrainingEnd::Released).await.unwrap();
    }
    let lease = claim(&pool, &worker).await.unwrap();
    let training = begin(&pool, &lease).await;
    assert_eq!(training.choices, Some(chosen(2)));
    let needs = async || {
        sqlx::query_scalar::<_, Option<i64>>("select cpu_bytes from work_items where kind = 'train'")
            .fetch_one(&pool)
            .await
            .unwrap()
    };
    assert_eq!(needs().await, Some(memory::needed_bytes(&training.settled_spec(), 0, Device::Cpu)));

    let retry = async |lease: &Lease| {
        let failure = Failure::new(FailureKind::OutOfMemory, "too large");
        training::finish(&pool, lease, &TrainingEnd::Failed(failure)).await.unwrap();
        let answer = job_commands::give(&pool, &"p".to_owned().into(), &job, JobCommand::Retry).await.unwrap();
        assert_eq!(answer, Answer::Accepted);
    };
    sqlx::query("update work_items set cpu_bytes = null").execute(&pool).await.unwrap();
    commit(&pool, &lease, &job, node(NodeKind::State, 10)).await.unwrap();
    assert_eq!(needs().await, Some(memory::needed_bytes(&training.settled_spec(), 10, Device::Cpu)));
    retry(&lease).await;
    let lease = claim(&pool, &worker).await.unwrap();
    assert_eq!(begin(&pool, &lease).await.choices, Some(chosen(2)), "it goes on from a state");
    sqlx::query("delete from nodes").execute(&pool).await.unwrap();
    retry(&lease).await;
    assert_eq!(needs().await, Some(memory::needed_bytes(&training.spec, 0, Device::Cpu)));
    let lease = claim(&pool, &worker).await.unwrap();
    assert_eq!(begin(&pool, &lease).await.choices, None, "it begins anew");
}

#[sqlx::test(migrations = "./migrations")]
async fn infrastructure_failures_are_tried_again_until_the_budget_is_spent(pool: PgPool) {
    project(&pool, "ready").await;
    let job = job(&pool, "j", 0).await;
    let worker = worker(&pool).await;
    for attempt in 0..6 {
        assert_eq!(state(&pool, &job).await, "queued", "before attempt {attempt}");
        sqlx::query("update work_items set eligible_at = now()").execute(&pool).await.unwrap();
        let lease = claim(&pool, &worker).await.unwrap();
        begin(&pool, &lease).await;
        let failure = Failure::new(FailureKind::Infrastructure, "killed");
        training::finish(&pool, &lease, &TrainingEnd::Failed(failure)).await.unwrap();
    }
    assert_eq!(state(&pool, &job).await, "failed");
}

#[sqlx::test(migrations = "./migrations")]
async fn a_users_mistake_is_not_tried_again(pool: PgPool) {
    project(&pool, "ready").await;
    let job = job(&pool, "j", 0).await;
    let lease = claim(&pool, &worker(&pool).await).await.unwrap();
    begin(&pool, &lease).await;
    let failure = Failure::new(FailureKind::Diverged, "the loss is not a number");
    training::finish(&pool, &lease, &TrainingEnd::Failed(failure)).await.unwrap();
    assert_eq!(state(&pool, &job).await, "failed");
}

#[sqlx::test(migrations = "./migrations")]
async fn only_the_newest_states_are_kept_and_shared_objects_outlive_them(pool: PgPool) {
    project(&pool, "ready").await;
    let job = job(&pool, "j", 0).await;
    let lease = claim(&pool, &worker(&pool).await).await.unwrap();
    begin(&pool, &lease).await;
    for step in [10, 20, 30, 40] {
        let file = |name: &str, key: String| StoredFile {
            name: name.into(),
            object_key: key,
            size_bytes: 1,
            sha256: "0".repeat(64),
        };
        let files = [file("state", format!("state-{step}")), file("frozen", "frozen".into())];
        let report = node(NodeKind::State, step);
        nodes::commit(&pool, &lease, &"p".to_owned().into(), &job, &report, &files, 0.0).await.unwrap();
    }
    let mut unnamed = nodes::drop_old_states(&pool, &lease, &job, 2).await.unwrap();
    unnamed.sort();
    assert_eq!(unnamed, ["state-10", "state-20"]);
    let queued: Vec<String> =
        sqlx::query_scalar("select object_key from deleted_objects order by 1").fetch_all(&pool).await.unwrap();
    assert_eq!(queued, unnamed, "a worker that is killed before it deletes them leaves them to the collector");
}
