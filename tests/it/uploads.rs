//! How a worker stores what its trainer has finished, also while the store is away.

use std::{
    collections::{BTreeMap, HashMap},
    path::PathBuf,
    time::Duration,
};

use relora::{
    db::{
        leases::{self, Lease, WorkKind},
        training,
    },
    domain::{
        contract::{NodeFile, NodeReport},
        ids::JobId,
        lineage::{NodeKind, frozen_path},
        spec::Device,
    },
    embedded::S3,
    storage::Store,
    worker::uploader::{FinishedNode, Uploader},
};
use sqlx::PgPool;
use tempfile::TempDir;
use tokio::{
    sync::{mpsc, oneshot, watch},
    task::JoinHandle,
};

use crate::{app::TestApp, queue::worker};

const LAG_LIMIT: Duration = Duration::from_millis(500);

/// An attempt whose trainer is this test.
struct Attempt {
    app: TestApp,
    job: JobId,
    lease: Lease,
    folder: TempDir,
    store: Store,
    nodes: mpsc::UnboundedSender<FinishedNode>,
    disk_full: watch::Receiver<bool>,
    uploading: JoinHandle<anyhow::Result<()>>,
}

impl Attempt {
    async fn begin(pool: PgPool, store: Store, max_local_bytes: u64) -> Self {
        let app = TestApp::start(pool.clone()).await;
        let job = JobId::from(app.given_job().await);
        let worker = worker(&pool).await;
        let mut connection = pool.acquire().await.unwrap();
        let lease = leases::claim(&mut connection, &worker, WorkKind::Train, Device::Cpu, 0, 600.0).await;
        let lease = lease.unwrap().unwrap();
        training::begin_attempt(&mut connection, &lease).await.unwrap();
        drop(connection);

        let folder = tempfile::tempdir().unwrap();
        let uploader = Uploader {
            pool,
            store: store.clone(),
            lease: lease.clone(),
            project: app.project().await.into(),
            job: job.clone(),
            out: folder.path().to_owned(),
            stored: HashMap::new(),
            lag_limit: LAG_LIMIT,
            max_local_bytes,
        };
        let (nodes, finished_nodes) = mpsc::unbounded_channel();
        let (full, disk_full) = watch::channel(false);
        let uploading = tokio::spawn(uploader.run(finished_nodes, full));
        Self { app, job, lease, folder, store, nodes, disk_full, uploading }
    }

    fn path(&self, path: &str) -> PathBuf {
        self.folder.path().join(path)
    }

    /// A node with these files, which is complete on disk.
    fn finish(&self, kind: NodeKind, step: i64, files: &[(&str, &str, usize)]) {
        let mut named = Vec::new();
        for (name, path, len) in files {
            let whole = self.path(path);
            std::fs::create_dir_all(whole.parent().unwrap()).unwrap();
            std::fs::write(whole, vec![b'x'; *len]).unwrap();
            named.push(NodeFile { name: (*name).to_owned(), path: (*path).to_owned() });
        }
        let report = NodeReport { kind, step, restart: 0, files: named, stall_ms: 1, update_norms: BTreeMap::new() };
        let (reported, barrier) = oneshot::channel();
        reported.send(()).unwrap();
        self.nodes.send(FinishedNode { report, reported: barrier }).unwrap();
    }

    fn finish_state(&self, step: i64) {
        let (path, frozen) = (format!("states/{step}/state"), frozen_path(0));
        self.finish(NodeKind::State, step, &[("state", &path, 100), ("frozen.safetensors", &frozen, 50)]);
    }

    /// Waits until everything is stored.
    async fn end(&mut self) {
        // The trainer has ended.
        self.nodes = mpsc::unbounded_channel().0;
        tokio::time::timeout(Duration::from_secs(120), &mut self.uploading).await.unwrap().unwrap().unwrap();
    }

    /// Type, step and whether the store is behind, of each event of an upload.
    async fn events(&self) -> Vec<(String, Option<i64>, Option<bool>)> {
        sqlx::query_as(
            "select type, (data ->> 'step')::bigint, (data ->> 'behind')::bool from job_events
             where job_id = $1 and type not in ('submitted', 'claimed') order by seq",
        )
        .bind(self.job.as_str())
        .fetch_all(&self.app.pool)
        .await
        .unwrap()
    }

    /// Node and file names with the object of each.
    async fn stored_files(&self) -> Vec<(String, i64, String, String)> {
        sqlx::query_as(
            "select kind, step, node_files.name, object_key from nodes join node_files on node_id = nodes.id
             where job_id = $1 order by step, kind, node_files.name",
        )
        .bind(self.job.as_str())
        .fetch_all(&self.app.pool)
        .await
        .unwrap()
    }
}

