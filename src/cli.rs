//! The command line of `relora`: one command per role and per resource. This file parses and
//! dispatches; what a command does is in the module that it belongs to.

use std::{
    io,
    path::{Path, PathBuf},
    process::ExitCode,
};

use anyhow::Context;
use clap::{Args, Parser, Subcommand};
use sqlx::PgPool;

use crate::{
    api,
    client::{self, Http, Outcome},
    config::{ClientConfig, DatabaseConfig, ServeConfig, StoreConfig, TrainConfig, WorkerConfig},
    db, operate, s3_check, serve,
    shutdown::Shutdown,
    telemetry,
    worker::{
        self,
        local::{LocalData, LocalRun},
    },
};

/// A training service for ReLoRA pretraining: server, worker and client.
#[derive(Debug, Parser)]
#[command(version, disable_help_subcommand = true, max_term_width = 100)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Run the API server, with whatever else is not set up: PostgreSQL, an S3 store, a worker.
    Serve,
    /// Run a worker that takes jobs from the database of a server.
    Worker,
    /// Look at the workers of a database, and take them out of service.
    Workers {
        #[command(subcommand)]
        command: operate::Command,
    },
    /// Bring the schema of the database up to date.
    Migrate,
    /// Find out what the S3 store of the settings can do, and how it will be used.
    #[command(name = "s3-check")]
    S3Check {
        /// Also measure how fast it takes a file of so many bytes.
        #[arg(long, value_parser = clap::value_parser!(u64).range(1..))]
        upload_bytes: Option<u64>,
    },
    /// Print the OpenAPI document.
    Openapi,
    /// Train by hand, without a server.
    Train(Train),
    /// Upload text and turn it into tokens.
    Dataset(Client<client::dataset::Command>),
    /// Submit, watch and steer training jobs.
    Job(Client<client::job::Command>),
    /// The full weights that the deltas of a job add to.
    Base(Client<client::node::Command>),
    /// The delta of every restart of a job.
    Restart(Client<client::restart::Command>),
    /// The merged weights of a job, and checkpoints from outside.
    Checkpoint(Client<client::checkpoint::Command>),
    /// What is stored, and how much of it.
    Usage {
        #[command(flatten)]
        server: Server,
        #[arg(long)]
        json: bool,
    },
}

/// What `relora train` is told.
#[derive(Debug, Args)]
struct Train {
    /// A training spec, as it is submitted to a server.
    spec: PathBuf,
    /// The folder for everything that is made.
    #[arg(long)]
    out: PathBuf,
    /// A folder of tokens; by default the folder of the spec.
    #[arg(long)]
    data: Option<PathBuf>,
    /// Text to tokenize first: a file, or JSON lines with a \"text\" each.
    #[arg(long, conflicts_with = "data")]
    text: Option<PathBuf>,
    /// The folder of a checkpoint to begin with: a LLaMA model as `transformers` stores it.
    #[arg(long)]
    weights: Option<PathBuf>,
    /// Vocabulary of the tokenizer that is learned from --text; by default 8192, or with --weights the checkpoint's own
    /// tokenizer.
    #[arg(long, value_parser = clap::value_parser!(i64).range(260..=65_536))]
    vocab_size: Option<i64>,
    /// Share of the documents of --text that is held out.
    #[arg(long, default_value_t = 0.05)]
    validation_frac: f64,
    /// CPU threads; by default RELORA_TRAINER_THREADS, else all cores.
    #[arg(long)]
    threads: Option<usize>,
    /// Go on from the newest state in --out.
    #[arg(long)]
    resume: bool,
    /// A file for the profile of some updates: a trace that ui.perfetto.dev opens.
    #[arg(long)]
    profile: Option<PathBuf>,
}

/// The server that a command talks to.
#[derive(Debug, Args)]
struct Server {
    /// Where the server is. By default RELORA_URL, else what a server on this machine wrote down.
    #[arg(long, global = true)]
    url: Option<String>,
    /// The key to send. By default RELORA_API_KEY, else what a server on this machine wrote down.
    #[arg(long, global = true)]
    api_key: Option<String>,
}

/// A command that talks to a server.
#[derive(Debug, Args)]
struct Client<C: Subcommand> {
    #[command(flatten)]
    server: Server,
    #[command(subcommand)]
    command: C,
}

