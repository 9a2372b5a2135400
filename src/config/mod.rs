//! Settings: one struct per role, read once at the start. Nothing else in the program reads the environment, but for the
//! trainer, which takes two variables in the place of flags.
//!
//! Every problem is reported at once, with the variable, what it must be and why the value is not that.
//! An empty variable counts as unset. `.env.example` lists every variable; a test holds the two together.

mod reader;
#[cfg(test)]
mod tests;

use std::{net::SocketAddr, path::PathBuf};

use serde::{Deserialize, Serialize};

pub use self::reader::{ConfigError, Machine};
use self::reader::{Reader, endpoint, filter, log_format, prefix, seconds};

/// A value that `Debug` does not show.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Secret(String);

impl Secret {
    pub fn new(value: impl Into<String>) -> Self {
        Self(value.into())
    }

    /// The value itself, for the one place that needs it.
    pub fn expose(&self) -> &str {
        &self.0
    }
}

impl std::fmt::Debug for Secret {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("***")
    }
}

/// `relora serve`.
#[derive(Debug, Clone)]
pub struct ServeConfig {
    /// `RELORA_BIND`: address and port of the API; port 0 takes a free one. Default 127.0.0.1:8080.
    pub bind: SocketAddr,
    /// `RELORA_DATA_DIR`: folder of the embedded servers and of the scratch space.
    /// Default /var/lib/relora for root, else $XDG_DATA_HOME/relora or ~/.local/share/relora.
    pub data_dir: PathBuf,
    /// None: a private PostgreSQL is started.
    pub database: Option<DatabaseConfig>,
    /// None: an S3 server inside the process is started.
    pub store: Option<StoreConfig>,
    /// `RELORA_MIN_FREE_BYTES`: the embedded store refuses writes below this much free disk. Default 1 GiB.
    pub min_free_bytes: u64,
    /// `RELORA_MAX_UPLOAD_BYTES`: largest upload, of a dataset or a checkpoint. Default 100 GiB.
    pub max_upload_bytes: u64,
    /// `RELORA_LEASE_S`, as in [`AgentConfig`].
    pub lease_s: u64,
    /// `RELORA_STOP_GRACE_S`, as in [`AgentConfig`].
    pub stop_grace_s: u64,
    /// `RELORA_LOCAL_WORKER`: run one worker beside the API. Default: true exactly when the database is embedded.
    pub local_worker: Option<AgentConfig>,
    pub log: LogConfig,
}

/// `relora worker`.
#[derive(Debug, Clone)]
pub struct WorkerConfig {
    pub database: DatabaseConfig,
    pub store: StoreConfig,
    pub agent: AgentConfig,
    pub log: LogConfig,
}

/// `relora train`.
#[derive(Debug, Clone)]
pub struct TrainConfig {
    pub agent: AgentConfig,
    pub log: LogConfig,
}

/// The commands of the client.
#[derive(Debug, Clone)]
pub struct ClientConfig {
    /// `RELORA_URL`: where the API is. Default: what `{data}/client.json` says.
    pub url: String,
    /// `RELORA_API_KEY`: the key to send. Default: what `{data}/client.json` says.
    pub api_key: Secret,
    pub log: LogConfig,
}

/// `{data}/client.json`: what a server that runs on this machine tells its clients.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct ClientFile {
    pub url: String,
    pub api_key: Secret,
}

/// Name of the [`ClientFile`] in the data folder.
pub const CLIENT_FILE: &str = "client.json";

/// Where PostgreSQL is.
#[derive(Debug, Clone)]
pub struct DatabaseConfig {
    /// `DATABASE_URL`: postgres://user:password@host:port/database. Default: embedded in `serve`, needed by `worker`.
    pub url: Secret,
}

/// Where objects are stored.
#[derive(Debug, Clone)]
pub struct StoreConfig {
    /// `S3_ENDPOINT`: URL of an S3-compatible store. Default: AWS if `S3_BUCKET` is set, else embedded in `serve`.
    pub endpoint: Option<String>,
    /// `S3_PUBLIC_ENDPOINT`: the store's URL as clients reach it. Default: none, downloads pass through the API.
    pub public_endpoint: Option<String>,
    /// `S3_BUCKET`: name of the bucket. Default relora.
    pub bucket: String,
    /// `S3_PREFIX`: put in front of every key, 30 bytes at most. Default: none.
    pub prefix: String,
    /// `S3_FORCE_PATH_STYLE`: name the bucket in the path, not in the host. Default: true exactly with `S3_ENDPOINT`.
    pub force_path_style: bool,
    /// `AWS_REGION`. Default us-east-1.
    pub region: String,
    /// `AWS_ACCESS_KEY_ID`. No default.
    pub access_key_id: String,
    /// `AWS_SECRET_ACCESS_KEY`. No default.
    pub secret_access_key: Secret,
    /// `AWS_SESSION_TOKEN`. Default: none.
    pub session_token: Option<Secret>,
}

