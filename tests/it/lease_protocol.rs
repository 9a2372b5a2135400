//! The lease protocol under every interleaving that chance brings: the functions of `db/` are driven against a real
//! database, beside a model of a dozen lines that says what must come of each.

use std::collections::BTreeMap;

use relora::{
    db::{
        job_commands::{self, Answer, JobCommand},
        leases::{self, Desired, Lease, WriteError},
        recovery,
        training::{self, TrainingEnd},
    },
    domain::{
        ids::{JobId, WorkerId},
        job::{Failure, FailureKind},
        lineage::NodeKind,
    },
};
use sqlx::PgPool;

use crate::queue::{begin, claim, commit, job, node, project, state, step, worker};

const NUM_JOBS: usize = 3;
const NUM_WORKERS: usize = 3;
const NUM_MOVES: usize = 160;

/// xorshift64*: a seed gives the same run everywhere.
struct Chance(u64);

impl Chance {
    fn below(&mut self, bound: usize) -> usize {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        (self.0.wrapping_mul(0x2545_F491_4F6C_DD1D) >> 33) as usize % bound
    }

    fn of<T: Copy>(&mut self, choices: &[T]) -> T {
        choices[self.below(choices.len())]
    }
}

/// What is known of a job without asking the database.
#[derive(Debug, Clone)]
struct Expected {
    state: &'static str,
    lease: Option<Lease>,
    lease_epoch: i64,
    last_step: i64,
}

struct World {
    pool: PgPool,
    chance: Chance,
    workers: Vec<WorkerId>,
    jobs: BTreeMap<String, (JobId, Expected)>,
    /// Every lease that was ever given: most of them are a zombie's.
    leases: Vec<Lease>,
    history: Vec<String>,
}

impl World {
    async fn new(pool: PgPool, seed: u64) -> Self {
        let (mut workers, mut jobs) = (Vec::new(), BTreeMap::new());
        for _ in 0..NUM_WORKERS {
            workers.push(worker(&pool).await);
        }
        for index in 0..NUM_JOBS {
            let name = format!("{seed}-{index}");
            let job = job(&pool, &name, 0).await;
            let expected = Expected { state: "queued", lease: None, lease_epoch: 0, last_step: 0 };
            jobs.insert(format!("w-{name}"), (job, expected));
        }
        // Multiplied, because neighbouring seeds begin alike.
        let chance = Chance(seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1);
        Self { pool, chance, workers, jobs, leases: Vec::new(), history: vec![format!("seed {seed}")] }
    }

    async fn make_a_move(&mut self) {
        match self.chance.below(12) {
            0..3 => self.claim().await,
            3 => self.heartbeat().await,
            4 => self.let_a_lease_expire().await,
            5 => self.requeue().await,
            6 | 7 => self.write().await,
            8 | 9 => self.finish().await,
            _ => self.command().await,
        }
        self.check().await;
    }

    fn note(&mut self, what: String) {
        self.history.push(what);
    }

    /// A lease, more often a current one than a zombie's.
    fn any_lease(&mut self) -> Option<(Lease, bool)> {
        let current: Vec<_> = self.jobs.values().filter_map(|(_, expected)| expected.lease.clone()).collect();
        let leases = if self.chance.below(3) > 0 { &current } else { &self.leases };
        let lease = leases.get(self.chance.below(leases.len().max(1)))?.clone();
        let is_current = current.contains(&lease);
        Some((lease, is_current))
    }

    fn expected(&mut self, lease: &Lease) -> &mut Expected {
        &mut self.jobs.get_mut(lease.work_item.as_str()).unwrap().1
    }

    fn agree<T>(&self, is_current: bool, outcome: &Result<T, WriteError>) {
        match outcome {
            Ok(_) => assert!(is_current, "a zombie wrote: {:#?}", self.history),
            Err(WriteError::LeaseLost) => assert!(!is_current, "a holder was refused: {:#?}", self.history),
            Err(WriteError::Database(error)) => panic!("{error}: {:#?}", self.history),
        }
    }