impl Train {
    fn into_run(self, config: TrainConfig) -> LocalRun {
        let beside_spec = || self.spec.parent().map_or_else(PathBuf::new, Path::to_owned);
        let data = match self.text {
            Some(path) => LocalData::Text { path, vocab_size: self.vocab_size, validation_frac: self.validation_frac },
            None => LocalData::Tokens(self.data.unwrap_or_else(beside_spec)),
        };
        LocalRun {
            trainer: config.agent.trainer,
            threads: self.threads.unwrap_or(config.agent.trainer_threads),
            spec: self.spec,
            out: self.out,
            data,
            weights: self.weights,
            resume: self.resume,
            profile: self.profile,
        }
    }
}

impl Server {
    fn connect(self) -> anyhow::Result<Http> {
        let config = ClientConfig::from_args(self.url, self.api_key)?;
        Http::new(&config.url, config.api_key.expose())
    }
}

impl<C: Subcommand> Client<C> {
    fn connect(self) -> anyhow::Result<(Http, C)> {
        Ok((self.server.connect()?, self.command))
    }
}

/// Runs the command that the arguments name.
pub fn main() -> ExitCode {
    let command = Cli::parse().command;
    let outcome =
        tokio::runtime::Builder::new_multi_thread().enable_all().build().map_err(anyhow::Error::from).and_then(
            |runtime| {
                let outcome = runtime.block_on(run(command));
                // A tokenization in progress is abandoned, not waited for.
                runtime.shutdown_background();
                outcome
            },
        );
    match outcome {
        Ok(outcome) => ExitCode::from(outcome.exit_code()),
        Err(error) if is_broken_pipe(&error) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("relora: {error:#}");
            ExitCode::FAILURE
        }
    }
}

async fn run(command: Command) -> anyhow::Result<Outcome> {
    match command {
        Command::Serve => {
            let config = ServeConfig::from_env()?;
            telemetry::init(&config.log)?;
            serve::run(config, Shutdown::on_signals()?).await?;
            Ok(Outcome::Done)
        }
        Command::Worker => {
            let config = WorkerConfig::from_env()?;
            telemetry::init(&config.log)?;
            worker::run_standalone(config, Shutdown::on_signals()?).await?;
            Ok(Outcome::Done)
        }
        Command::Workers { command } => {
            let pool = connect_as_operator().await?;
            operate::run(&pool, command).await?;
            Ok(Outcome::Done)
        }
        Command::Migrate => {
            let pool = connect_as_operator().await?;
            db::MIGRATOR.run(&pool).await.context("migrate the database")?;
            Ok(Outcome::Done)
        }
        Command::S3Check { upload_bytes } => {
            s3_check::run(&StoreConfig::from_env()?, upload_bytes).await?;
            Ok(Outcome::Done)
        }
        Command::Openapi => {
            println!("{}", api::openapi().to_pretty_json().context("write the OpenAPI document")?);
            Ok(Outcome::Done)
        }
        Command::Train(train) => {
            let config = TrainConfig::from_env()?;
            telemetry::init(&config.log)?;
            worker::local::train(train.into_run(config), Shutdown::on_signals()?).await?;
            Ok(Outcome::Done)
        }
        Command::Dataset(client) => {
            let (http, command) = client.connect()?;
            client::dataset::run(&http, command).await
        }
        Command::Job(client) => {
            let (http, command) = client.connect()?;
            client::job::run(&http, command).await
        }
        Command::Base(client) => {
            let (http, command) = client.connect()?;
            client::node::run(&http, "bases", command).await
        }
        Command::Restart(client) => {
            let (http, command) = client.connect()?;
            client::restart::run(&http, command).await
        }
        Command::Checkpoint(client) => {
            let (http, command) = client.connect()?;
            client::checkpoint::run(&http, command).await
        }
        Command::Usage { server, json } => client::usage::show(&server.connect()?, json).await,
    }
}

/// What an operator does by hand is done in seconds.
async fn connect_as_operator() -> anyhow::Result<PgPool> {
    let config = DatabaseConfig::from_env()?;
    db::connect(config.url.expose(), 1, 60).await.context("connect to PostgreSQL")
}

/// Whoever read our output has had enough, as `head` has: no error.
fn is_broken_pipe(error: &anyhow::Error) -> bool {
    error.downcast_ref::<io::Error>().is_some_and(|error| error.kind() == io::ErrorKind::BrokenPipe)
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory as _;

    use super::*;

    #[test]
    fn the_command_line_is_well_formed() {
        Cli::command().debug_assert();
    }

    #[test]
    fn server_and_key_may_follow_the_command() {
        let cli = Cli::try_parse_from(["relora", "job", "list", "--url", "http://h", "--api-key", "rl_k"]);
        let Ok(Command::Job(client)) = cli.map(|cli| cli.command) else { panic!("is a job command") };
        assert_eq!((client.server.url.as_deref(), client.server.api_key.as_deref()), (Some("http://h"), Some("rl_k")));
    }
}