/// The agent that claims work on a host, in `worker` and inside `serve`.
#[derive(Debug, Clone)]
pub struct AgentConfig {
    /// `RELORA_WORKER_NAME`: how the worker is shown. Default: the host's name.
    pub name: String,
    /// `RELORA_WORK_DIR`: scratch space. Default {data}/work.
    pub work_dir: PathBuf,
    /// `RELORA_TRAINER`: the trainer's executable. Default: relora-trainer beside this executable.
    pub trainer: PathBuf,
    /// `RELORA_TRAINER_THREADS`: CPU threads of one trainer. Default: every core.
    pub trainer_threads: usize,
    /// `RELORA_LEASE_S`: how long a worker may be silent before its work is given to another. Default 30.
    pub lease_s: u64,
    /// `RELORA_STOP_GRACE_S`: how long a stop waits for running work to save its state. Default 30.
    pub stop_grace_s: u64,
    /// `RELORA_MAX_OUTAGE_S`: how long work is kept, held in memory, while the database does not answer. Default 86400.
    pub max_outage_s: u64,
    /// `CUDA_VISIBLE_DEVICES`: the GPUs to use, in the driver's own terms. Default: all.
    pub visible_gpus: Option<String>,
    /// `RELORA_MAX_LOCAL_BYTES`: what of a running job may wait on the disk for the store before training is held.
    /// Default: half of what is free when an attempt begins, divided by the number of GPUs.
    pub max_local_bytes: Option<u64>,
    /// `RELORA_CHECKPOINT_LAG_S`: a job's log tells of what has waited for the store for longer. Default 60.
    pub checkpoint_lag_s: u64,
}

/// How to log.
#[derive(Debug, Clone)]
pub struct LogConfig {
    /// `RELORA_LOG`: a filter in the form of tracing's directives. Default: info, and errors of the S3 libraries.
    pub filter: String,
    /// `RELORA_LOG_FORMAT`: text or json. Default text.
    pub format: LogFormat,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LogFormat {
    Text,
    Json,
}

/// On a GPU, a trainer's own fused kernels in the place of libtorch's operations; it inherits the variable from its worker.
pub const CUDA_KERNELS: &str = "RELORA_CUDA_KERNELS";
/// The same with the pass over a micro-batch as one launch of those kernels.
pub const CUDA_GRAPHS: &str = "RELORA_CUDA_GRAPHS";

const DEFAULT_FILTER: &str = "info,s3s=error,s3s_fs=error,aws_smithy_runtime=error";
const GIB: u64 = 1 << 30;

impl ServeConfig {
    /// The settings of this process.
    pub fn from_env() -> Result<Self, ConfigError> {
        Self::read(&reader::process_variable, &Machine::this())
    }

    /// The settings that `lookup` gives.
    pub fn read(lookup: &dyn Fn(&str) -> Option<String>, machine: &Machine) -> Result<Self, ConfigError> {
        let mut reader = Reader::new(lookup, machine);
        let data_dir = reader.data_dir();
        let agent = AgentConfig::read_part(&mut reader, &data_dir);
        let database = DatabaseConfig::read_part(&mut reader);
        let local_worker = reader.value("RELORA_LOCAL_WORKER", "true or false", database.is_none(), str::parse);
        let config = Self {
            bind: reader.value(
                "RELORA_BIND",
                "an address and a port, such as 127.0.0.1:8080",
                SocketAddr::from(([127, 0, 0, 1], 8080)),
                str::parse,
            ),
            store: StoreConfig::read_part(&mut reader),
            min_free_bytes: reader.value("RELORA_MIN_FREE_BYTES", "a number of bytes", GIB, str::parse),
            max_upload_bytes: reader.value("RELORA_MAX_UPLOAD_BYTES", "a number of bytes", 100 * GIB, str::parse),
            lease_s: agent.lease_s,
            stop_grace_s: agent.stop_grace_s,
            local_worker: local_worker.then_some(agent),
            log: LogConfig::read_part(&mut reader),
            data_dir,
            database,
        };
        reader.finish(config)
    }
}

impl TrainConfig {
    /// The settings of this process.
    pub fn from_env() -> Result<Self, ConfigError> {
        let machine = Machine::this();
        let mut reader = Reader::new(&reader::process_variable, &machine);
        let data_dir = reader.data_dir();
        let config =
            Self { agent: AgentConfig::read_part(&mut reader, &data_dir), log: LogConfig::read_part(&mut reader) };
        reader.finish(config)
    }
}

impl WorkerConfig {
    /// The settings of this process.
    pub fn from_env() -> Result<Self, ConfigError> {
        Self::read(&reader::process_variable, &Machine::this())
    }