    async fn claim(&mut self) {
        let index = self.chance.below(NUM_WORKERS);
        sqlx::query("update work_items set eligible_at = now()").execute(&self.pool).await.unwrap();
        let claimed = claim(&self.pool, &self.workers[index]).await;
        self.note(format!("worker {index} claims {claimed:?}"));
        let is_any_queued = self.jobs.values().any(|(_, expected)| expected.state == "queued");
        assert_eq!(claimed.is_some(), is_any_queued, "{:#?}", self.history);
        let Some(lease) = claimed else { return };
        let training = begin(&self.pool, &lease).await;
        let expected = self.expected(&lease);
        assert_eq!((expected.state, &expected.lease), ("queued", &None));
        assert_eq!(lease.lease_epoch, expected.lease_epoch + 1, "an epoch rises by one and never falls");
        let resumed = training.resume.map_or(0, |resume| resume.step);
        assert!(resumed <= expected.last_step);
        *expected = Expected {
            state: "starting",
            lease: Some(lease.clone()),
            lease_epoch: lease.lease_epoch,
            last_step: resumed,
        };
        self.leases.push(lease);
    }

    async fn heartbeat(&mut self) {
        let Some((lease, is_current)) = self.any_lease() else { return };
        let outcome = leases::heartbeat(&self.pool, &lease, 30.0).await;
        self.note(format!("heartbeat {lease:?}: {outcome:?}"));
        self.agree(is_current, &outcome);
        if let Ok(desired) = outcome {
            let told = match self.expected(&lease).state {
                "cancelling" => vec![Desired::Cancel, Desired::Kill],
                "pausing" => vec![Desired::Pause],
                _ => vec![Desired::Run],
            };
            assert!(told.contains(&desired), "{desired:?}: {:#?}", self.history);
        }
    }

    async fn let_a_lease_expire(&mut self) {
        let Some((lease, _)) = self.any_lease() else { return };
        self.note(format!("expires {lease:?}"));
        sqlx::query(
            "update leases set expires_at = now() - interval '1 s' where work_item_id = $1 and lease_epoch = $2",
        )
        .bind(lease.work_item.as_str())
        .bind(lease.lease_epoch)
        .execute(&self.pool)
        .await
        .unwrap();
    }

    async fn requeue(&mut self) {
        let expired: Vec<String> = sqlx::query_scalar("select work_item_id from leases where expires_at < now()")
            .fetch_all(&self.pool)
            .await
            .unwrap();
        let num_expired = recovery::requeue_expired(&self.pool, 0.0).await.unwrap();
        self.note(format!("requeued {expired:?}"));
        assert_eq!(num_expired as usize, expired.len());
        for item in expired {
            let expected = &mut self.jobs.get_mut(&item).unwrap().1;
            expected.state = after_a_loss(expected.state);
            expected.lease = None;
        }
    }

    /// Steps, and half of the time a state.
    async fn write(&mut self) {
        let Some((lease, is_current)) = self.any_lease() else { return };
        let job = self.jobs[lease.work_item.as_str()].0.clone();
        let next = self.expected(&lease).last_step + 1;
        let outcome = match self.chance.below(2) {
            0 => training::append_steps(&self.pool, &lease, &job, &[step(next)]).await,
            _ => commit(&self.pool, &lease, &job, node(NodeKind::State, next)).await,
        };
        self.note(format!("step {next} of {lease:?}: {outcome:?}"));
        self.agree(is_current, &outcome);
        if is_current {
            self.expected(&lease).last_step = next;
        }
    }

    async fn finish(&mut self) {
        let Some((lease, is_current)) = self.any_lease() else { return };
        let failure = |kind| TrainingEnd::Failed(Failure::new(kind, "by chance"));
        let (end, name) = match self.chance.below(7) {
            0 => (TrainingEnd::Succeeded, "succeeded"),
            1 => (TrainingEnd::Cancelled, "cancelled"),
            2 => (TrainingEnd::Paused, "paused"),
            3 => (failure(FailureKind::Diverged), "failed"),
            4 => (failure(FailureKind::Infrastructure), "lost"),
            _ => (TrainingEnd::Released, "lost"),
        };
        let outcome = training::finish(&self.pool, &lease, &end).await;
        self.note(format!("{lease:?} ends with {end:?}: {outcome:?}"));
        self.agree(is_current, &outcome);
        if is_current {
            let expected = self.expected(&lease);
            expected.state = match (name, expected.state) {
                ("succeeded" | "cancelled", _) => name,
                (_, "cancelling") => "cancelled",
                ("lost", state) => after_a_loss(state),
                _ => name,
            };
            expected.lease = None;
        }
    }

