//! What a trainer writes to stderr: kept in a bounded file, the last lines at hand, and shipped to the
//! store while it grows.

use std::{
    collections::VecDeque,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use anyhow::{Context, Result};
use tokio::{
    fs::File,
    io::{AsyncBufReadExt, AsyncWriteExt, BufReader},
    process::ChildStderr,
    sync::oneshot,
};
use tokio_util::task::AbortOnDropHandle;
use tracing::Instrument;

use super::Agent;
use crate::{
    db::{leases::Lease, training},
    domain::ids::JobId,
    storage::{Key, Store},
};

const MAX_LOG_BYTES: u64 = 8 << 20;
const MAX_LINE_BYTES: usize = 16 << 10;
const TAIL_LINES: usize = 40;

/// The log of one attempt.
#[derive(Debug)]
pub struct LogFile {
    pub path: PathBuf,
    tail: Arc<Mutex<VecDeque<String>>>,
    copying: Option<AbortOnDropHandle<()>>,
}

impl LogFile {
    /// Starts to copy the trainer's stderr into the file.
    pub async fn capture(stderr: ChildStderr, path: &Path) -> Result<Self> {
        let file = File::create(path).await.with_context(|| format!("create {}", path.display()))?;
        let tail = Arc::new(Mutex::new(VecDeque::new()));
        let copying = tokio::spawn(copy(stderr, file, Arc::clone(&tail)));
        Ok(Self { path: path.to_owned(), tail, copying: Some(AbortOnDropHandle::new(copying)) })
    }

    /// Returns when everything is in the file that a trainer wrote which has ended. A process of its
    /// own that lives on may keep stderr open: that is not waited for.
    pub async fn closed(&mut self) {
        if let Some(copying) = self.copying.take()
            && tokio::time::timeout(Duration::from_secs(1), copying).await.is_err()
        {
            tracing::warn!("a trainer's stderr stays open after its end");
        }
    }

    /// The last lines.
    pub fn tail(&self) -> String {
        let tail = self.tail.lock().unwrap_or_else(PoisonError::into_inner);
        tail.iter().map(String::as_str).collect::<Vec<_>>().join("\n")
    }
}

async fn copy(stderr: ChildStderr, mut file: File, tail: Arc<Mutex<VecDeque<String>>>) {
    let mut reader = BufReader::new(stderr);
    let (mut line, mut written_bytes) = (Vec::new(), 0);
    loop {
        line.clear();
        match reader.read_until(b'\n', &mut line).await {
            Ok(0) | Err(_) => {
                // A failure to write was logged at the write; there is nothing more to do here.
                let _ = file.flush().await;
                return;
            }
            Ok(_) => line.truncate(MAX_LINE_BYTES),
        }
        // NUL has no place in a text column, where the tail may end.
        let text = String::from_utf8_lossy(&line).replace('\0', "").trim_end().to_owned();
        if written_bytes < MAX_LOG_BYTES {
            written_bytes += text.len() as u64 + 1;
            let note = if written_bytes < MAX_LOG_BYTES { "" } else { "[the log is full; what follows is not kept]\n" };
            if let Err(error) = file.write_all(format!("{text}\n{note}").as_bytes()).await {
                tracing::warn!(%error, "could not write a trainer's log");
            }
        }
        let mut tail = tail.lock().unwrap_or_else(PoisonError::into_inner);
        if tail.len() == TAIL_LINES {
            tail.pop_front();
        }
        tail.push_back(text);
    }
}

/// How often a growing log is stored, and how long its last part may take.
const SHIP_EVERY: Duration = Duration::from_secs(5);

/// Stores the log of one attempt while it grows. Its failures are logged and harm nothing.
#[derive(Debug)]
pub struct LogShipper {
    finish: oneshot::Sender<()>,
    shipping: AbortOnDropHandle<()>,
}

impl LogShipper {
    pub fn start(agent: &Agent, lease: &Lease, job: &JobId, log: &LogFile) -> Self {
        let (finish, finished) = oneshot::channel();
        let shipment = Shipment {
            pool: agent.pool.clone(),
            store: agent.store.clone(),
            lease: lease.clone(),
            job: job.clone(),
            path: log.path.clone(),
            stored_bytes: 0,
        };
        Self { finish, shipping: AbortOnDropHandle::new(tokio::spawn(shipment.run(finished).in_current_span())) }
    }

    /// Stores what is new since the last time.
    pub async fn finish(self) {
        let _ = self.finish.send(());
        if tokio::time::timeout(SHIP_EVERY, self.shipping).await.is_err() {
            tracing::warn!("the end of an attempt's log could not be stored in time");
        }
    }
}

struct Shipment {
    pool: sqlx::PgPool,
    store: Store,
    lease: Lease,
    job: JobId,
    path: PathBuf,
    stored_bytes: usize,
}

impl Shipment {
    async fn run(mut self, mut finished: oneshot::Receiver<()>) {
        loop {
            let last = tokio::time::timeout(SHIP_EVERY, &mut finished).await.is_ok();
            if let Err(error) = self.ship().await {
                tracing::warn!(error = format!("{error:#}"), "could not store the log");
            }
            if last {
                return;
            }
        }
    }

    async fn ship(&mut self) -> Result<()> {
        let log = tokio::fs::read(&self.path).await.context("read the log")?;
        let size_bytes = log.len();
        if size_bytes == self.stored_bytes {
            return Ok(());
        }
        let key = Key::log(&self.job, self.lease.lease_epoch);
        self.store.put_bytes(&key, log.into()).await?;
        training::set_log(&self.pool, &self.lease, key.as_str(), i64::try_from(size_bytes)?).await?;
        self.stored_bytes = size_bytes;
        Ok(())
    }
}
