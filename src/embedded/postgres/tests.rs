use std::{fs, os::unix::fs::PermissionsExt, path::Path, time::Instant};

use rustix::process::{Pid, Signal, kill_process};
use sqlx::{Connection, PgConnection};

use super::{Account, Postgres, socket_folder};

/// A folder that every account may enter.
fn folder() -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    fs::set_permissions(folder.path(), fs::Permissions::from_mode(0o755)).unwrap();
    folder
}

async fn connect(postgres: &Postgres) -> PgConnection {
    PgConnection::connect(postgres.url()).await.unwrap()
}

async fn run(connection: &mut PgConnection, sql: &'static str) -> Option<i64> {
    sqlx::query_scalar(sql).fetch_optional(connection).await.unwrap()
}

fn kill(postgres: &Postgres) {
    kill_process(Pid::from_raw(postgres.child.id().unwrap() as i32).unwrap(), Signal::KILL).unwrap();
}

#[tokio::test]
async fn data_survives_a_stop_and_a_kill() {
    let folder = folder();
    let begin = Instant::now();
    let postgres = Postgres::start(folder.path()).await.unwrap();
    assert!(begin.elapsed().as_secs() < 10);
    let mut connection = connect(&postgres).await;
    run(&mut connection, "create table kept as select 7::bigint as value").await;
    assert_eq!(run(&mut connection, "select 1::bigint where current_setting('fsync') = 'on'").await, Some(1));
    assert_eq!(run(&mut connection, "select 1::bigint where current_setting('listen_addresses') = ''").await, Some(1));
    // An open connection does not hold up the stop.
    postgres.stop().await.unwrap();

    let postgres = Postgres::start(folder.path()).await.unwrap();
    let mut connection = connect(&postgres).await;
    assert_eq!(run(&mut connection, "update kept set value = 8 returning value").await, Some(8));
    kill(&postgres);
    drop(postgres);

    let postgres = Postgres::start(folder.path()).await.unwrap();
    assert_eq!(run(&mut connect(&postgres).await, "select value from kept").await, Some(8));
    postgres.stop().await.unwrap();
}

#[tokio::test]
async fn a_server_that_was_left_running_is_stopped_by_the_next_start() {
    let folder = folder();
    let mut postgres = Postgres::start(folder.path()).await.unwrap();
    run(&mut connect(&postgres).await, "create table kept as select 7::bigint as value").await;
    // As after SIGKILL of the server process: the lock is free, and nobody has asked PostgreSQL to stop.
    let empty = tempfile::tempdir().unwrap();
    postgres._lock = super::FolderLock::take(empty.path()).unwrap();

    let next = Postgres::start(folder.path()).await.unwrap();
    assert!(postgres.child.wait().await.unwrap().success());
    assert_eq!(run(&mut connect(&next).await, "select value from kept").await, Some(7));
    next.stop().await.unwrap();
}

#[tokio::test]
async fn stale_files_that_name_an_unrelated_process_are_harmless() {
    let folder = folder();
    Postgres::start(folder.path()).await.unwrap().stop().await.unwrap();
    // A process of the same account, so that PostgreSQL's own check takes it for a server.
    let mut unrelated = tokio::process::Command::new("sleep");
    Account::choose().unwrap().apply(&mut unrelated);
    let unrelated = unrelated.arg("60").kill_on_drop(true).spawn().unwrap();
    let text = format!("{}\n/x\n0\n5432\n", unrelated.id().unwrap());
    for file in ["data/postmaster.pid", "socket/.s.PGSQL.5432.lock"] {
        fs::write(folder.path().join("postgres").join(file), &text).unwrap();
    }
    Postgres::start(folder.path()).await.unwrap().stop().await.unwrap();
}

#[tokio::test]
async fn a_folder_in_use_is_refused_with_the_process_that_has_it() {
    let folder = folder();
    let postgres = Postgres::start(folder.path()).await.unwrap();
    let error = Postgres::start(folder.path()).await.unwrap_err().to_string();
    assert!(error.contains(&format!("process {}", std::process::id())), "{error}");
    postgres.stop().await.unwrap();
}

#[tokio::test]
async fn a_failed_start_shows_what_postgres_said() {
    let folder = folder();
    Postgres::start(folder.path()).await.unwrap().stop().await.unwrap();
    fs::write(folder.path().join("postgres/data/postgresql.conf"), "no_such_setting = 1\n").unwrap();
    let error = Postgres::start(folder.path()).await.unwrap_err().to_string();
    assert!(error.contains("no_such_setting"), "{error}");
}

#[tokio::test]
async fn data_of_a_version_that_is_not_installed_is_refused_by_name() {
    let folder = folder();
    Postgres::start(folder.path()).await.unwrap().stop().await.unwrap();
    fs::write(folder.path().join("postgres/data/PG_VERSION"), "9\n").unwrap();
    let error = Postgres::start(folder.path()).await.unwrap_err().to_string();
    assert!(error.contains("PostgreSQL 9, which is not installed"), "{error}");
}

#[tokio::test]
async fn a_folder_that_the_servers_account_cannot_enter_is_named() {
    if !rustix::process::geteuid().is_root() {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    fs::set_permissions(folder.path(), fs::Permissions::from_mode(0o700)).unwrap();
    let error = Postgres::start(&folder.path().join("below")).await.unwrap_err().to_string();
    assert!(error.contains(&format!("cannot enter {} (mode 700)", folder.path().display())), "{error}");
    assert!(error.contains("RELORA_DATA_DIR"), "{error}");
}

#[test]
fn a_long_path_gets_a_short_socket() {
    let short = Path::new("/var/lib/relora/postgres");
    assert_eq!(socket_folder(short), short.join("socket"));
    let long = socket_folder(&Path::new("/srv").join("x".repeat(90)));
    assert!(long.starts_with("/tmp") && long.as_os_str().len() < 40);
}