    async fn command(&mut self) {
        use JobCommand::{Cancel, Kill, Pause, Resume, Retry};
        let command = self.chance.of(&[Cancel, Kill, Pause, Pause, Resume, Resume, Retry, Retry]);
        let index = self.chance.below(NUM_JOBS);
        let (job, expected) = self.jobs.values_mut().nth(index).unwrap();
        let is_held = expected.lease.is_some();
        let next = match (command, expected.state) {
            (Cancel | Kill, "queued" | "paused") => Some("cancelled"),
            (Cancel | Kill, "starting" | "pausing" | "cancelling") => Some("cancelling"),
            (Cancel | Kill, "cancelled") => Some("cancelled"),
            (Pause, "queued" | "paused") => Some("paused"),
            (Pause, "starting" | "pausing") => Some("pausing"),
            (Resume, "paused") => Some("queued"),
            (Resume, state @ ("queued" | "starting")) => Some(state),
            (Retry, "failed" | "cancelled") => Some("queued"),
            _ => None,
        };
        let answer = job_commands::give(&self.pool, &"p".to_owned().into(), job, command).await.unwrap();
        let told = format!("{command:?} {job} ({}): {answer:?}", expected.state);
        assert_eq!(answer == Answer::Accepted, next.is_some(), "{told}");
        if let Some(next) = next {
            expected.state = next;
            assert_eq!(is_held, ["starting", "pausing", "cancelling"].contains(&next), "{told}");
        }
        self.note(told);
    }

    /// What the database says is what the model says, and holds together.
    async fn check(&self) {
        for (item, (job, expected)) in &self.jobs {
            assert_eq!(state(&self.pool, job).await, expected.state, "{:#?}", self.history);
            let held: Option<i64> = sqlx::query_scalar("select lease_epoch from leases where work_item_id = $1")
                .bind(item)
                .fetch_optional(&self.pool)
                .await
                .unwrap();
            assert_eq!(held, expected.lease.as_ref().map(|lease| lease.lease_epoch), "{:#?}", self.history);
            let (num_open, num_attempts): (i64, i64) = sqlx::query_as(
                "select count(*) filter (where ended_at is null), count(*) from attempts where work_item_id = $1",
            )
            .bind(item)
            .fetch_one(&self.pool)
            .await
            .unwrap();
            assert_eq!(
                (num_open, num_attempts),
                (i64::from(held.is_some()), expected.lease_epoch),
                "{:#?}",
                self.history
            );
        }
    }
}

/// Where a job is once an attempt ended that was not its fault.
fn after_a_loss(state: &str) -> &'static str {
    match state {
        "cancelling" => "cancelled",
        "pausing" => "paused",
        _ => "queued",
    }
}