#[sqlx::test(migrations = "./migrations")]
async fn a_store_that_is_away_delays_what_is_stored_and_skips_only_old_states(pool: PgPool) {
    let folder = tempfile::tempdir().unwrap();
    let s3 = S3::start(folder.path(), 0).await.unwrap();
    let store = Store::connect(s3.store()).await.unwrap();
    s3.stop().await.unwrap();

    let mut attempt = Attempt::begin(pool, store, 400).await;
    attempt.finish(NodeKind::Base, 0, &[("model.safetensors", "base/0/model.safetensors", 100)]);
    attempt.finish_state(1);
    attempt.finish_state(2);
    attempt.finish(NodeKind::Checkpoint, 3, &[("model.safetensors", "checkpoints/3/model.safetensors", 100)]);
    attempt.finish_state(4);
    while attempt.events().await.is_empty() {
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    assert_eq!(attempt.events().await, [("checkpoint_lag".to_owned(), None, Some(true))]);
    assert!(!*attempt.disk_full.borrow(), "the old states are gone");
    assert!(!attempt.path("states/1/state").exists() && !attempt.path("states/2/state").exists());
    attempt.finish(NodeKind::Checkpoint, 5, &[("model.safetensors", "checkpoints/5/model.safetensors", 100)]);
    attempt.disk_full.wait_for(|full| *full).await.unwrap();
    assert!(!attempt.uploading.is_finished());

    // It comes back at the same address.
    let s3 = S3::start(folder.path(), 0).await.unwrap();
    attempt.end().await;
    assert!(!*attempt.disk_full.borrow());
    let events = attempt.events().await;
    let of = |kind: &str, step| (kind.to_owned(), Some(step), None);
    let caught_up = ("checkpoint_lag".to_owned(), None, Some(false));
    // It has caught up when nothing waits for long any more, which may be before the last one is stored.
    assert_eq!(events.iter().filter(|event| **event == caught_up).count(), 1, "{events:?}");
    let stored: Vec<_> = events.into_iter().filter(|(kind, ..)| kind != "checkpoint_lag").collect();
    assert_eq!(stored, [of("base", 0), of("checkpoint", 3), of("state", 4), of("checkpoint", 5)]);
    for gone in ["base/0/model.safetensors", "checkpoints/3/model.safetensors", "states/4/state"] {
        assert!(!attempt.path(gone).exists(), "{gone} is stored and frees the disk");
    }
    assert!(attempt.path(&frozen_path(0)).exists(), "states to come name it");

    let lags: Vec<f64> = sqlx::query_scalar("select value from job_metrics where name = 'checkpoint_lag_s'")
        .fetch_all(&attempt.app.pool)
        .await
        .unwrap();
    assert!(lags.len() == 4 && lags.iter().any(|lag_s| *lag_s >= LAG_LIMIT.as_secs_f64()), "{lags:?}");
    let metrics = attempt.app.get(&format!("/v1/jobs/{}/metrics?name=checkpoint_lag_s", attempt.job)).await.json();
    assert_eq!(metrics["data"].as_array().unwrap().len(), 4);
    s3.stop().await.unwrap();
}

#[sqlx::test(migrations = "./migrations")]
async fn files_large_and_small_are_stored_and_shared_ones_once(pool: PgPool) {
    let folder = tempfile::tempdir().unwrap();
    let s3 = S3::start(folder.path(), 0).await.unwrap();
    let store = Store::connect(s3.store()).await.unwrap();
    let mut attempt = Attempt::begin(pool, store, u64::MAX).await;
    let small: Vec<_> = (0..10).map(|number| (format!("f{number}"), format!("base/0/f{number}"))).collect();
    let mut files: Vec<_> = small.iter().map(|(name, path)| (name.as_str(), path.as_str(), 10)).collect();
    files.push(("model.safetensors", "base/0/model.safetensors", 9 << 20));
    attempt.finish(NodeKind::Base, 0, &files);
    while attempt.events().await.is_empty() {
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    // One file under two names, as in the first cycle of a job whose ranks are counted.
    let frozen = frozen_path(0);
    let own = ("state", "states/1/state", 10);
    attempt.finish(NodeKind::State, 1, &[own, ("frozen.safetensors", &frozen, 50), ("start.safetensors", &frozen, 50)]);
    attempt.finish_state(2);
    attempt.end().await;

    let stored = attempt.stored_files().await;
    let of_base = stored.iter().filter(|(kind, ..)| kind == "base").count();
    assert_eq!(of_base, 12, "with the manifest: {stored:?}");
    let frozen: Vec<_> = stored.iter().filter(|(.., object)| object.contains("frozen/")).collect();
    assert!(frozen.windows(2).all(|pair| pair[0].3 == pair[1].3) && !frozen.is_empty(), "{frozen:?}");
    let prefix = format!("j/{}/{}/", attempt.job, attempt.lease.lease_epoch);
    let objects = attempt.store.list(&prefix, None, 100).await.unwrap();
    assert_eq!(objects.iter().filter(|object| object.key.as_str().contains("frozen/")).count(), 1);
    assert_eq!(
        objects.iter().find(|object| object.key.as_str().ends_with("model.safetensors")).unwrap().bytes,
        9 << 20
    );
    s3.stop().await.unwrap();
}
