//! One attempt on a task on a lineage: fetch a base and the deltas after it, let the trainer rebuild the weights, and
//! store them as a checkpoint or say what they are worth.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use serde_json::{Value, json};
use tracing::Instrument;

use super::{
    Agent,
    lease_keeper::LeaseKeeper,
    rebuild::{RebuildArgs, rebuild},
    retry::{SETTLING, long_after, until_written},
    staging,
};
use crate::{
    db::{
        leases::{Lease, WriteError},
        lineage_tasks::LineageTaskKind,
        nodes::{self, StoredFile},
        upkeep::{self, Task},
    },
    domain::{
        ids::NodeId,
        job::{Failure, FailureKind},
        lineage::{self, MANIFEST_FILE, NodeKind},
        verification::{CheckedFile, Verification},
    },
    shutdown::Shutdown,
    storage::{Key, StorageError},
};

/// Runs the attempt and settles the task.
pub async fn run(agent: &Agent, lease: &Lease, task: Task, shutdown: &Shutdown) {
    let span = tracing::info_span!("attempt", task.id = %task.id, lease.epoch = lease.lease_epoch);
    run_within(agent, lease, task, shutdown).instrument(span).await;
}

async fn run_within(agent: &Agent, lease: &Lease, task: Task, shutdown: &Shutdown) {
    tracing::info!(kind = ?task.kind, restart.id = %task.restart, "task claimed");
    let keeper = LeaseKeeper::start(agent.pool.clone(), lease.clone(), &agent.config);
    let work = async {
        match shutdown.run_until(attempt(agent, lease, &task)).await {
            None => until_written("release", || upkeep::release(&agent.pool, lease)).await,
            Some(Ok(result)) => complete(agent, lease, &task, result).await,
            Some(Err(failure)) => {
                tracing::warn!(kind = ?failure.kind, failure.message, "task failed");
                until_written("fail", || upkeep::fail(&agent.pool, lease, &failure)).await
            }
        }
    };
    tokio::select! {
        outcome = work => match outcome {
            Ok(()) => tracing::info!("attempt ended"),
            Err(error) => tracing::error!(%error, "could not settle the task"),
        },
        () = keeper.lost() => {}
        () = long_after(shutdown, SETTLING) => {
            tracing::warn!("left without having settled the task: its lease has to run out");
        }
    }
}

/// What an attempt came to.
#[derive(Debug)]
enum Done {
    Verified(Verification),
    Materialized(Vec<StoredFile>),
}

async fn complete(agent: &Agent, lease: &Lease, task: &Task, result: Done) -> Result<(), WriteError> {
    match result {
        Done::Verified(verification) => {
            until_written("complete", || upkeep::complete_verify(&agent.pool, lease, task, &verification)).await
        }
        Done::Materialized(files) => {
            until_written("complete", || upkeep::complete_materialize(&agent.pool, lease, task, &files)).await
        }
    }
}

async fn attempt(agent: &Agent, lease: &Lease, task: &Task) -> Result<Done, Failure> {
    check_chain(task)?;
    let name = format!("{}-{}", task.id, lease.lease_epoch);
    let folder = agent.work_dir.attempt(&name).map_err(|error| failure_of(&error))?;
    match task.kind {
        LineageTaskKind::Verify => verify(agent, task, folder.path()).await.map(Done::Verified),
        LineageTaskKind::Materialize => materialize(agent, lease, task, folder.path()).await.map(Done::Materialized),
    }
}

/// A chain without its base, or with a gap, gives no weights.
fn check_chain(task: &Task) -> Result<(), Failure> {
    let is_base = |(index, kind): (usize, NodeKind)| (index == 0) == (kind == NodeKind::Base);
    let is_whole = task.chain.len() as i64 == task.number + 1
        && task.chain.iter().map(|node| node.kind).enumerate().all(is_base)
        && task.chain.iter().all(|node| node.has_files)
        && task.chain.iter().zip(0..).skip(1).all(|(node, number)| node.restart == number);
    if is_whole {
        return Ok(());
    }
    let message = format!(
        "the lineage of restart {} is not whole: its base and the restarts 1 to {} are needed, there are the files of \
         {:?}",
        task.restart,
        task.number,
        task.chain
            .iter()
            .filter(|node| node.has_files)
            .map(|node| format!("{}/{}", node.kind.folder(), node.restart))
            .collect::<Vec<_>>(),
    );
    Err(Failure::new(FailureKind::Data, message))
}