#[sqlx::test(migrations = "./migrations")]
async fn no_interleaving_lets_two_hold_an_item_or_a_zombie_write(pool: PgPool) {
    project(&pool, "ready").await;
    // Budgets that chance does not spend.
    for seed in 1..=12 {
        let mut world = World::new(pool.clone(), seed).await;
        sqlx::query(r#"update jobs set spec = jsonb_set(spec, '{retries,infrastructure}', '1000')"#)
            .execute(&pool)
            .await
            .unwrap();
        for _ in 0..NUM_MOVES {
            world.make_a_move().await;
        }
        // The jobs of the next seed are alone in the queue.
        sqlx::query("update work_items set state = 'done'").execute(&pool).await.unwrap();
        sqlx::query("delete from leases").execute(&pool).await.unwrap();
    }
}

/// Workers that really run at the same time, some of which go silent, and two that take back what is silent.
#[sqlx::test(migrations = "./migrations")]
async fn jobs_end_exactly_once_however_workers_come_and_go(pool: PgPool) {
    const NUM_JOBS: i64 = 60;
    project(&pool, "ready").await;
    for index in 0..NUM_JOBS {
        job(&pool, &format!("j{index}"), 0).await;
    }
    let mut tasks = tokio::task::JoinSet::new();
    for seed in 1..=6 {
        let pool = pool.clone();
        tasks.spawn(async move {
            let (id, mut chance) = (worker(&pool).await, Chance(u64::wrapping_mul(seed, 0x9E37_79B9_7F4A_7C15)));
            let mut zombies = Vec::new();
            while num_unfinished(&pool).await > 0 {
                let Some(lease) = claim(&pool, &id).await else {
                    tokio::time::sleep(std::time::Duration::from_millis(5)).await;
                    continue;
                };
                let training = begin(&pool, &lease).await;
                if chance.below(3) == 0 {
                    // It goes silent, and its lease runs out.
                    sqlx::query("update leases set expires_at = now() - interval '1 s' where work_item_id = $1 and lease_epoch = $2")
                        .bind(lease.work_item.as_str())
                        .bind(lease.lease_epoch)
                        .execute(&pool)
                        .await
                        .unwrap();
                    zombies.push(lease);
                    continue;
                }
                training::append_steps(&pool, &lease, &training.job, &[step(1)]).await.unwrap();
                commit(&pool, &lease, &training.job, node(NodeKind::State, 1)).await.unwrap();
                training::finish(&pool, &lease, &TrainingEnd::Succeeded).await.unwrap();
                // A zombie wakes up: either it is still the holder, or nothing comes of it.
                if let Some(zombie) = zombies.pop() {
                    let _ = training::finish(&pool, &zombie, &TrainingEnd::Succeeded).await;
                }
            }
        });
    }
    for _ in 0..2 {
        let pool = pool.clone();
        tasks.spawn(async move {
            while num_unfinished(&pool).await > 0 {
                recovery::requeue_expired(&pool, 0.0).await.unwrap();
                sqlx::query("update work_items set eligible_at = now(), infra_failures = 0 where state = 'queued'")
                    .execute(&pool)
                    .await
                    .unwrap();
                tokio::time::sleep(std::time::Duration::from_millis(5)).await;
            }
        });
    }
    // Their owner pauses and resumes them meanwhile.
    for seed in 1..=2 {
        let pool = pool.clone();
        tasks.spawn(async move {
            let mut chance = Chance(u64::wrapping_mul(seed, 0x9E37_79B9_7F4A_7C15));
            while num_unfinished(&pool).await > 0 {
                let job = JobId::from(format!("j{}", chance.below(NUM_JOBS as usize)));
                for command in [JobCommand::Pause, JobCommand::Resume] {
                    job_commands::give(&pool, &"p".to_owned().into(), &job, command).await.unwrap();
                }
                // Nothing stays paused.
                resume_all(&pool).await;
            }
        });
    }
    tasks.join_all().await;
    let succeeded: Vec<(String, i64)> =
        sqlx::query_as("select job_id, count(*) from job_events where type = 'succeeded' group by job_id")
            .fetch_all(&pool)
            .await
            .unwrap();
    assert_eq!(succeeded.len() as i64, NUM_JOBS);
    assert!(succeeded.iter().all(|(_, num_ends)| *num_ends == 1), "{succeeded:?}");
    let open: i64 = sqlx::query_scalar(
        "select (select count(*) from leases) + (select count(*) from attempts where ended_at is null)",
    )
    .fetch_one(&pool)
    .await
    .unwrap();
    assert_eq!(open, 0);
}

async fn resume_all(pool: &PgPool) {
    let paused: Vec<JobId> =
        sqlx::query_scalar("select id from jobs where state = 'paused'").fetch_all(pool).await.unwrap();
    for job in paused {
        job_commands::give(pool, &"p".to_owned().into(), &job, JobCommand::Resume).await.unwrap();
    }
}

async fn num_unfinished(pool: &PgPool) -> i64 {
    sqlx::query_scalar("select count(*) from jobs where finished_at is null").fetch_one(pool).await.unwrap()
}
