//! `relora serve`: starts what the configuration leaves to the service itself, then the API and, if
//! wanted, one local worker. The order of starting and stopping is this file.

use std::{
    fs,
    io::Write,
    net::{Ipv4Addr, SocketAddr},
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result};
use sqlx::PgPool;
use tokio::net::TcpListener;

use crate::{
    api,
    config::{CLIENT_FILE, ClientFile, Secret, ServeConfig},
    db::{self, datasets, keys, leases, recovery},
    embedded::{Postgres, S3},
    shutdown::Shutdown,
    storage::Store,
    worker,
};

const MAX_DATABASE_CONNECTIONS: u32 = 16;

/// Serves until told to stop, then stops everything that it started, in reverse.
pub async fn run(config: ServeConfig, shutdown: Shutdown) -> Result<()> {
    let listener =
        TcpListener::bind(config.bind).await.with_context(|| format!("listen on {} (RELORA_BIND)", config.bind))?;
    let address = listener.local_addr()?;

    let postgres = match &config.database {
        Some(_) => None,
        None => Some(Postgres::start(&config.data_dir).await.context("start the embedded PostgreSQL")?),
    };
    let s3 = match &config.store {
        Some(_) => None,
        None => Some(S3::start(&config.data_dir, config.min_free_bytes).await.context("start the embedded S3 server")?),
    };
    let served = serve(&config, listener, postgres.as_ref(), s3.as_ref(), &shutdown).await;

    // Whatever ended the serving, the servers below it are stopped, and the first failure is told.
    let mut outcomes = vec![served];
    if let Some(s3) = s3 {
        outcomes.push(s3.stop().await.context("stop the embedded S3 server"));
    }
    if let Some(postgres) = postgres {
        outcomes.push(postgres.stop().await.context("stop the embedded PostgreSQL"));
    }
    tracing::info!(%address, "stopped");
    outcomes.into_iter().collect()
}

async fn serve(
    config: &ServeConfig,
    listener: TcpListener,
    postgres: Option<&Postgres>,
    s3: Option<&S3>,
    shutdown: &Shutdown,
) -> Result<()> {
    let address = listener.local_addr()?;
    let url = match (&config.database, postgres) {
        (Some(database), _) => database.url.expose().to_owned(),
        (None, Some(postgres)) => postgres.url().to_owned(),
        (None, None) => anyhow::bail!("there is neither a DATABASE_URL nor an embedded PostgreSQL"),
    };
    let pool = db::connect(&url, MAX_DATABASE_CONNECTIONS, config.lease_s)
        .await
        .context("connect to PostgreSQL (DATABASE_URL)")?;
    db::MIGRATOR.run(&pool).await.context("migrate the database")?;
    let store = match (&config.store, s3) {
        (Some(store), _) => Store::connect(store).await?,
        (None, Some(s3)) => Store::connect(s3.store()).await?,
        (None, None) => anyhow::bail!("there is neither an S3 store nor an embedded one"),
    };
    if postgres.is_some() {
        // Nobody else can reach this database, so whoever held a lease is gone.
        leases::expire_all(&pool).await.context("expire the leases of a server that was killed")?;
        recovery::requeue_expired(&pool, 0.0).await.context("requeue the work of a server that was killed")?;
        datasets::fail_all_uploads(&pool).await.context("end the uploads of a server that was killed")?;
    }
    let client_file = write_client_file(&config.data_dir, &pool, address, postgres.is_some()).await?;
    tracing::info!(%address, client.file = %client_file.display(), "serving");

    let working = work(config, pool.clone(), store.clone(), shutdown);
    let limits = api::Limits { max_upload_bytes: config.max_upload_bytes };
    let state = api::AppState::new(pool.clone(), store, shutdown.clone(), limits);
    let serving = async {
        let outcome = api::serve(listener, state, shutdown.clone()).await;
        shutdown.trigger();
        outcome
    };
    let (worked, served) = tokio::join!(working, serving);
    pool.close().await;
    worked.and(served)
}

/// Runs the local worker, if one is wanted. Its failure stops the server: jobs would wait for ever.
async fn work(config: &ServeConfig, pool: PgPool, store: Store, shutdown: &Shutdown) -> Result<()> {
    let Some(agent) = &config.local_worker else {
        // Where no worker lives there is still somebody to notice that they died, and to tidy up.
        tokio::join!(
            shutdown.run_until(worker::take_back_expired(&pool, config.lease_s)),
            shutdown.run_until(worker::collect::run(&pool, &store)),
        );
        return Ok(());
    };
    let outcome = worker::run(agent.clone(), pool, store, shutdown.clone()).await.context("run the local worker");
    shutdown.trigger();
    outcome
}

/// Tells the command line client on this host where the server is, and its key. The key is made at
/// the first start, when there is none yet; only its hash is kept in the database.
async fn write_client_file(
    data_dir: &Path,
    pool: &PgPool,
    bound: SocketAddr,
    private_database: bool,
) -> Result<PathBuf> {
    let path = data_dir.join(CLIENT_FILE);
    let context = || format!("write the client's settings to {} (RELORA_DATA_DIR)", path.display());
    // Before a key is made it is certain that it can be handed over.
    fs::create_dir_all(data_dir).with_context(context)?;
    let temporary = path.with_extension("tmp");
    let mut file = fs::OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o600)
        .open(&temporary)
        .with_context(context)?;

    let url = format!("http://{}", reached_at(bound));
    let api_key = match valid_key(&path, pool).await? {
        Some(key) => key,
        None => match keys::ensure_first_key(pool).await.context("make the first API key")? {
            Some(key) => Secret::new(key),
            None if private_database => {
                Secret::new(keys::create_key(pool, "recovered").await.context("make an API key")?)
            }
            None => {
                tracing::info!("the database has an API key already; only its owner can hand it on");
                fs::remove_file(&temporary).with_context(context)?;
                return Ok(path);
            }
        },
    };
    let json = serde_json::json!({"url": url, "api_key": api_key.expose()});
    file.write_all(&serde_json::to_vec_pretty(&json)?).with_context(context)?;
    file.sync_all().with_context(context)?;
    fs::rename(&temporary, &path).with_context(context)?;
    Ok(path)
}

/// Where a server that is bound to this address is reached from its own host.
fn reached_at(bound: SocketAddr) -> SocketAddr {
    if bound.ip().is_unspecified() { (Ipv4Addr::LOCALHOST, bound.port()).into() } else { bound }
}

/// The key of an earlier start, if this database knows it.
async fn valid_key(path: &Path, pool: &PgPool) -> Result<Option<Secret>> {
    let known = fs::read(path).ok().and_then(|bytes| serde_json::from_slice::<ClientFile>(&bytes).ok());
    let Some(known) = known else { return Ok(None) };
    let grant =
        keys::find_grant(pool, known.api_key.expose()).await.context("look up the API key of an earlier start")?;
    Ok(grant.map(|_| known.api_key))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_server_is_reached_where_it_listens() {
        let reached = |bound: &str| reached_at(bound.parse().expect("an address")).to_string();
        assert_eq!(reached("0.0.0.0:80"), "127.0.0.1:80");
        assert_eq!(reached("10.0.0.5:80"), "10.0.0.5:80");
        assert_eq!(reached("[::1]:80"), "[::1]:80");
    }
}
