use std::{
    cell::RefCell,
    collections::{BTreeMap, BTreeSet},
    num::NonZero,
    path::{Path, PathBuf},
};

use super::{
    CUDA_GRAPHS, CUDA_KERNELS, ClientConfig, ClientFile, LogFormat, Machine, Secret, ServeConfig, WorkerConfig,
};

fn machine() -> Machine {
    Machine {
        is_root: true,
        executable_dir: PathBuf::from("/opt/relora"),
        hostname: "host".to_owned(),
        num_cores: NonZero::new(4).unwrap(),
    }
}

fn lookup<'a>(variables: &'a [(&'a str, &'a str)]) -> impl Fn(&str) -> Option<String> + 'a {
    |name| variables.iter().find(|(known, _)| *known == name).map(|(_, value)| (*value).to_owned())
}

fn serve(variables: &[(&str, &str)]) -> Result<ServeConfig, super::ConfigError> {
    ServeConfig::read(&lookup(variables), &machine())
}

/// The names and sample values of `.env.example`.
fn samples() -> BTreeMap<String, String> {
    include_str!("../../.env.example")
        .lines()
        .filter_map(|line| line.strip_prefix('#'))
        .filter(|line| line.starts_with(|c: char| c.is_ascii_uppercase()) && !line.contains(' '))
        .map(|line| line.split_once('=').unwrap())
        .map(|(name, value)| (name.to_owned(), value.to_owned()))
        .collect()
}

#[test]
fn the_sample_file_names_exactly_the_variables_that_are_read() {
    let read = RefCell::new(BTreeSet::new());
    let record = |name: &str| {
        read.borrow_mut().insert(name.to_owned());
        None
    };
    // Reading fails where something is missing; which names it asked for is what counts.
    let not_root = Machine { is_root: false, ..machine() };
    let _ = ServeConfig::read(&record, &not_root);
    let _ = WorkerConfig::read(&record, &not_root);
    let _ = ClientConfig::read(&record, &not_root);
    for foreign in ["HOME", "XDG_DATA_HOME"] {
        assert!(read.borrow_mut().remove(foreign));
    }
    read.borrow_mut().extend([CUDA_KERNELS, CUDA_GRAPHS].map(str::to_owned));
    assert_eq!(samples().into_keys().collect::<BTreeSet<_>>(), read.into_inner());
}

#[test]
fn the_sample_values_are_valid_for_every_role() {
    let samples = samples();
    let lookup = |name: &str| samples.get(name).cloned();
    ServeConfig::read(&lookup, &machine()).unwrap();
    WorkerConfig::read(&lookup, &machine()).unwrap();
    ClientConfig::read(&lookup, &machine()).unwrap();
}

#[test]
fn defaults_that_the_sample_file_shows_are_the_defaults() {
    let samples = samples();
    let config = serve(&[]).unwrap();
    let agent = config.local_worker.as_ref().unwrap();
    let shown = [
        ("RELORA_BIND", config.bind.to_string()),
        ("RELORA_DATA_DIR", config.data_dir.display().to_string()),
        ("RELORA_MAX_UPLOAD_BYTES", config.max_upload_bytes.to_string()),
        ("RELORA_MIN_FREE_BYTES", config.min_free_bytes.to_string()),
        ("RELORA_WORK_DIR", agent.work_dir.display().to_string()),
        ("RELORA_LEASE_S", agent.lease_s.to_string()),
        ("RELORA_STOP_GRACE_S", agent.stop_grace_s.to_string()),
        ("RELORA_CHECKPOINT_LAG_S", agent.checkpoint_lag_s.to_string()),
        ("RELORA_LOG", config.log.filter.clone()),
    ];
    for (name, value) in shown {
        assert_eq!(samples[name], value, "{name}");
    }
}

#[test]
fn a_server_without_settings_embeds_everything() {
    let config = serve(&[("S3_ENDPOINT", ""), ("DATABASE_URL", " ")]).unwrap();
    assert!(config.database.is_none() && config.store.is_none());
    assert_eq!(config.local_worker.unwrap().trainer, Path::new("/opt/relora/relora-trainer"));
    assert_eq!(config.log.format, LogFormat::Text);
}

#[test]
fn a_server_with_a_database_runs_no_worker_unless_asked() {
    let database = ("DATABASE_URL", "postgres://db/relora");
    assert!(serve(&[database]).unwrap().local_worker.is_none());
    assert!(serve(&[database, ("RELORA_LOCAL_WORKER", "true")]).unwrap().local_worker.is_some());
}

