//! `relora train`: runs the trainer by hand, without a server. The same contract, the same files.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, anyhow, bail};
use serde_json::Value;
use sha2::{Digest, Sha256};

use super::{
    tokenize::{TokenizeRequest, TokenizerSource, tokenize},
    trainer::{Trainer, TrainerArgs, probe},
};
use crate::{
    domain::{
        checkpoint::{CONFIG_FILE, model_of_config},
        contract::{Command, Event},
        data::{TOKENIZATION_FILE, TOKENIZER_FILE, TokenizationMeta},
        ids::{DatasetId, NodeId, TokenizationId},
        lineage::NodeKind,
        offer,
        problem::Problem,
        spec::{DataFacts, InitFacts, Precision, TrainSpec, TrainSpecRequest},
    },
    shutdown::Shutdown,
};

/// What to train, on what, and where the results go.
#[derive(Debug)]
pub struct LocalRun {
    pub trainer: PathBuf,
    pub threads: usize,
    /// A training spec as it is sent to the service; `dataset` and `tokenization` are not read.
    pub spec: PathBuf,
    pub out: PathBuf,
    pub data: LocalData,
    /// The folder of a checkpoint to begin with.
    pub weights: Option<PathBuf>,
    /// Go on from the newest state in `out`.
    pub resume: bool,
    /// The file for a profile of some updates.
    pub profile: Option<PathBuf>,
}

/// Where the tokens come from.
#[derive(Debug)]
pub enum LocalData {
    /// A folder with the files of a tokenization.
    Tokens(PathBuf),
    /// A text file, or JSON lines, to tokenize first: with a tokenizer of this vocabulary, which is learned, or by
    /// default with that of the checkpoint to begin with.
    Text { path: PathBuf, vocab_size: Option<i64>, validation_frac: f64 },
}

/// Of the tokenizer that is learned from a text.
const DEFAULT_VOCAB_SIZE: i64 = 8_192;

/// Trains to the end, or to a saved state when told to stop. Fails with the trainer's reason.
pub async fn train(run: LocalRun, shutdown: Shutdown) -> Result<()> {
    if !run.resume && run.out.join(NodeKind::State.folder()).exists() {
        bail!("{} holds an earlier run: go on with --resume, or name another folder", run.out.display());
    }
    std::fs::create_dir_all(&run.out).with_context(|| format!("create {}", run.out.display()))?;
    let weights = run.weights.as_deref().map(LocalCheckpoint::read).transpose()?;
    let data = match run.data {
        LocalData::Tokens(folder) => folder,
        LocalData::Text { path, vocab_size, validation_frac } => {
            let folder = run.out.join("data");
            std::fs::create_dir_all(&folder).with_context(|| format!("create {}", folder.display()))?;
            let is_jsonl = path.extension().is_some_and(|extension| extension == "jsonl");
            println!("tokenizing {}", path.display());
            let tokenizer = match (vocab_size, &weights) {
                (None, Some(LocalCheckpoint { folder, facts })) if facts.tokenizer_sha256.is_some() => {
                    TokenizerSource::Checkpoint { folder, vocab_size: facts.model.vocab_size }
                }
                _ => TokenizerSource::Text { vocab_size: vocab_size.unwrap_or(DEFAULT_VOCAB_SIZE) },
            };
            let request = TokenizeRequest { raw: &path, is_jsonl, tokenizer, validation_frac };
            let tokenized = tokenize(&request, &folder)?;
            println!("{} training and {} validation tokens", tokenized.train_tokens, tokenized.valid_tokens);
            folder
        }
    };
    let normalised = run.out.join("spec.json");
    let spec = match (run.resume && weights.is_none()).then(|| begun_with_a_checkpoint(&normalised)).flatten() {
        Some(spec) => spec,
        None => read_spec(&run.spec, &data, weights.as_ref().map(|weights| &weights.facts))?,
    };
    std::fs::write(&normalised, serde_json::to_vec_pretty(&spec)?)?;
    if spec.precision == Precision::Bf16 {
        // A trainer that does not start says so when it is to train.
        let offers: Vec<_> = probe(&run.trainer).await.map(|found| found.offer).into_iter().collect();
        offer::bf16_warning(&spec, &offers).iter().for_each(|warning| println!("warning: /precision: {warning}"));
    }
    let args = TrainerArgs {
        program: &run.trainer,
        spec: normalised,
        data,
        resume: if run.resume { Some(newest_state(&run.out)?) } else { None },
        weights: run.weights.clone(),
        out: run.out.clone(),
        threads: run.threads,
        gpu: None,
        profile: run.profile.clone(),
    };
    let log = run.out.join("trainer.log");
    let mut trainer = Trainer::spawn(&args, &log).await?;
    let mut stopping = false;
    loop {
        let event = tokio::select! {
            event = trainer.next_event() => event?,
            () = shutdown.wait(), if !stopping => {
                stopping = true;
                println!("stopping; the state is saved at the next step");
                trainer.send(Command::Stop).await;
                continue;
            }
        };
        let Some(event) = event else { break };
        print(&event, spec.schedule.num_steps);
        match event {
            Event::Done { .. } | Event::Stopped { .. } => return Ok(()),
            Event::Failed { kind, message } => {
                bail!("the training failed ({kind:?}): {message}; see {}", log.display())
            }
            _ => {}
        }
    }
    let exit = trainer.end().await;
    bail!("the trainer ended without a reason ({exit:?}); its last lines were:\n{}", trainer.log.tail())
}

/// A checkpoint in a folder.
struct LocalCheckpoint<'a> {
    folder: &'a Path,
    facts: InitFacts,
}

