//! Finished nodes that wait to be stored, what they hold of the disk, and for how long.
//!
//! Nothing here slows the training down while the store is away; three things bound what that costs. Of the states that
//! wait only the newest is kept: whoever goes on begins there, and its disk space does not grow. The job's log says
//! since when nothing was stored. And above a number of bytes the queue says so, and the trainer is held.

use std::{
    collections::{BTreeMap, HashSet, VecDeque},
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use tokio::{
    sync::{mpsc, oneshot, watch},
    time::{Instant, timeout_at},
};

use super::uploader::FinishedNode;
use crate::domain::{
    contract::NodeReport,
    lineage::{self, NodeKind},
};

/// The nodes of one attempt, in the trainer's order.
#[derive(Debug)]
pub(super) struct UploadQueue {
    /// The trainer's output directory.
    out: PathBuf,
    max_bytes: u64,
    nodes: Mutex<Nodes>,
    changes: watch::Sender<()>,
    disk_full: watch::Sender<bool>,
}

#[derive(Debug, Default)]
struct Nodes {
    waiting: VecDeque<Waiting>,
    /// Whether the first is being stored.
    is_storing: bool,
    is_closed: bool,
    /// Frozen files that lie in the store: they stay on the disk, whatever waits.
    settled: HashSet<String>,
}

#[derive(Debug)]
struct Waiting {
    report: Arc<NodeReport>,
    reported: Option<oneshot::Receiver<()>>,
    since: Instant,
    /// Path in the output directory, and size.
    files: BTreeMap<String, u64>,
}

/// A node whose turn it is.
#[derive(Debug)]
pub(super) struct Next {
    pub report: Arc<NodeReport>,
    pub reported: Option<oneshot::Receiver<()>>,
    /// When it was complete on disk.
    pub since: Instant,
}

/// What waits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Backlog {
    pub num_nodes: usize,
    pub bytes: u64,
    /// When the oldest was complete on disk.
    pub since: Instant,
}

impl UploadQueue {
    /// `settled` are frozen files that lie in the store already.
    pub fn new(
        out: PathBuf,
        max_bytes: u64,
        settled: impl IntoIterator<Item = String>,
        disk_full: watch::Sender<bool>,
    ) -> Self {
        let nodes = Nodes { settled: settled.into_iter().collect(), ..Nodes::default() };
        Self { out, max_bytes, nodes: Mutex::new(nodes), changes: watch::Sender::new(()), disk_full }
    }

    /// Takes nodes until there are no more.
    pub async fn fill(&self, mut nodes: mpsc::UnboundedReceiver<FinishedNode>) {
        while let Some(node) = nodes.recv().await {
            self.push(node).await;
        }
        self.lock().is_closed = true;
        self.changes.send_replace(());
    }

    async fn push(&self, FinishedNode { report, reported }: FinishedNode) {
        let since = Instant::now();
        let mut files = BTreeMap::new();
        for path in report.files.iter().map(|file| &file.path) {
            // What is missing is found when it is uploaded, and ends the attempt.
            let bytes = tokio::fs::metadata(self.out.join(path)).await.map_or(0, |metadata| metadata.len());
            files.insert(path.clone(), bytes);
        }
        let unwanted = self.lock().push(Waiting { report: Arc::new(report), reported: Some(reported), since, files });
        remove(&self.out, &unwanted).await;
        self.changed();
    }

    /// Waits for the next node; `None` once there are no more.
    pub async fn next(&self) -> Option<Next> {
        let mut changes = self.changes.subscribe();
        loop {
            {
                let mut nodes = self.lock();
                if let Some(first) = nodes.waiting.front_mut() {
                    let (report, reported) = (first.report.clone(), first.reported.take());
                    let next = Next { report, reported, since: first.since };
                    nodes.is_storing = true;
                    return Some(next);
                }
                if nodes.is_closed {
                    return None;
                }
            }
            // The sender is a part of the queue.
            let _ = changes.changed().await;
        }
    }

    /// The node that came last out of `next` is stored.
    pub fn stored(&self) {
        self.lock().stored();
        self.changed();
    }

    /// Waits until the oldest node has waited for so long; `None` if that can happen no more.
    pub async fn behind(&self, limit: Duration) -> Option<Backlog> {
        let mut changes = self.changes.subscribe();
        loop {
            let (backlog, is_closed) = self.look();
            let deadline = match backlog {
                Some(backlog) if backlog.since.elapsed() >= limit => return Some(backlog),
                Some(backlog) => Some(backlog.since + limit),
                None if is_closed => return None,
                None => None,
            };
            // Either way there is reason to look again.
            let _ = match deadline {
                Some(deadline) => timeout_at(deadline, changes.changed()).await.is_ok(),
                None => changes.changed().await.is_ok(),
            };
        }
    }

