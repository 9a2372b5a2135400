//! The command line of `relora`: one command per role and per resource. This file parses and
//! dispatches; what a command does is in the module that it belongs to.

use std::{io, process::ExitCode};

use clap::{Args, Parser, Subcommand};

use crate::{
    client::{self, Http, Outcome},
    config::ClientConfig,
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
    /// Upload text and turn it into tokens.
    Dataset(Client<client::dataset::Command>),
    /// Submit, watch and cancel training jobs.
    Job(Client<client::job::Command>),
    /// The full weights that the deltas of a job add to.
    Base(Client<client::node::Command>),
    /// The delta of every restart of a job.
    Restart(Client<client::node::Command>),
    /// The merged weights of a job.
    Checkpoint(Client<client::node::Command>),
}

/// A command that talks to a server.
#[derive(Debug, Args)]
struct Client<C: Subcommand> {
    /// Where the server is. By default RELORA_URL, else what a server on this machine wrote down.
    #[arg(long, global = true)]
    url: Option<String>,
    /// The key to send. By default RELORA_API_KEY, else what a server on this machine wrote down.
    #[arg(long, global = true)]
    api_key: Option<String>,
    #[command(subcommand)]
    command: C,
}

impl<C: Subcommand> Client<C> {
    fn connect(self) -> anyhow::Result<(Http, C)> {
        let config = ClientConfig::from_args(self.url, self.api_key)?;
        Ok((Http::new(&config.url, config.api_key.expose())?, self.command))
    }
}

/// Runs the command that the arguments name.
pub fn main() -> ExitCode {
    let command = Cli::parse().command;
    let outcome = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .map_err(anyhow::Error::from)
        .and_then(|runtime| runtime.block_on(run(command)));
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
        Command::Dataset(client) => {
            let (http, command) = client.connect()?;
            client::dataset::run(&http, command).await
        }
        Command::Job(client) => {
            let (http, command) = client.connect()?;
            client::job::run(&http, command).await
        }
        Command::Base(client) => run_node("bases", client).await,
        Command::Restart(client) => run_node("restarts", client).await,
        Command::Checkpoint(client) => run_node("checkpoints", client).await,
    }
}

async fn run_node(collection: &str, client: Client<client::node::Command>) -> anyhow::Result<Outcome> {
    let (http, command) = client.connect()?;
    client::node::run(&http, collection, command).await
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
        assert_eq!((client.url.as_deref(), client.api_key.as_deref()), (Some("http://h"), Some("rl_k")));
    }
}