#[test]
fn a_bucket_alone_is_on_aws_and_an_endpoint_alone_has_the_default_bucket() {
    let keys = [("AWS_ACCESS_KEY_ID", "id"), ("AWS_SECRET_ACCESS_KEY", "secret")];
    let aws = serve(&[keys[0], keys[1], ("S3_BUCKET", "mine")]).unwrap().store.unwrap();
    assert_eq!((aws.endpoint, aws.bucket.as_str(), aws.force_path_style), (None, "mine", false));
    let own = serve(&[keys[0], keys[1], ("S3_ENDPOINT", "http://s3:9000/")]).unwrap().store.unwrap();
    assert_eq!((own.endpoint.as_deref(), own.bucket.as_str()), (Some("http://s3:9000"), "relora"));
    assert!(own.force_path_style);
}

#[test]
fn every_bad_variable_is_reported_with_its_type_and_reason() {
    let error = serve(&[
        ("RELORA_BIND", "localhost"),
        ("RELORA_LEASE_S", "0"),
        ("RELORA_TRAINER_THREADS", "0"),
        ("RELORA_LOG", "a=b=c"),
        ("RELORA_LOG_FORMAT", "xml"),
        ("S3_ENDPOINT", "ftp://s3"),
        ("S3_PREFIX", "a/../b"),
        ("S3_BUCKET", "b"),
        ("DATABASE_URL", "mysql://user:hunter2@db"),
    ])
    .unwrap_err()
    .to_string();
    for name in [
        "RELORA_BIND: expected an address and a port, such as 127.0.0.1:8080, got \"localhost\": ",
        "RELORA_LEASE_S: expected a number of seconds from 1 to 3600, got \"0\": it is outside the range",
        "RELORA_TRAINER_THREADS: ",
        "RELORA_LOG: ",
        "RELORA_LOG_FORMAT: ",
        "S3_ENDPOINT: ",
        "S3_PREFIX: ",
        "AWS_ACCESS_KEY_ID: not set",
        "AWS_SECRET_ACCESS_KEY: not set",
        "DATABASE_URL: expected",
    ] {
        assert!(error.contains(name), "{name} is not in {error}");
    }
    assert!(!error.contains("hunter2"));
}

#[test]
fn a_worker_of_its_own_needs_a_database_and_a_store() {
    let error = WorkerConfig::read(&lookup(&[]), &machine()).unwrap_err();
    assert_eq!(error.problems.len(), 2);
}

#[test]
fn secrets_are_not_shown_by_debug() {
    let variables = [
        ("DATABASE_URL", "postgres://user:hunter2@db/relora"),
        ("S3_BUCKET", "b"),
        ("AWS_ACCESS_KEY_ID", "AKIA"),
        ("AWS_SECRET_ACCESS_KEY", "hunter2"),
        ("AWS_SESSION_TOKEN", "hunter2"),
        ("RELORA_URL", "http://api"),
        ("RELORA_API_KEY", "hunter2"),
    ];
    let worker = WorkerConfig::read(&lookup(&variables), &machine()).unwrap();
    let client = ClientConfig::read(&lookup(&variables), &machine()).unwrap();
    for shown in [format!("{:?}", serve(&variables).unwrap()), format!("{worker:?}"), format!("{client:?}")] {
        assert!(shown.contains("***") && !shown.contains("hunter2"), "{shown}");
    }
}

#[test]
fn a_client_takes_what_a_server_on_this_machine_left() {
    let folder = tempfile::tempdir().unwrap();
    let file = ClientFile { url: "http://127.0.0.1:1".to_owned(), api_key: Secret::new("key") };
    std::fs::write(folder.path().join(super::CLIENT_FILE), serde_json::to_string(&file).unwrap()).unwrap();
    let data_dir = folder.path().to_str().unwrap();
    let client = |variables: &[(&str, &str)]| ClientConfig::read(&lookup(variables), &machine());

    let found = client(&[("RELORA_DATA_DIR", data_dir)]).unwrap();
    assert_eq!((found.url.as_str(), found.api_key.expose()), ("http://127.0.0.1:1", "key"));
    let found = client(&[("RELORA_DATA_DIR", data_dir), ("RELORA_URL", "https://api")]).unwrap();
    assert_eq!((found.url.as_str(), found.api_key.expose()), ("https://api", "key"));
    let error = client(&[("RELORA_DATA_DIR", "/nonexistent")]).unwrap_err();
    assert!(error.to_string().contains("/nonexistent/client.json"));
}