    /// Waits until no node has waited for so long.
    pub async fn caught_up(&self, limit: Duration) {
        let mut changes = self.changes.subscribe();
        while self.look().0.is_some_and(|backlog| backlog.since.elapsed() >= limit) {
            let _ = changes.changed().await;
        }
    }

    fn look(&self) -> (Option<Backlog>, bool) {
        let nodes = self.lock();
        let backlog = nodes.waiting.front().map(|first| Backlog {
            num_nodes: nodes.waiting.len(),
            bytes: nodes.bytes(),
            since: first.since,
        });
        (backlog, nodes.is_closed)
    }

    fn changed(&self) {
        let bytes = self.lock().bytes();
        let is_full = bytes > self.max_bytes;
        let has_changed = self.disk_full.send_if_modified(|full| std::mem::replace(full, is_full) != is_full);
        if has_changed && is_full {
            tracing::warn!(waiting_bytes = bytes, max_bytes = self.max_bytes, "too much waits for the store");
        }
        self.changes.send_replace(());
    }

    fn lock(&self) -> MutexGuard<'_, Nodes> {
        self.nodes.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Nodes {
    /// Adds a node, and returns the files of states that are not worth storing any more.
    fn push(&mut self, new: Waiting) -> Vec<String> {
        let mut skipped = Vec::new();
        if new.report.kind == NodeKind::State {
            let being_stored = usize::from(self.is_storing);
            let (kept, old): (Vec<_>, Vec<_>) = self
                .waiting
                .drain(being_stored.min(self.waiting.len())..)
                .partition(|node| node.report.kind != NodeKind::State);
            self.waiting.extend(kept);
            skipped = old;
        }
        self.waiting.push_back(new);
        for state in &skipped {
            tracing::info!(step = state.report.step, "a state is not stored: a newer one waits");
        }
        // Frozen weights may be another node's, too.
        let named: HashSet<&String> = self.waiting.iter().flat_map(|node| node.files.keys()).collect();
        skipped.iter().flat_map(|state| state.files.keys()).filter(|path| !named.contains(path)).cloned().collect()
    }

    fn stored(&mut self) {
        self.is_storing = false;
        if let Some(node) = self.waiting.pop_front() {
            self.settled.extend(node.files.into_keys().filter(|path| lineage::is_frozen(path)));
        }
    }

    /// What storing all of it would free, or lies beside it only as long as it waits.
    fn bytes(&self) -> u64 {
        let files: BTreeMap<&String, u64> =
            self.waiting.iter().flat_map(|node| &node.files).map(|(path, bytes)| (path, *bytes)).collect();
        files.into_iter().filter(|(path, _)| !self.settled.contains(*path)).map(|(_, bytes)| bytes).sum()
    }
}

async fn remove(out: &Path, paths: &[String]) {
    for path in paths {
        let path = out.join(path);
        match tokio::fs::remove_file(&path).await {
            // Frozen weights that are stored may have been removed already.
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                tracing::warn!(%error, path = %path.display(), "could not remove the file of an old state");
            }
            _ => {}
        }
    }
}

