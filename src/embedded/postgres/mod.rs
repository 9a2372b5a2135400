//! A private PostgreSQL from the system's own binaries: one data folder, one unix socket, no network.
//!
//! Invariant: what a killed server left running is stopped before another is started on the same data.

mod binaries;
mod leftover;
#[cfg(test)]
mod tests;

use std::{
    fs::{self, DirBuilder, File},
    os::unix::fs::{DirBuilderExt, MetadataExt},
    path::{Path, PathBuf},
    process::{ExitStatus, Stdio},
    time::Duration,
};

use anyhow::{Context, bail, ensure};
use rustix::process::{Pid, Signal, kill_process};
use sha2::{Digest, Sha256};
use tokio::{
    process::{Child, Command},
    time::{Instant, sleep, timeout},
};

use self::binaries::Binaries;
use super::{account::Account, lock::FolderLock};

/// The superuser of the private server; only its socket's owner and root reach it.
const USER: &str = "relora";
/// A unix socket's path holds this many bytes at most.
const MAX_SOCKET_PATH_BYTES: usize = 107;
const SOCKET_FILE: &str = ".s.PGSQL.5432";
const SOCKET_LOCK_FILE: &str = ".s.PGSQL.5432.lock";
/// Recovery after a crash may replay much of the log.
const START_TIMEOUT: Duration = Duration::from_secs(300);
const STOP_TIMEOUT: Duration = Duration::from_secs(60);

/// A running private PostgreSQL. Dropping it asks it to stop; [`Postgres::stop`] also waits for that.
#[derive(Debug)]
pub struct Postgres {
    child: Child,
    url: String,
    _lock: FolderLock,
}

/// Where one server keeps what, and whom it runs as.
struct Layout {
    account: Account,
    folder: PathBuf,
    data: PathBuf,
    log: PathBuf,
    socket_folder: PathBuf,
}

impl Postgres {
    /// Starts the server whose data lies in `{data_dir}/postgres`; creates the data at the first start.
    pub async fn start(data_dir: &Path) -> anyhow::Result<Self> {
        let layout = Layout::prepare(data_dir)?;
        let lock = FolderLock::take(&layout.folder)?;
        // A new log for every server: the file must not grow for ever.
        File::create(&layout.log).with_context(|| format!("create {}", layout.log.display()))?;
        let binaries = Binaries::find(&layout.data).await?;
        if layout.data.join("PG_VERSION").exists() {
            leftover::stop(&layout.data, &layout.socket_folder.join(SOCKET_LOCK_FILE)).await?;
        } else {
            layout.initialise(&binaries).await?;
        }
        let mut postgres = Self { child: layout.spawn(&binaries)?, url: layout.url()?, _lock: lock };
        postgres.wait_until_ready(&layout).await?;
        tracing::info!(postgres.data = %layout.data.display(), "started the embedded PostgreSQL");
        Ok(postgres)
    }

    /// The URL to connect to.
    pub fn url(&self) -> &str {
        &self.url
    }

    /// Disconnects every client, writes everything out and ends.
    pub async fn stop(mut self) -> anyhow::Result<()> {
        self.signal(Signal::INT);
        let status = match timeout(STOP_TIMEOUT, self.child.wait()).await {
            Ok(status) => status,
            Err(_) => {
                tracing::warn!("the embedded PostgreSQL did not stop in time and recovers at its next start");
                self.signal(Signal::QUIT);
                self.child.wait().await
            }
        };
        let status = status.context("wait for the embedded PostgreSQL")?;
        ensure!(status.success(), "the embedded PostgreSQL ended with {status}");
        Ok(())
    }

    async fn wait_until_ready(&mut self, layout: &Layout) -> anyhow::Result<()> {
        let deadline = Instant::now() + START_TIMEOUT;
        while !layout.is_ready(self.child.id()) {
            if let Some(status) = self.child.try_wait().context("look after the embedded PostgreSQL")? {
                bail!(layout.failure("start PostgreSQL", status));
            }
            ensure!(
                Instant::now() < deadline,
                "PostgreSQL is not ready after {START_TIMEOUT:?}: see {}",
                layout.log.display()
            );
            sleep(Duration::from_millis(10)).await;
        }
        Ok(())
    }

    /// The child has not been waited for while it has a number, so that the number is still its own.
    fn signal(&self, signal: Signal) {
        if let Some(pid) = self.child.id().and_then(|pid| Pid::from_raw(pid.cast_signed())) {
            // A child that has just ended needs no signal.
            let _ = kill_process(pid, signal);
        }
    }
}

impl Drop for Postgres {
    fn drop(&mut self) {
        self.signal(Signal::INT);
    }
}

impl Layout {
    /// Creates the folders and checks that the server's account reaches them.
    fn prepare(data_dir: &Path) -> anyhow::Result<Self> {
        fs::create_dir_all(data_dir).with_context(|| format!("create {}", data_dir.display()))?;
        let data_dir = data_dir.canonicalize().with_context(|| format!("look at {}", data_dir.display()))?;
        let account = Account::choose()?;
        account.check_can_reach(&data_dir)?;
        let folder = data_dir.join("postgres");
        private_folder(&folder, &account)?;
        let socket_folder = socket_folder(&folder);
        private_folder(&socket_folder, &account)?;
        Ok(Self { account, data: folder.join("data"), log: folder.join("log"), socket_folder, folder })
    }

