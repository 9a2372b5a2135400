//! Stopping the PostgreSQL that a killed server left behind.
//!
//! Every process of a PostgreSQL works in its data folder, so that /proc tells exactly which are left: the
//! number in the pid file alone could by now be any other process. On systems without /proc PostgreSQL's own
//! check of the pid file is what remains.

use std::{fs, io::ErrorKind, path::Path, time::Duration};

use anyhow::{Context, bail};
use rustix::process::{Pid, Signal, kill_process};
use tokio::time::{Instant, sleep};

/// How long an orderly stop may take before it is cut short, and how long that may take.
const ORDERLY: Duration = Duration::from_secs(30);
const CUT_SHORT: Duration = Duration::from_secs(10);

/// Ends every PostgreSQL process of this data folder, and removes the files that name one when there is none.
pub(super) async fn stop(data: &Path, socket_lock: &Path) -> anyhow::Result<()> {
    let pid_file = data.join("postmaster.pid");
    let left = processes_in(data);
    if !left.is_empty() {
        tracing::warn!(postgres.processes = ?left, "stopping the PostgreSQL that an earlier server left behind");
        let postmaster = fs::read_to_string(&pid_file).ok().and_then(|text| text.lines().next()?.parse().ok());
        match postmaster.and_then(Pid::from_raw).filter(|pid| left.contains(pid)) {
            Some(postmaster) => signal(&[postmaster], Signal::INT),
            None => signal(&left, Signal::TERM),
        }
        if !are_gone(data, ORDERLY).await {
            signal(&processes_in(data), Signal::QUIT);
        }
        if !are_gone(data, CUT_SHORT).await {
            bail!("PostgreSQL processes {:?} still use {}: end them", processes_in(data), data.display());
        }
    }
    // Nothing uses the folder: the files are stale, and their number may belong to an unrelated process by now,
    // above all in a container, where numbers begin anew.
    if cfg!(target_os = "linux") {
        for stale in [pid_file.as_path(), socket_lock] {
            match fs::remove_file(stale) {
                Err(error) if error.kind() != ErrorKind::NotFound => {
                    return Err(error).with_context(|| format!("remove {}", stale.display()));
                }
                _ => {}
            }
        }
    }
    Ok(())
}

async fn are_gone(data: &Path, within: Duration) -> bool {
    let deadline = Instant::now() + within;
    while !processes_in(data).is_empty() {
        if Instant::now() >= deadline {
            return false;
        }
        sleep(Duration::from_millis(20)).await;
    }
    true
}

fn processes_in(folder: &Path) -> Vec<Pid> {
    fs::read_dir("/proc")
        .into_iter()
        .flatten()
        .flatten()
        .filter(|entry| fs::read_link(entry.path().join("cwd")).is_ok_and(|cwd| cwd == folder))
        .filter_map(|entry| Pid::from_raw(entry.file_name().to_str()?.parse().ok()?))
        .collect()
}

fn signal(processes: &[Pid], signal: Signal) {
    for process in processes {
        // One that has just ended needs no signal.
        let _ = kill_process(*process, signal);
    }
}