    /// The settings that `lookup` gives.
    pub fn read(lookup: &dyn Fn(&str) -> Option<String>, machine: &Machine) -> Result<Self, ConfigError> {
        let mut reader = Reader::new(lookup, machine);
        let data_dir = reader.data_dir();
        let database = DatabaseConfig::read_part(&mut reader);
        let store = StoreConfig::read_part(&mut reader);
        let agent = AgentConfig::read_part(&mut reader, &data_dir);
        let log = LogConfig::read_part(&mut reader);
        if database.is_none() {
            reader.missing("DATABASE_URL", "the server's database; a server without one runs its own worker");
        }
        if store.is_none() {
            reader.missing("S3_BUCKET", "the server's store (with S3_ENDPOINT unless it is AWS)");
        }
        match (database, store) {
            (Some(database), Some(store)) => reader.finish(Self { database, store, agent, log }),
            _ => Err(reader.into_error()),
        }
    }
}

impl ClientConfig {
    /// The settings of this process; what its arguments say comes before its variables.
    pub fn from_args(url: Option<String>, api_key: Option<String>) -> Result<Self, ConfigError> {
        let lookup = |name: &str| {
            let argument = match name {
                "RELORA_URL" => url.clone(),
                "RELORA_API_KEY" => api_key.clone(),
                _ => None,
            };
            argument.or_else(|| reader::process_variable(name))
        };
        Self::read(&lookup, &Machine::this())
    }

    /// The settings that `lookup` gives, and for what it does not give those of the data folder.
    pub fn read(lookup: &dyn Fn(&str) -> Option<String>, machine: &Machine) -> Result<Self, ConfigError> {
        let mut reader = Reader::new(lookup, machine);
        let log = LogConfig::read_part(&mut reader);
        let path = reader.data_dir().join(CLIENT_FILE);
        let (url, api_key) = (reader.optional("RELORA_URL", "a URL", endpoint), reader.text("RELORA_API_KEY"));
        let file = match (&url, &api_key) {
            (Some(_), Some(_)) => None,
            _ => reader.client_file(&path),
        };
        let url = url.or(file.as_ref().map(|file| file.url.clone()));
        let api_key = api_key.map(Secret).or(file.map(|file| file.api_key));
        let hint = format!("; a server on this machine writes it to {}", path.display());
        if url.is_none() {
            reader.missing("RELORA_URL", &format!("the URL of the API{hint}"));
        }
        if api_key.is_none() {
            reader.missing("RELORA_API_KEY", &format!("an API key{hint}"));
        }
        match (url, api_key) {
            (Some(url), Some(api_key)) => reader.finish(Self { url, api_key, log }),
            _ => Err(reader.into_error()),
        }
    }
}

impl DatabaseConfig {
    /// The settings of this process.
    pub fn from_env() -> Result<Self, ConfigError> {
        let machine = Machine::this();
        let mut reader = Reader::new(&reader::process_variable, &machine);
        match Self::read_part(&mut reader) {
            Some(config) => reader.finish(config),
            None => {
                let why =
                    "the database of the server; `relora serve` migrates a private one, which nobody else can reach";
                reader.missing("DATABASE_URL", why);
                Err(reader.into_error())
            }
        }
    }

