//! An S3 server inside the process, on loopback, over a folder of plain files.
//!
//! Port and credentials are made once and kept beside the objects, so that a worker which outlives the
//! server finds it again.

mod durable;
mod listing;
mod recovery;
#[cfg(test)]
mod tests;

use std::{
    fs,
    io::Write,
    net::{Ipv4Addr, SocketAddr},
    os::unix::fs::{DirBuilderExt, OpenOptionsExt},
    path::Path,
    time::Duration,
};

use anyhow::Context;
use hyper_util::{
    rt::{TokioExecutor, TokioIo},
    server::{conn::auto, graceful::GracefulShutdown},
};
use s3s::{
    auth::SimpleAuth,
    service::{S3Service, S3ServiceBuilder},
};
use serde::{Deserialize, Serialize};
use tokio::{net::TcpListener, task::JoinHandle, time::timeout};
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use self::durable::DurableFiles;
use super::lock::FolderLock;
use crate::config::{Secret, StoreConfig};

/// The one bucket. A longer name would leave less room for keys: both are part of a file's name.
const BUCKET: &str = "relora";
/// How long a stop waits for requests that are being answered.
const STOP_TIMEOUT: Duration = Duration::from_secs(10);

/// A running S3 server. Dropping it ends it without waiting for requests.
#[derive(Debug)]
pub struct S3 {
    store: StoreConfig,
    stop: CancellationToken,
    task: JoinHandle<()>,
    _lock: FolderLock,
}

/// What has to be the same at the next start.
#[derive(Serialize, Deserialize)]
struct Access {
    port: u16,
    access_key_id: String,
    secret_access_key: Secret,
}

impl S3 {
    /// Starts the server whose objects lie in `{data_dir}/s3`. Writes are refused while less than
    /// `min_free_bytes` of the disk would remain: PostgreSQL on the same disk must never meet a full one.
    pub async fn start(data_dir: &Path, min_free_bytes: u64) -> anyhow::Result<Self> {
        // Others enter the data folder too; this part of it is private.
        fs::create_dir_all(data_dir).with_context(|| format!("create {}", data_dir.display()))?;
        let folder = data_dir.join("s3");
        let root = folder.join("objects");
        fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(root.join(BUCKET))
            .with_context(|| format!("create {}", root.display()))?;
        let root = root.canonicalize().with_context(|| format!("look at {}", root.display()))?;
        let lock = FolderLock::take(&folder)?;
        recovery::clean(&root).with_context(|| format!("clean {}", root.display()))?;

        let (listener, access) = listen(&folder.join("access.json")).await?;
        let files = DurableFiles::open(root, min_free_bytes)?;
        let mut service = S3ServiceBuilder::new(files);
        service.set_auth(SimpleAuth::from_single(access.access_key_id.clone(), access.secret_access_key.expose()));
        let stop = CancellationToken::new();
        let task = tokio::spawn(serve(listener, service.build(), stop.clone()));
        let store = access.into_store_config();
        tracing::info!(s3.endpoint = store.endpoint, "started the embedded S3 server");
        Ok(Self { store, stop, task, _lock: lock })
    }

    /// How to reach the server.
    pub fn store(&self) -> &StoreConfig {
        &self.store
    }

    /// Takes no more requests and waits for those that are being answered.
    pub async fn stop(mut self) -> anyhow::Result<()> {
        self.stop.cancel();
        (&mut self.task).await.context("stop the embedded S3 server")
    }
}

impl Drop for S3 {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Access {
    fn into_store_config(self) -> StoreConfig {
        StoreConfig {
            endpoint: Some(format!("http://127.0.0.1:{}", self.port)),
            public_endpoint: None,
            bucket: BUCKET.to_owned(),
            prefix: String::new(),
            force_path_style: true,
            region: "us-east-1".to_owned(),
            access_key_id: self.access_key_id,
            secret_access_key: self.secret_access_key,
            session_token: None,
        }
    }
}

/// Listens where the server did before, or on a free port.
async fn listen(path: &Path) -> anyhow::Result<(TcpListener, Access)> {
    let kept = fs::read(path).ok().and_then(|text| serde_json::from_slice::<Access>(&text).ok());
    let mut access = kept.unwrap_or_else(|| Access {
        port: 0,
        access_key_id: Uuid::new_v4().simple().to_string(),
        secret_access_key: Secret::new(Uuid::new_v4().simple().to_string()),
    });
    let address = |port| SocketAddr::from((Ipv4Addr::LOCALHOST, port));
    let listener = match TcpListener::bind(address(access.port)).await {
        Ok(listener) => listener,
        Err(_) => TcpListener::bind(address(0)).await.context("listen on 127.0.0.1")?,
    };
    access.port = listener.local_addr().context("listen on 127.0.0.1")?.port();
    write_access(path, &access).with_context(|| format!("write {}", path.display()))?;
    Ok((listener, access))
}

fn write_access(path: &Path, access: &Access) -> anyhow::Result<()> {
    let unfinished = path.with_extension("new");
    let mut file = fs::OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&unfinished)?;
    file.write_all(&serde_json::to_vec(access)?)?;
    file.sync_all()?;
    Ok(fs::rename(unfinished, path)?)
}

async fn serve(listener: TcpListener, service: S3Service, stop: CancellationToken) {
    let http = auto::Builder::new(TokioExecutor::new()).http1_only();
    let connections = GracefulShutdown::new();
    while let Some(accepted) = stop.run_until_cancelled(listener.accept()).await {
        let stream = match accepted {
            Ok((stream, _)) => stream,
            Err(error) => {
                // Such as too many open files: some will be closed.
                tracing::warn!(error = %error, "the embedded S3 server cannot take a connection");
                tokio::time::sleep(Duration::from_millis(100)).await;
                continue;
            }
        };
        let connection = http.serve_connection(TokioIo::new(stream), service.clone()).into_owned();
        let connection = connections.watch(connection);
        tokio::spawn(async move {
            if let Err(error) = connection.await {
                tracing::debug!(error = %error, "a connection to the embedded S3 server broke");
            }
        });
    }
    if timeout(STOP_TIMEOUT, connections.shutdown()).await.is_err() {
        tracing::warn!("the embedded S3 server stopped while requests were being answered");
    }
}