impl<'a> LocalCheckpoint<'a> {
    /// Its weights are the trainer's to check.
    fn read(folder: &'a Path) -> Result<Self> {
        let path = folder.join(CONFIG_FILE);
        let text = std::fs::read(&path).with_context(|| format!("read {}", path.display()))?;
        let config = serde_json::from_slice(&text).with_context(|| format!("read {}", path.display()))?;
        let model = model_of_config(config)
            .map_err(|problems| anyhow!("{} cannot be continued from:\n{}", folder.display(), lines(&problems)))?;
        Ok(Self { folder, facts: InitFacts { model, tokenizer_sha256: tokenizer_sha256(folder) } })
    }
}

/// Of a folder's tokenizer, if it has one.
fn tokenizer_sha256(folder: &Path) -> Option<String> {
    Some(hex::encode(Sha256::digest(std::fs::read(folder.join(TOKENIZER_FILE)).ok()?)))
}

fn lines(problems: &[Problem]) -> String {
    let lines: Vec<_> = problems.iter().map(|problem| format!("  {} {}", problem.pointer, problem.message)).collect();
    lines.join("\n")
}

fn read_spec(path: &Path, data: &Path, init: Option<&InitFacts>) -> Result<TrainSpec> {
    let text = std::fs::read_to_string(path).with_context(|| format!("read the spec {}", path.display()))?;
    let json: Value = serde_json::from_str(&text).with_context(|| format!("read the spec {}", path.display()))?;
    let meta = data.join(TOKENIZATION_FILE);
    let text = std::fs::read_to_string(&meta).with_context(|| {
        format!("read {}: name a text with --text, or a folder of tokens with --data", meta.display())
    })?;
    let meta: TokenizationMeta = serde_json::from_str(&text).with_context(|| format!("read {}", meta.display()))?;
    let facts = DataFacts {
        dataset: DatasetId::from("local".to_owned()),
        tokenization: TokenizationId::from("local".to_owned()),
        vocab_size: meta.vocab_size,
        max_train_tokens: meta.train_tokens,
        max_valid_tokens: meta.valid_tokens,
    };
    let (mut request, mut problems) = TrainSpecRequest::parse(json);
    match (init, &request.init_checkpoint) {
        (Some(init), _) => {
            request.init_checkpoint.get_or_insert_with(|| NodeId::from("local".to_owned()));
            problems.extend(request.begin_with(init, Some(&facts)));
        }
        (None, Some(_)) => problems.push(Problem::new("/init_checkpoint", "name its folder with --weights")),
        (None, None) => {}
    }
    match request.normalise(Some(&facts)) {
        Ok((spec, mut warnings)) if problems.is_empty() => {
            warnings.extend(init.and_then(|init| init.tokenizer_warning(tokenizer_sha256(data).as_deref())));
            warnings.iter().for_each(|warning| println!("warning: {warning}"));
            return Ok(spec);
        }
        Ok(_) => {}
        Err(more) => problems.extend(more),
    }
    bail!("the spec {} is not valid:\n{}", path.display(), lines(&problems))
}

/// The stored spec of a run that began with a checkpoint: its state has all that was in there, so that the checkpoint
/// need not be named again.
fn begun_with_a_checkpoint(normalised: &Path) -> Option<TrainSpec> {
    let spec: TrainSpec = serde_json::from_slice(&std::fs::read(normalised).ok()?).ok()?;
    spec.init_checkpoint.is_some().then_some(spec)
}

fn newest_state(out: &Path) -> Result<PathBuf> {
    let states = out.join(NodeKind::State.folder());
    let step_of = |path: &Path| path.file_name()?.to_str()?.parse::<i64>().ok();
    let entries = std::fs::read_dir(&states).with_context(|| format!("look for states in {}", states.display()))?;
    let newest = entries.filter_map(|entry| Some(entry.ok()?.path())).max_by_key(|path| step_of(path));
    newest.filter(|path| step_of(path).is_some()).with_context(|| format!("there is no state in {}", states.display()))
}

fn print(event: &Event, num_steps: i64) {
    match event {
        Event::Ready { device, step, num_params, choices, .. } => {
            let seqs = choices.micro_batch_seqs;
            println!(
                "training {num_params} parameters on {device}, from step {step} of {num_steps}, {seqs} sequences at once"
            );
        }
        Event::Step(report) => println!(
            "step {}/{num_steps}  loss {:.4}  lr {:.2e}  grad norm {:.3}  {:.0} tokens/s",
            report.step, report.loss, report.learning_rate, report.grad_norm, report.tokens_per_s
        ),
        Event::Eval { step, perplexity, .. } => println!("step {step}: validation perplexity {perplexity:.3}"),
        Event::Node(node) => println!("step {}: {:?} written ({} ms stall)", node.step, node.kind, node.stall_ms),
        Event::OptimizerReset { step, reset, cleared_frac } => {
            println!("step {step}: optimizer reset {reset} cleared {:.1}% of the factors' state", 100.0 * cleared_frac);
        }
        Event::Ranks { restart, threshold, kinds, .. } => {
            let kinds: Vec<_> = kinds
                .iter()
                .map(|(linear, count)| format!("{} {}/{}", linear.name(), count.num_above, count.num_values))
                .collect();
            println!("restart {restart}: singular values above {threshold}: {}", kinds.join("  "));
        }
        Event::Sample { text, .. } => println!("--- {text}"),
        Event::Warning { step, message } => println!("step {step}: warning: {message}"),
        Event::NumericsChanged { step, before, now } => {
            println!("step {step}: the result is no longer exact: the run began on {before:?} and goes on on {now:?}");
        }
        Event::Done { step } => println!("done after step {step}"),
        Event::Stopped { step } => println!("stopped after step {step}; --resume goes on from there"),
        Event::Alive { .. } | Event::Failed { .. } => {}
    }
}