    fn read_part(reader: &mut Reader<'_>) -> Option<Self> {
        let url = reader.text("DATABASE_URL")?;
        if !url.starts_with("postgres://") && !url.starts_with("postgresql://") {
            // The value is not shown: it holds a password.
            reader.problem("DATABASE_URL", "expected a URL that begins with postgres://");
        }
        Some(Self { url: Secret(url) })
    }
}

impl StoreConfig {
    /// The settings of this process.
    pub fn from_env() -> Result<Self, ConfigError> {
        let machine = Machine::this();
        let mut reader = Reader::new(&reader::process_variable, &machine);
        match Self::read_part(&mut reader) {
            Some(config) => reader.finish(config),
            None => {
                let needed =
                    "the store's bucket, or S3_ENDPOINT its URL; the embedded store needs neither, nor a check";
                reader.missing("S3_BUCKET", needed);
                Err(reader.into_error())
            }
        }
    }

    fn read_part(reader: &mut Reader<'_>) -> Option<Self> {
        let url = "a URL with http:// or https:// and without a path";
        let endpoint_url = reader.optional("S3_ENDPOINT", url, endpoint);
        let bucket = reader.text("S3_BUCKET");
        let is_external = endpoint_url.is_some() || bucket.is_some();
        let access_key_id = reader.text("AWS_ACCESS_KEY_ID");
        let secret_access_key = reader.text("AWS_SECRET_ACCESS_KEY");
        if is_external {
            let why = "needed when S3_ENDPOINT or S3_BUCKET is set";
            access_key_id.is_none().then(|| reader.missing("AWS_ACCESS_KEY_ID", why));
            secret_access_key.is_none().then(|| reader.missing("AWS_SECRET_ACCESS_KEY", why));
        }
        let store = Self {
            public_endpoint: reader.optional("S3_PUBLIC_ENDPOINT", url, endpoint),
            bucket: bucket.unwrap_or_else(|| "relora".to_owned()),
            prefix: reader.optional("S3_PREFIX", "folder names, 30 bytes at most", prefix).unwrap_or_default(),
            force_path_style: reader.value("S3_FORCE_PATH_STYLE", "true or false", endpoint_url.is_some(), str::parse),
            region: reader.text("AWS_REGION").unwrap_or_else(|| "us-east-1".to_owned()),
            access_key_id: access_key_id.unwrap_or_default(),
            secret_access_key: Secret(secret_access_key.unwrap_or_default()),
            session_token: reader.text("AWS_SESSION_TOKEN").map(Secret),
            endpoint: endpoint_url,
        };
        is_external.then_some(store)
    }
}

impl AgentConfig {
    fn read_part(reader: &mut Reader<'_>, data_dir: &std::path::Path) -> Self {
        let machine = reader.machine();
        Self {
            name: reader.text("RELORA_WORKER_NAME").unwrap_or_else(|| machine.hostname.clone()),
            work_dir: reader.path("RELORA_WORK_DIR").unwrap_or_else(|| data_dir.join("work")),
            trainer: reader.path("RELORA_TRAINER").unwrap_or_else(|| machine.executable_dir.join("relora-trainer")),
            trainer_threads: reader
                .value(
                    "RELORA_TRAINER_THREADS",
                    "a number above 0",
                    machine.num_cores,
                    str::parse::<std::num::NonZero<usize>>,
                )
                .get(),
            lease_s: reader.value("RELORA_LEASE_S", "a number of seconds from 1 to 3600", 30, seconds(1..=3600)),
            stop_grace_s: reader.value(
                "RELORA_STOP_GRACE_S",
                "a number of seconds from 0 to 3600",
                30,
                seconds(0..=3600),
            ),
            max_outage_s: reader.value(
                "RELORA_MAX_OUTAGE_S",
                "a number of seconds from 1 to 31536000",
                86_400,
                seconds(1..=31_536_000),
            ),
            visible_gpus: reader.text("CUDA_VISIBLE_DEVICES"),
            max_local_bytes: reader.optional("RELORA_MAX_LOCAL_BYTES", "a number of bytes", str::parse),
            checkpoint_lag_s: reader.value(
                "RELORA_CHECKPOINT_LAG_S",
                "a number of seconds from 1 to 86400",
                60,
                seconds(1..=86_400),
            ),
        }
    }
}

impl LogConfig {
    fn read_part(reader: &mut Reader<'_>) -> Self {
        Self {
            filter: reader.value(
                "RELORA_LOG",
                "a filter, such as info,relora=debug",
                DEFAULT_FILTER.to_owned(),
                filter,
            ),
            format: reader.value("RELORA_LOG_FORMAT", "text or json", LogFormat::Text, log_format),
        }
    }
}
