//! Nodes on disk: a thread of its own writes copied tensors while training goes on.
//!
//! A node appears whole, under its final name, or not at all; its event follows its files. Events come in the order in
//! which the nodes were handed over.

use std::{
    collections::BTreeMap,
    fs::{self, File},
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicI64, Ordering},
        mpsc::{self, SyncSender},
    },
    thread::{self, JoinHandle},
};

use serde_json::Value;
use tch::Tensor;

use super::{error::TrainError, events::Events, native, tensor_file};
use crate::domain::{
    contract::{Event, NodeFile, NodeReport},
    job::FailureKind,
    lineage::NodeKind,
    spec::Linear,
};

/// What a file is made of.
pub enum Content {
    /// Contiguous fp32 tensors in host memory.
    Tensors(Vec<(String, Tensor)>),
    Json(Value),
    Copy(PathBuf),
}

/// A folder that appears at once, with its files.
pub struct Folder {
    /// Relative to the output directory.
    pub path: String,
    pub files: Vec<(String, Content)>,
}

/// What a node is made of.
#[derive(Default)]
pub struct Files {
    /// The node's own.
    pub folders: Vec<Folder>,
    /// Files that it shares with other nodes.
    pub shared_files: Vec<NodeFile>,
    /// Those of them that are not on disk yet.
    pub shared_folders: Vec<Folder>,
    /// Of a restart.
    pub update_norms: BTreeMap<Linear, f64>,
}

/// A node to write.
pub struct Node {
    pub kind: NodeKind,
    pub step: i64,
    pub restart: i64,
    pub files: Files,
    /// Known once the node is handed over, so that a wait for the disk counts.
    pub stall_ms: Arc<AtomicI64>,
}

/// Restart, checkpoint and state; or base, checkpoint and state.
const MAX_WAITING: usize = 3;

pub struct Writer {
    nodes: SyncSender<Node>,
    thread: JoinHandle<Result<(), TrainError>>,
}

impl Writer {
    pub fn start(out_dir: PathBuf, events: Events) -> Self {
        // What falls on one step may wait together, while an earlier node is written: the loop stands still only for
        // its copies. More would be memory that the disk cannot keep up with.
        let (nodes, queue) = mpsc::sync_channel::<Node>(MAX_WAITING);
        let thread = thread::spawn(move || {
            for node in queue {
                let report = write_node(&out_dir, node)?;
                events.emit(&Event::Node(report));
                // The copies of a node may be as large as the model.
                native::give_back_memory();
            }
            Ok(())
        });
        Self { nodes, thread }
    }

    /// Hands a node over; waits while the disk is behind. False if writing has failed: `finish` says why.
    #[must_use]
    pub fn submit(&self, node: Node) -> bool {
        self.nodes.send(node).is_ok()
    }

    /// Waits until everything is written.
    pub fn finish(self) -> Result<(), TrainError> {
        drop(self.nodes);
        match self.thread.join() {
            Ok(result) => result,
            Err(panic) => Err(TrainError::from_panic(&*panic)),
        }
    }

    /// Whether the thread has ended before its time.
    pub fn has_failed(&self) -> bool {
        self.thread.is_finished()
    }
}

fn write_node(out_dir: &Path, node: Node) -> Result<NodeReport, TrainError> {
    let Files { folders, shared_files: mut files, shared_folders, update_norms } = node.files;
    for folder in shared_folders {
        write_folder(out_dir, folder)?;
    }
    for folder in folders {
        files.extend(
            folder
                .files
                .iter()
                .map(|(name, _)| NodeFile { name: name.clone(), path: format!("{}/{name}", folder.path) }),
        );
        write_folder(out_dir, folder)?;
    }
    tracing::info!(node.kind = node.kind.folder(), node.step, node.restart, "node written");
    let stall_ms = node.stall_ms.load(Ordering::Relaxed);
    Ok(NodeReport { kind: node.kind, step: node.step, restart: node.restart, files, stall_ms, update_norms })
}

/// Writes under a temporary name, syncs, renames. A folder that an earlier run left is replaced: it is not one that this
/// run goes on from.
fn write_folder(out_dir: &Path, folder: Folder) -> Result<(), TrainError> {
    let target = out_dir.join(&folder.path);
    let (Some(parent), Some(name)) = (target.parent(), target.file_name()) else {
        return Err(TrainError::new(FailureKind::Internal, format!("{} is no folder to write", target.display())));
    };
    let temporary = parent.join(format!(".{}.tmp", name.display()));
    let storage = |doing: &'static str, path: &Path| {
        let path = path.to_owned();
        move |error| TrainError::storage(doing, &path, error)
    };

    remove_if_there(&temporary)?;
    fs::create_dir_all(&temporary).map_err(storage("create", &temporary))?;
    for (name, content) in folder.files {
        let path = temporary.join(name);
        match content {
            Content::Tensors(tensors) => tensor_file::write(&path, &tensors)?,
            Content::Json(value) => {
                fs::write(&path, format!("{value:#}\n")).map_err(storage("write", &path))?;
            }
            Content::Copy(source) => drop(fs::copy(&source, &path).map_err(storage("copy", &source))?),
        }
        sync(&path)?;
    }
    sync(&temporary)?;
    remove_if_there(&target)?;
    fs::rename(&temporary, &target).map_err(storage("rename", &temporary))?;
    sync(parent)
}

fn remove_if_there(path: &Path) -> Result<(), TrainError> {
    if path.exists() {
        fs::remove_dir_all(path).map_err(|error| TrainError::storage("remove", path, error))?;
    }
    Ok(())
}

fn sync(path: &Path) -> Result<(), TrainError> {
    File::open(path).and_then(|file| file.sync_all()).map_err(|error| TrainError::storage("sync", path, error))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn node(files: Vec<(String, Content)>) -> Node {
        let folder = Folder { path: "checkpoints/3".into(), files };
        Node {
            kind: NodeKind::Checkpoint,
            step: 3,
            restart: 0,
            files: Files { folders: vec![folder], ..Files::default() },
            stall_ms: Arc::default(),
        }
    }

    #[test]
    fn a_node_that_cannot_be_written_fails_the_run_as_storage_and_leaves_nothing() {
        let out = crate::train::test_support::scratch_dir();
        let writer = Writer::start(out.path().into(), Events::new(std::io::sink()));
        assert!(writer.submit(node(vec![("a.json".into(), Content::Copy(out.path().join("absent")))])));
        let error = writer.finish().expect_err("the source is absent");
        assert_eq!(error.kind, FailureKind::Storage);
        assert!(!out.path().join("checkpoints/3").exists());
    }

    #[test]
    fn a_folder_of_an_earlier_attempt_is_replaced() {
        let out = crate::train::test_support::scratch_dir();
        for content in [json!(1), json!(2)] {
            write_node(out.path(), node(vec![("a.json".into(), Content::Json(content))])).expect("write");
        }
        assert_eq!(fs::read_to_string(out.path().join("checkpoints/3/a.json")).expect("read"), "2\n");
    }
}