/// Half of what is free on the disk of this folder.
pub(super) fn half_of_free_bytes(folder: &Path) -> u64 {
    match rustix::fs::statvfs(folder) {
        Ok(disk) => disk.f_bavail.saturating_mul(disk.f_frsize) / 2,
        Err(error) => {
            tracing::warn!(%error, folder = %folder.display(), "cannot tell how much disk is free: no bound on what waits");
            u64::MAX
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::domain::contract::NodeFile;

    struct Fixture {
        folder: tempfile::TempDir,
        queue: UploadQueue,
        disk_full: watch::Receiver<bool>,
    }

    impl Fixture {
        fn new(max_bytes: u64) -> Self {
            let folder = tempfile::tempdir().unwrap();
            let (sender, disk_full) = watch::channel(false);
            let queue = UploadQueue::new(folder.path().to_owned(), max_bytes, [], sender);
            Self { folder, queue, disk_full }
        }

        /// Finishes a node with one file of 10 bytes, and frozen weights of 100 after so many restarts if it is a state.
        async fn finish(&self, kind: NodeKind, step: i64, restart: i64) {
            let mut paths = vec![(format!("{}/{step}/file", kind.folder()), 10)];
            if kind == NodeKind::State {
                paths.push((lineage::frozen_path(restart), 100));
            }
            for (path, len) in &paths {
                let path = self.folder.path().join(path);
                std::fs::create_dir_all(path.parent().unwrap()).unwrap();
                std::fs::write(path, vec![0; *len]).unwrap();
            }
            let files = paths.into_iter().map(|(path, _)| NodeFile { name: path.replace('/', "-"), path }).collect();
            let report = NodeReport { kind, step, restart, files, stall_ms: 0, update_norms: Default::default() };
            self.queue.push(FinishedNode { report, reported: oneshot::channel().1 }).await;
        }

        /// The trainer has ended.
        async fn close(&self) {
            let (_, nothing_more) = mpsc::unbounded_channel();
            self.queue.fill(nothing_more).await;
        }

        fn exists(&self, path: &str) -> bool {
            self.folder.path().join(path).exists()
        }

        fn bytes(&self) -> u64 {
            self.queue.look().0.map_or(0, |backlog| backlog.bytes)
        }

        async fn next(&self) -> (NodeKind, i64) {
            let next = self.queue.next().await.unwrap();
            (next.report.kind, next.report.step)
        }
    }

    #[tokio::test]
    async fn of_the_states_that_wait_only_the_newest_is_stored_and_every_other_node_in_order() {
        use NodeKind::{Base, Checkpoint, Restart, State};
        let f = Fixture::new(u64::MAX);
        for (kind, step, restart) in
            [(Base, 0, 0), (State, 1, 0), (Restart, 2, 1), (State, 3, 1), (Checkpoint, 4, 1), (State, 5, 1)]
        {
            f.finish(kind, step, restart).await;
        }
        assert!(!f.exists("states/1/file") && !f.exists("states/3/file"), "what is skipped holds no disk");
        assert!(!f.exists(&lineage::frozen_path(0)), "nor do the frozen weights that only it has named");
        assert!(f.exists("states/5/file") && f.exists(&lineage::frozen_path(1)));
        for expected in [(Base, 0), (Restart, 2), (Checkpoint, 4), (State, 5)] {
            assert_eq!(f.next().await, expected);
            f.queue.stored();
        }
        f.close().await;
        assert!(f.queue.next().await.is_none());
    }

    #[tokio::test]
    async fn a_state_that_is_being_stored_keeps_its_files() {
        let f = Fixture::new(u64::MAX);
        f.finish(NodeKind::State, 1, 0).await;
        assert_eq!(f.next().await, (NodeKind::State, 1));
        f.finish(NodeKind::State, 2, 0).await;
        f.finish(NodeKind::State, 3, 1).await;
        assert!(f.exists("states/1/file") && f.exists(&lineage::frozen_path(0)) && !f.exists("states/2/file"));
        f.queue.stored();
        assert_eq!(f.next().await, (NodeKind::State, 3));
    }

    #[tokio::test]
    async fn the_disk_is_full_while_more_waits_than_is_allowed() {
        let f = Fixture::new(125);
        f.finish(NodeKind::Base, 0, 0).await;
        f.finish(NodeKind::State, 1, 0).await;
        assert!((f.bytes(), *f.disk_full.borrow()) == (120, false));
        f.finish(NodeKind::Checkpoint, 1, 0).await;
        assert!((f.bytes(), *f.disk_full.borrow()) == (130, true));
        f.next().await;
        f.queue.stored();
        assert!((f.bytes(), *f.disk_full.borrow()) == (120, false));
        // Frozen weights that are stored stay on the disk for the states to come, and hold nothing up.
        f.next().await;
        f.queue.stored();
        f.finish(NodeKind::State, 2, 0).await;
        assert_eq!(f.bytes(), 20);
    }

    #[tokio::test]
    async fn a_node_that_waits_for_long_is_noticed_until_it_is_stored() {
        let f = Fixture::new(u64::MAX);
        let limit = Duration::from_millis(400);
        let begin = Instant::now();
        f.finish(NodeKind::Base, 0, 0).await;
        f.finish(NodeKind::Checkpoint, 0, 0).await;
        let backlog = f.queue.behind(limit).await.unwrap();
        assert_eq!((backlog.num_nodes, backlog.bytes), (2, 20));
        assert!(begin.elapsed() >= limit);

        let store = async {
            for _ in 0..2 {
                tokio::time::sleep(limit).await;
                f.next().await;
                f.queue.stored();
            }
        };
        tokio::join!(f.queue.caught_up(limit / 2), store);
        assert!(begin.elapsed() >= limit * 3);
        f.close().await;
        assert_eq!(f.queue.behind(limit).await, None);
    }
}
