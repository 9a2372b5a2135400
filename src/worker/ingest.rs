//! One attempt on a tokenization: fetch the raw text, make tokens of it, store them.

use anyhow::{Context, Result};
use tracing::Instrument;

use super::{
    Agent,
    lease_keeper::LeaseKeeper,
    retry::{SETTLING, long_after, until_written},
    staging,
    tokenize::{TokenizeRequest, Tokenized, TokenizerSource, tokenize},
};
use crate::{
    db::{
        ingestion::{self, Counts, Ingestion},
        leases::Lease,
        nodes::StoredFile,
    },
    domain::{
        checkpoint::{END_OF_TEXT_FILES, TOKENIZER_FILES},
        data::{TOKENIZATION_FILE, TRAIN_TOKENS_FILE, VALID_TOKENS_FILE},
        job::{Failure, FailureKind},
    },
    shutdown::Shutdown,
    storage::{Key, Uploaded},
};

const FILES: [&str; 3] = [TRAIN_TOKENS_FILE, VALID_TOKENS_FILE, TOKENIZATION_FILE];

/// Runs the attempt and settles the tokenization.
pub async fn run(agent: &Agent, lease: &Lease, ingestion: Ingestion, shutdown: &Shutdown) {
    let id = &ingestion.tokenization;
    let span = tracing::info_span!("attempt", tokenization.id = %id, lease.epoch = lease.lease_epoch);
    run_within(agent, lease, ingestion, shutdown).instrument(span).await;
}

async fn run_within(agent: &Agent, lease: &Lease, ingestion: Ingestion, shutdown: &Shutdown) {
    let id = &ingestion.tokenization;
    tracing::info!("tokenization claimed");
    let keeper = LeaseKeeper::start(agent.pool.clone(), lease.clone(), &agent.config);
    let work = async {
        match shutdown.run_until(attempt(agent, lease, &ingestion)).await {
            None => until_written("release", || ingestion::release(&agent.pool, lease, id)).await,
            Some(Ok((counts, files))) => {
                until_written("complete", || ingestion::complete(&agent.pool, lease, id, counts, &files)).await
            }
            Some(Err(failure)) => {
                tracing::warn!(kind = ?failure.kind, failure.message, "tokenization failed");
                until_written("fail", || ingestion::fail(&agent.pool, lease, id, &failure)).await
            }
        }
    };
    tokio::select! {
        outcome = work => match outcome {
            Ok(()) => tracing::info!("attempt ended"),
            Err(error) => tracing::error!(%error, "could not settle the tokenization"),
        },
        () = keeper.lost() => {}
        () = long_after(shutdown, SETTLING) => {
            tracing::warn!("left without having settled the tokenization: its lease has to run out");
        }
    }
}

async fn attempt(agent: &Agent, lease: &Lease, ingestion: &Ingestion) -> Result<(Counts, Vec<StoredFile>), Failure> {
    let storage = |error: anyhow::Error| Failure::new(FailureKind::Storage, format!("{error:#}"));
    let name = format!("{}-{}", ingestion.tokenization, lease.lease_epoch);
    let folder = agent.work_dir.attempt(&name).map_err(storage)?;
    let raw = folder.path().join("raw");
    let key = Key::from(ingestion.object_key.clone());
    let expected = Uploaded { bytes: ingestion.size_bytes.unsigned_abs(), sha256: ingestion.sha256.clone() };
    agent.store.download_to(&key, &raw, &expected).await.map_err(|error| storage(error.into()))?;

    let checkpoint = folder.path().join("checkpoint");
    if let Some(id) = &ingestion.tokenizer_checkpoint {
        let is_wanted = |name: &str| TOKENIZER_FILES.contains(&name) || END_OF_TEXT_FILES.contains(&name);
        let staged = staging::stage_node(&agent.pool, &agent.store, id, &checkpoint, is_wanted).await;
        staged.context("stage the checkpoint's tokenizer").map_err(storage)?;
    }

    let (is_jsonl, vocab_size, validation_frac) =
        (ingestion.format == "jsonl", ingestion.vocab_size, ingestion.validation_frac);
    let is_learned = ingestion.tokenizer_checkpoint.is_none();
    let out = folder.path().to_owned();
    let tokenized = tokio::task::spawn_blocking(move || {
        let tokenizer = match is_learned {
            true => TokenizerSource::Text { vocab_size },
            false => TokenizerSource::Checkpoint { folder: &checkpoint, vocab_size },
        };
        tokenize(&TokenizeRequest { raw: &raw, is_jsonl, tokenizer, validation_frac }, &out)
    });
    let tokenized = tokenized
        .await
        .map_err(|error| Failure::new(FailureKind::Internal, format!("the tokenizer failed: {error}")))?
        .map_err(|error| Failure::new(kind_of(&error), format!("could not tokenize the dataset: {error:#}")))?;

    let files = upload(agent, lease, ingestion, folder.path()).await.map_err(storage)?;
    Ok((counts(tokenized), files))
}

/// The disk's fault can pass; text that cannot be tokenized stays so.
fn kind_of(error: &anyhow::Error) -> FailureKind {
    let io = error.chain().find_map(|cause| cause.downcast_ref::<std::io::Error>());
    match io.map(std::io::Error::kind) {
        None | Some(std::io::ErrorKind::InvalidData) => FailureKind::Data,
        Some(_) => FailureKind::Infrastructure,
    }
}

fn counts(tokenized: Tokenized) -> Counts {
    let Tokenized { tokenizer_vocab_size, train_tokens, valid_tokens, train_documents, valid_documents } = tokenized;
    Counts { tokenizer_vocab_size, train_tokens, valid_tokens, train_documents, valid_documents }
}

async fn upload(
    agent: &Agent,
    lease: &Lease,
    ingestion: &Ingestion,
    folder: &std::path::Path,
) -> Result<Vec<StoredFile>> {
    let mut files = Vec::new();
    let of_tokenizer = TOKENIZER_FILES.into_iter().filter(|name| folder.join(name).exists());
    for name in FILES.into_iter().chain(of_tokenizer) {
        let key = Key::tokenization_file(&ingestion.tokenization, lease.lease_epoch, name);
        let uploaded =
            agent.store.upload_file(&key, &folder.join(name)).await.with_context(|| format!("upload {name}"))?;
        files.push(StoredFile {
            name: name.to_owned(),
            object_key: key.as_str().to_owned(),
            size_bytes: i64::try_from(uploaded.bytes)?,
            sha256: uploaded.sha256,
        });
    }
    Ok(files)
}
