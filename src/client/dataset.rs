//! `relora dataset …`: text on the server, and its tokens.

use std::{
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::{Context as _, bail};
use clap::Subcommand;
use indicatif::{ProgressBar, ProgressStyle};
use serde_json::{Value, json};

use super::{
    Outcome,
    folder::Selection,
    http::{Http, parse},
    print,
    resources::{Dataset, Tokenization, TokenizationState},
    upload::{self, Content},
};

const POLL_EVERY: Duration = Duration::from_millis(300);

#[derive(Debug, Subcommand)]
pub enum Command {
    /// Upload a file or a folder, and turn it into tokens.
    ///
    /// Of a folder every file is a document, except hidden ones and those that are no UTF-8. A .jsonl
    /// file has an object with "text" on each line; any other file is one document.
    Create(Create),
    /// Turn a dataset that is there into tokens.
    Tokenize {
        id: String,
        #[command(flatten)]
        options: TokenizeOptions,
        #[arg(long)]
        json: bool,
    },
    List {
        #[arg(long)]
        json: bool,
    },
    Show {
        id: String,
        #[arg(long)]
        json: bool,
    },
    Delete {
        id: String,
    },
}

#[derive(Debug, clap::Args)]
pub struct Create {
    path: PathBuf,
    /// By default the name of the file or folder.
    #[arg(long)]
    name: Option<String>,
    #[command(flatten)]
    tokenize: TokenizeOptions,
    /// Upload only.
    #[arg(long)]
    no_tokenize: bool,
    /// Of a folder, take only file names that end so: --include .py,.txt
    #[arg(long, value_delimiter = ',')]
    include: Vec<String>,
    /// Of a folder, leave out files and folders of these names: --exclude tests,build
    #[arg(long, value_delimiter = ',')]
    exclude: Vec<String>,
    #[arg(long)]
    json: bool,
}

#[derive(Debug, clap::Args)]
pub struct TokenizeOptions {
    /// The checkpoint whose tokenizer is used; by default one is learned from the text.
    #[arg(long, value_name = "CHECKPOINT", conflicts_with = "vocab_size")]
    tokenizer: Option<String>,
    /// Tokens in the vocabulary that is learned from the text; by default the server's choice.
    #[arg(long)]
    vocab_size: Option<i64>,
    /// Share of the documents that is held out for validation; by default the server's choice.
    #[arg(long)]
    validation_frac: Option<f64>,
}

pub async fn run(http: &Http, command: Command) -> anyhow::Result<Outcome> {
    match command {
        Command::Create(options) => create(http, options).await?,
        Command::Tokenize { id, options, json } => {
            let tokenization = tokenize(http, &id, &options, json).await?;
            if json {
                print::json(&tokenization)?;
            }
        }
        Command::List { json } => list(http, json).await?,
        Command::Show { id, json } => show(http, &id, json).await?,
        Command::Delete { id } => {
            http.delete(&["v1", "datasets", &id]).await?;
            print::line(&format!("deleted {id}"))?;
        }
    }
    Ok(Outcome::Done)
}

async fn create(http: &Http, options: Create) -> anyhow::Result<()> {
    let selection = Selection { include: options.include, exclude: options.exclude };
    let content = Content::find(&options.path, &selection)?;
    let name = options.name.or_else(|| name_of(&options.path)).context("give the dataset a name with --name")?;

    let created: Dataset = parse(http.post(&["v1", "datasets"], &json!({"name": name})).await?)?;
    let dataset_id = created.id.as_str();
    let dataset = upload::send(http, dataset_id, content).await?;
    if !options.json {
        print::line(&describe(&parse(dataset.clone())?))?;
    }

    let mut tokenization = None;
    if !options.no_tokenize {
        tokenization = Some(tokenize(http, dataset_id, &options.tokenize, options.json).await?);
    }
    if options.json {
        print::json(&json!({"dataset": dataset, "tokenization": tokenization}))?;
    }
    Ok(())
}

/// The tokenization as the server has it once it is ready; told to the user unless that is left to the caller.
async fn tokenize(http: &Http, dataset_id: &str, options: &TokenizeOptions, is_quiet: bool) -> anyhow::Result<Value> {
    // An absent field and null are one to the server.
    let request = json!({
        "dataset": dataset_id,
        "tokenizer_checkpoint": options.tokenizer,
        "vocab_size": options.vocab_size,
        "validation_frac": options.validation_frac,
    });
    let queued: Tokenization = parse(http.post(&["v1", "tokenizations"], &request).await?)?;
    let (answer, ready) = wait_until_ready(http, queued.id.as_str()).await?;
    if !is_quiet {
        print::line(&describe_tokenization(&ready))?;
    }
    Ok(answer)
}

fn name_of(path: &Path) -> Option<String> {
    Some(path.canonicalize().ok()?.file_name()?.to_string_lossy().into_owned())
}

/// The tokenization as the server sent it and as it was read, once it is ready.
async fn wait_until_ready(http: &Http, id: &str) -> anyhow::Result<(Value, Tokenization)> {
    let spinner = if print::is_terminal() { ProgressBar::new_spinner() } else { ProgressBar::hidden() };
    let style = ProgressStyle::with_template("{spinner} {msg}  {elapsed}").expect("the template is well-formed");
    spinner.set_style(style);
    spinner.enable_steady_tick(Duration::from_millis(100));
    loop {
        let answer = http.get(&["v1", "tokenizations", id]).await?;
        let tokenization: Tokenization = parse(answer.clone())?;
        match tokenization.state {
            TokenizationState::Queued => spinner.set_message("waiting for a worker to tokenize"),
            TokenizationState::Running => spinner.set_message("tokenizing"),
            TokenizationState::Ready => {
                spinner.finish_and_clear();
                return Ok((answer, tokenization));
            }
            TokenizationState::Failed => {
                spinner.finish_and_clear();
                let reason = tokenization.failure.map_or_else(|| "no reason given".into(), |failure| failure.message);
                bail!("tokenization {id} failed: {reason}");
            }
        }
        tokio::time::sleep(POLL_EVERY).await;
    }
}

async fn list(http: &Http, json: bool) -> anyhow::Result<()> {
    let items = http.list(&["v1", "datasets"], &[]).await?;
    if json {
        return Ok(print::json_list(items)?);
    }
    let mut rows = Vec::with_capacity(items.len());
    for item in items {
        let dataset: Dataset = parse(item)?;
        rows.push([
            dataset.id.to_string(),
            dataset.name,
            dataset.state,
            print::or_dash(dataset.size_bytes.map(print::size)),
            print::or_dash(dataset.num_documents),
            dataset.created_at.format("%Y-%m-%d %H:%M:%S").to_string(),
        ]);
    }
    Ok(print::table(["id", "name", "state", "size", "documents", "created (UTC)"], &rows)?)
}

async fn show(http: &Http, id: &str, json: bool) -> anyhow::Result<()> {
    let answer = http.get(&["v1", "datasets", id]).await?;
    let tokenizations = http.list(&["v1", "tokenizations"], &[("dataset", id)]).await?;
    if json {
        return Ok(print::json(&json!({"dataset": answer, "tokenizations": tokenizations}))?);
    }
    print::line(&describe(&parse(answer)?))?;
    for tokenization in tokenizations {
        print::line(&describe_tokenization(&parse(tokenization)?))?;
    }
    Ok(())
}

fn describe(dataset: &Dataset) -> String {
    let mut text = format!("dataset {}  {:?}  {}", dataset.id, dataset.name, dataset.state);
    if let (Some(size_bytes), Some(num_documents)) = (dataset.size_bytes, dataset.num_documents) {
        text.push_str(&format!("  {} in {num_documents} documents", print::size(size_bytes)));
    }
    if let Some(error) = &dataset.error {
        text.push_str(&format!("\n  {error}"));
    }
    text
}

fn describe_tokenization(tokenization: &Tokenization) -> String {
    let mut text = format!("tokenization {}  {:?}", tokenization.id, tokenization.state).to_lowercase();
    if let Some(checkpoint) = &tokenization.tokenizer_checkpoint {
        text.push_str(&format!("  tokenizer of {checkpoint}"));
    }
    if let (Some(vocab), Some(train), Some(valid)) =
        (tokenization.tokenizer_vocab_size, tokenization.train_tokens, tokenization.valid_tokens)
    {
        text.push_str(&format!("  vocabulary {vocab}  {train} tokens to train on, {valid} held out"));
    }
    if let (Some(train), Some(valid)) = (tokenization.train_documents, tokenization.valid_documents) {
        text.push_str(&format!("  ({train} and {valid} documents)"));
    }
    if let Some(failure) = &tokenization.failure {
        text.push_str(&format!("\n  {}", failure.message));
    }
    text
}