/// What the trainer is told, of a chain whose nodes lie in folders of their own.
fn rebuild_args<'a>(agent: &'a Agent, task: &Task, folder: &Path) -> RebuildArgs<'a> {
    let mut nodes = task.chain.iter().map(|node| folder.join(node.id.as_str()));
    RebuildArgs {
        program: &agent.config.trainer,
        base: nodes.next().unwrap_or_default(),
        deltas: nodes.collect(),
        out: None,
        compare: None,
    }
}

async fn materialize(agent: &Agent, lease: &Lease, task: &Task, folder: &Path) -> Result<Vec<StoredFile>, Failure> {
    for node in &task.chain {
        let into = folder.join(node.id.as_str());
        let staged = staging::stage_node(&agent.pool, &agent.store, &node.id, &into, |name| name != MANIFEST_FILE);
        staged.await.with_context(|| format!("stage the files of {}", node.id)).map_err(|error| failure_of(&error))?;
    }
    let out = folder.join("out");
    rebuild(RebuildArgs { out: Some(out.clone()), ..rebuild_args(agent, task, folder) }).await?;
    let mut files = Vec::new();
    match upload(agent, lease, task, &out, &mut files).await {
        Ok(()) => Ok(files),
        Err(error) => {
            delete(agent, &files).await;
            Err(failure_of(&error))
        }
    }
}

/// Stores every file of the new checkpoint, the manifest last.
async fn upload(agent: &Agent, lease: &Lease, task: &Task, out: &Path, files: &mut Vec<StoredFile>) -> Result<()> {
    let mut paths = Vec::new();
    let mut entries = tokio::fs::read_dir(out).await.context("list the rebuilt files")?;
    while let Some(entry) = entries.next_entry().await.context("list the rebuilt files")? {
        paths.push(entry.path());
    }
    paths.sort();
    for path in paths {
        files.push(upload_file(agent, lease, task, &path).await?);
    }
    let facts = files.iter().map(StoredFile::facts);
    let manifest = lineage::manifest(NodeKind::Checkpoint, task.step, task.number, facts);
    let path = out.join(MANIFEST_FILE);
    tokio::fs::write(&path, serde_json::to_vec_pretty(&manifest)?).await.context("write the manifest")?;
    files.push(upload_file(agent, lease, task, &path).await?);
    Ok(())
}

async fn upload_file(agent: &Agent, lease: &Lease, task: &Task, path: &Path) -> Result<StoredFile> {
    let name = path.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
    let key = Key::materialized(&task.id, lease.lease_epoch, &name);
    let uploaded = agent.store.upload_file(&key, path).await.with_context(|| format!("upload {name}"))?;
    Ok(StoredFile {
        name,
        object_key: key.as_str().to_owned(),
        size_bytes: i64::try_from(uploaded.bytes)?,
        sha256: uploaded.sha256,
    })
}

async fn delete(agent: &Agent, files: &[StoredFile]) {
    let keys: Vec<_> = files.iter().map(|file| Key::from(file.object_key.clone())).collect();
    if let Err(error) = agent.store.delete(&keys).await {
        tracing::warn!(%error, num_objects = keys.len(), "objects are left behind in the store");
    }
}

async fn verify(agent: &Agent, task: &Task, folder: &Path) -> Result<Verification, Failure> {
    let mut files = Vec::new();
    for node in task.chain.iter().map(|node| &node.id).chain(&task.checkpoint) {
        let checked = check_files(agent, node, &folder.join(node.as_str())).await;
        files.extend(checked.map_err(|error| failure_of(&error))?);
    }
    if files.iter().any(|file| file.problem.is_some()) {
        return Ok(Verification::damaged(files));
    }
    let compare: Option<PathBuf> = task.checkpoint.as_ref().map(|node| folder.join(node.as_str()));
    match (rebuild(RebuildArgs { compare, ..rebuild_args(agent, task, folder) }).await, &task.checkpoint) {
        (Ok(differences), Some(checkpoint)) => Ok(Verification::compared(files, checkpoint.clone(), differences)),
        (Ok(_), None) => Ok(Verification::without_merged(files)),
        // That is what was asked.
        (Err(failure), _) if failure.kind == FailureKind::Data => Ok(Verification::unusable(files, &failure.message)),
        (Err(failure), _) => Err(failure),
    }
}