    /// Creates the data under another name first, so that data with the final name is always complete.
    async fn initialise(&self, binaries: &Binaries) -> anyhow::Result<()> {
        let unfinished = self.folder.join("data.new");
        if unfinished.exists() {
            fs::remove_dir_all(&unfinished).with_context(|| format!("remove {}", unfinished.display()))?;
        }
        let mut command = self.command(&binaries.initdb)?;
        command
            .args(["--encoding=UTF8", "--locale=C", "--auth=trust", "--username", USER, "--pgdata"])
            .arg(&unfinished);
        let status = command.status().await.context("run initdb")?;
        if !status.success() {
            bail!(self.failure("create the PostgreSQL data with initdb", status));
        }
        fs::rename(&unfinished, &self.data).with_context(|| format!("rename {}", unfinished.display()))
    }

    fn spawn(&self, binaries: &Binaries) -> anyhow::Result<Child> {
        let socket_folder = self.socket_folder.to_str().context("the data folder's path is not UTF-8")?;
        let mut command = self.command(&binaries.postgres)?;
        command.arg("-D").arg(&self.data);
        // The port is only a part of the socket's name; PGPORT of the environment must not change it.
        let socket_setting = format!("unix_socket_directories={socket_folder}");
        for setting in [
            "listen_addresses=",
            "port=5432",
            &socket_setting,
            "unix_socket_permissions=0700",
            "max_connections=100",
            "shared_buffers=64MB",
            "log_checkpoints=off",
        ] {
            command.args(["-c", setting]);
        }
        command.spawn().with_context(|| format!("run {}", binaries.postgres.display()))
    }

    /// A command of the server's account, in a process group of its own: a terminal's Ctrl-C is for us,
    /// and we stop the server after everything that uses it.
    fn command(&self, program: &Path) -> anyhow::Result<Command> {
        let log =
            File::options().append(true).open(&self.log).with_context(|| format!("open {}", self.log.display()))?;
        let mut command = Command::new(program);
        command.current_dir(&self.folder).stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log).process_group(0);
        self.account.apply(&mut command);
        Ok(command)
    }

    /// The server writes its state to the eighth line of its pid file.
    fn is_ready(&self, child: Option<u32>) -> bool {
        let text = fs::read_to_string(self.data.join("postmaster.pid")).unwrap_or_default();
        let lines: Vec<&str> = text.lines().collect();
        lines.first().and_then(|line| line.parse().ok()) == child
            && lines.get(7).is_some_and(|state| state.trim_end() == "ready")
    }

    /// The default database of a new PostgreSQL serves: nobody else uses this server.
    fn url(&self) -> anyhow::Result<String> {
        let socket_folder = self.socket_folder.to_str().context("the data folder's path is not UTF-8")?;
        let base = format!("postgres://{USER}@localhost:5432/postgres");
        let query = [("host", socket_folder), ("sslmode", "disable")];
        Ok(reqwest::Url::parse_with_params(&base, query)?.into())
    }

    fn failure(&self, what: &str, status: ExitStatus) -> String {
        let log = fs::read(&self.log).unwrap_or_default();
        let log = String::from_utf8_lossy(&log);
        let lines: Vec<&str> = log.lines().collect();
        let tail = lines[lines.len().saturating_sub(15)..].join("\n  ");
        format!("cannot {what}: it ended with {status}; the end of {}:\n  {tail}", self.log.display())
    }
}

/// Beside the data, or under a short name where that path is too long for a socket.
fn socket_folder(folder: &Path) -> PathBuf {
    let beside = folder.join("socket");
    if beside.join(SOCKET_FILE).as_os_str().len() <= MAX_SOCKET_PATH_BYTES {
        return beside;
    }
    let digest = hex::encode(Sha256::digest(folder.as_os_str().as_encoded_bytes()));
    Path::new("/tmp").join(format!("relora-{}", &digest[..16]))
}

/// Creates a folder that only the account enters. One that somebody else made in its place is refused.
fn private_folder(path: &Path, account: &Account) -> anyhow::Result<()> {
    match DirBuilder::new().mode(0o700).create(path) {
        Ok(()) => account.own(path),
        Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => {
            let metadata = path.symlink_metadata().with_context(|| format!("look at {}", path.display()))?;
            let is_ours = metadata.is_dir() && metadata.mode() & 0o077 == 0 && metadata.uid() == account.uid();
            ensure!(
                is_ours,
                "{} exists and is not a folder that only user {} may enter: remove it, or choose another folder with \
                 RELORA_DATA_DIR",
                path.display(),
                account.uid()
            );
            Ok(())
        }
        Err(error) => Err(error).with_context(|| format!("create {}", path.display())),
    }
}