/// Reads every file of a node from the store into a folder, and says of each whether it is what is on record.
async fn check_files(agent: &Agent, node: &NodeId, folder: &Path) -> Result<Vec<CheckedFile>> {
    let stored = nodes::files(&agent.pool, node).await.with_context(|| format!("list the files of {node}"))?;
    let mut checked = Vec::with_capacity(stored.len());
    for file in &stored {
        let problem = match staging::download(&agent.store, file, &folder.join(&file.name)).await {
            Ok(()) => None,
            Err(error) => Some(finding(&error).ok_or(error).with_context(|| format!("read {} of {node}", file.name))?),
        };
        let StoredFile { name, size_bytes, sha256, .. } = file.clone();
        checked.push(CheckedFile { node: node.clone(), name, size_bytes, sha256, problem });
    }
    if let Some(manifest) = checked.iter_mut().find(|file| file.name == MANIFEST_FILE && file.problem.is_none()) {
        let json = tokio::fs::read(folder.join(MANIFEST_FILE)).await.context("read a manifest")?;
        manifest.problem = check_manifest(&json, &stored);
    }
    Ok(checked)
}

/// What a manifest says otherwise than the database.
fn check_manifest(json: &[u8], stored: &[StoredFile]) -> Option<String> {
    let Ok(manifest) = serde_json::from_slice::<Value>(json) else { return Some("is no JSON document".into()) };
    let wanted: Vec<_> = stored
        .iter()
        .filter(|file| file.name != MANIFEST_FILE)
        .map(|file| json!({"name": file.name, "size_bytes": file.size_bytes, "sha256": file.sha256}))
        .collect();
    let listed = manifest["files"].as_array().map_or(&[][..], Vec::as_slice);
    let is_same = listed.len() == wanted.len() && wanted.iter().all(|file| listed.contains(file));
    (!is_same).then(|| "lists other files, sizes or hashes than the database".into())
}

/// The error as something that is wrong with the object, and will be the next time too.
fn finding(error: &anyhow::Error) -> Option<String> {
    match error.downcast_ref()? {
        error @ (StorageError::NotFound { .. } | StorageError::Damaged { .. }) => Some(error.to_string()),
        _ => None,
    }
}

fn failure_of(error: &anyhow::Error) -> Failure {
    let kind = if finding(error).is_some() { FailureKind::Data } else { FailureKind::Storage };
    Failure::new(kind, format!("{error:#}"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::db::upkeep::ChainNode;

    fn task(chain: &[(NodeKind, i64)]) -> Task {
        let node = |&(kind, restart): &(NodeKind, i64)| ChainNode { id: NodeId::new(), kind, restart, has_files: true };
        Task {
            id: Default::default(),
            kind: LineageTaskKind::Verify,
            project: Default::default(),
            job: Default::default(),
            restart: NodeId::new(),
            step: 20,
            number: 2,
            chain: chain.iter().map(node).collect(),
            checkpoint: None,
        }
    }

    #[test]
    fn a_chain_begins_with_its_base_and_has_every_restart() {
        use NodeKind::{Base, Checkpoint, Restart};
        assert!(check_chain(&task(&[(Base, 0), (Restart, 1), (Restart, 2)])).is_ok());
        for broken in [
            &[(Base, 0), (Restart, 2)][..],
            &[(Restart, 1), (Restart, 2)],
            &[(Checkpoint, 0), (Restart, 1), (Restart, 2)],
            &[(Base, 0), (Restart, 2), (Restart, 2)],
            &[],
        ] {
            let failure = check_chain(&task(broken)).unwrap_err();
            assert!(failure.kind == FailureKind::Data && !failure.retryable, "{failure:?}");
        }
        let mut deleted = task(&[(Base, 0), (Restart, 1), (Restart, 2)]);
        deleted.chain[1].has_files = false;
        let message = check_chain(&deleted).unwrap_err().message;
        assert!(message.ends_with(r#"the files of ["base/0", "restarts/2"]"#), "{message}");
    }

    #[test]
    fn a_manifest_must_list_what_the_database_has() {
        let file = |name: &str, sha256: &str| StoredFile {
            name: name.into(),
            object_key: "k".into(),
            size_bytes: 3,
            sha256: sha256.into(),
        };
        let stored = [file("a", "1"), file(MANIFEST_FILE, "2"), file("b", "3")];
        let manifest = |files: &[StoredFile]| {
            let facts = files.iter().map(StoredFile::facts);
            lineage::manifest(NodeKind::Base, 0, 0, facts).to_string().into_bytes()
        };
        assert_eq!(check_manifest(&manifest(&[file("b", "3"), file("a", "1")]), &stored), None);
        for other in [&[file("a", "1")][..], &[file("a", "1"), file("b", "4")], &[file("a", "1"), file("a", "1")]] {
            assert!(check_manifest(&manifest(other), &stored).is_some());
        }
        assert!(check_manifest(b"{}", &stored).is_some() && check_manifest(b"", &stored).is_some());
    }
}
