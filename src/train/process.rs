//! The trainer as a process: from its arguments to its last event.

use std::{
    fs,
    panic::{AssertUnwindSafe, catch_unwind},
    path::{Path, PathBuf},
    process::ExitCode,
    sync::mpsc::Receiver,
};

use clap::builder::FalseyValueParser;
use rustix::process::{Signal, set_parent_process_death_signal};
use tch::Tensor;

use super::{
    checkpoint,
    data::Dataset,
    device,
    engine::Engine,
    error::TrainError,
    events::{self, Events},
    logits, native,
    nodes::Nodes,
    ops::OpsChoice,
    profile::Profile,
    relora::Wrapping,
    run::{Ending, Inbox, Run},
    state::{LoopState, Phase, StateFile},
    weights::Weights,
};
use crate::{
    config,
    domain::{
        contract::{Command, Event, FORMAT_VERSION, Fingerprint},
        job::FailureKind,
        memory,
        schedule::Schedule,
        spec::{Choices, Device, MethodSpec, TrainSpec},
    },
};

/// Trains one job: reads its spec and data from files, writes nodes into a directory, reports on stdout.
#[derive(Debug, Clone, clap::Parser)]
#[command(name = "relora-trainer", version)]
pub struct Args {
    /// The normalised training spec, a JSON file.
    pub spec: PathBuf,
    /// Directory of the tokenized data.
    #[arg(long)]
    pub data: PathBuf,
    /// Directory into which nodes are written.
    #[arg(long)]
    pub out: PathBuf,
    /// The state to go on from, such as `OUT/states/120`.
    #[arg(long)]
    pub resume: Option<PathBuf>,
    /// The folder of a checkpoint to begin with. A state that is gone on from holds what came of it.
    #[arg(long)]
    pub weights: Option<PathBuf>,
    /// This process among those of the job.
    #[arg(long, default_value_t = 0)]
    pub rank: i64,
    /// Processes of the job.
    #[arg(long, default_value_t = 1)]
    pub world_size: i64,
    /// CPU threads; all cores by default.
    #[arg(long)]
    pub threads: Option<i32>,
    /// File for a profile of some updates after the first ones, as a trace that Perfetto opens.
    #[arg(long)]
    pub profile: Option<PathBuf>,
    #[command(flatten)]
    pub ops: OpsArgs,
}

/// What to compute with.
#[derive(Debug, Clone, Default, clap::Args)]
pub struct OpsArgs {
    /// On a GPU, fused kernels of the trainer's own in the place of libtorch's operations.
    #[arg(long, env = config::CUDA_KERNELS, value_parser = FalseyValueParser::new())]
    gpu_kernels: bool,
    /// On a GPU, the pass over a micro-batch as one launch of those kernels.
    #[arg(long, env = config::CUDA_GRAPHS, value_parser = FalseyValueParser::new())]
    gpu_graphs: bool,
}

impl OpsArgs {
    fn choice(&self) -> OpsChoice {
        match self {
            Self { gpu_graphs: true, .. } => OpsChoice::GpuGraphs,
            Self { gpu_kernels: true, .. } => OpsChoice::GpuKernels,
            _ => OpsChoice::Proven,
        }
    }
}

/// Says on stdout what a trainer can use here, as one JSON object.
#[derive(Debug, Clone, clap::Parser)]
#[command(name = "relora-trainer --probe", version)]
pub struct ProbeArgs {
    #[command(flatten)]
    ops: OpsArgs,
}

impl ProbeArgs {
    pub fn run(&self) -> ExitCode {
        println!("{}", serde_json::json!(device::probe(self.ops.choice())));
        ExitCode::SUCCESS
    }
}

/// Writes the logits of a checkpoint, for tests.
pub fn write_logits(checkpoint: &Path, out: &Path) -> ExitCode {
    match logits::write(checkpoint, out) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            tracing::error!(%error, "no logits");
            ExitCode::FAILURE
        }
    }
}

/// A run that can begin.
pub struct Job {
    /// With nothing left to choose.
    pub spec: TrainSpec,
    pub choices: Choices,
    pub device: tch::Device,
}

/// Runs to the last event. Whatever goes wrong becomes a `Failed` event and a non-zero exit code.
pub fn run(args: &Args) -> ExitCode {
    go_on_without_a_parent();
    let events = Events::new(std::io::stdout());
    let result = unless_it_panics(|| prepare(args)).and_then(|job| {
        let (spec, device) = (job.spec.clone(), job.device);
        let result = unless_it_panics(|| train(args, job, &events, events::commands_from_stdin()));
        result.map_err(|error| error.with_sizes(&spec, device))
    });
    match result {
        Ok(_) => ExitCode::SUCCESS,
        Err(TrainError { kind, message }) => {
            tracing::error!(failure.kind = ?kind, message, "run failed");
            events.emit(&Event::Failed { kind, message });
            ExitCode::FAILURE
        }
    }
}

/// A worker may be killed while it holds its trainer. Then the trainer has to go on, to find that nobody is there.
fn go_on_without_a_parent() {
    if let Err(error) = set_parent_process_death_signal(Some(Signal::CONT)) {
        tracing::warn!(%error, "a trainer that is held may outlive its worker");
    }
}

/// What a panic says becomes an error, as whatever else goes wrong.
pub fn unless_it_panics<T>(run: impl FnOnce() -> Result<T, TrainError>) -> Result<T, TrainError> {
    catch_unwind(AssertUnwindSafe(run)).unwrap_or_else(|panic| Err(TrainError::from_panic(&*panic)))
}

fn prepare(args: &Args) -> Result<Job, TrainError> {
    let spec = read_spec(args)?;
    // On the CPU every operation that is used is deterministic.
    if spec.deterministic && spec.resources.device != Device::Cpu {
        native::use_deterministic_algorithms();
    }
    let device = device::set_up(spec.resources.device, args.threads)?;
    settle(args, &spec, device)
}

/// Settles what the spec leaves to the trainer: as the run did that this one goes on from, else by the free memory.
pub fn settle(args: &Args, spec: &TrainSpec, device: tch::Device) -> Result<Job, TrainError> {
    let earlier = match &args.resume {
        Some(state_dir) => StateFile::read(state_dir)?.choices(),
        None => None,
    };
    let spec = earlier.map_or_else(|| spec.clone(), |choices| spec.with_choices(&choices));
    let choices = memory::choose(&spec, device::kind(device), device::available_bytes(device));
    Ok(Job { spec: spec.with_choices(&choices), choices, device })
}

/// Trains to the end or to a stop, and reports which, after the last node is written.
pub fn train(args: &Args, job: Job, events: &Events, commands: Receiver<Command>) -> Result<Ending, TrainError> {
    let Job { spec, choices, device } = job;
    let dataset = Dataset::open(&args.data, &spec)?;
    events.alive(0);
    let ops = args.ops.choice();
    let fingerprint = device::fingerprint(device, &choices, ops);
    let (out_dir, eos_token_id) = (args.out.clone(), dataset.tokenization.eos_token_id);
    let mut nodes = Nodes::new(out_dir, events.clone(), args.data.clone(), eos_token_id, fingerprint.clone());
    let Start { weights, state, written_by, start_matrices } = match &args.resume {
        None => Start::new(args.weights.as_deref(), &spec, device, &fingerprint)?,
        Some(state_dir) => Start::resume(state_dir, &spec, device)?,
    };
    events.alive(state.step);
    if let Some(state_dir) = args.resume.as_deref().filter(|dir| lies_in(dir, &args.out)) {
        tracing::info!(state.path = %state_dir.display(), "frozen weights are shared with the state");
        nodes.set_on_disk(&state, &spec);
    }
    let mut run = Run {
        schedule: Schedule::new(&spec),
        engine: Engine::of(&spec, &weights, ops),
        ops,
        is_settled: args.resume.is_some(),
        events: events.clone(),
        spec,
        choices,
        device,
        dataset,
        weights,
        state,
        nodes,
        ranks: None,
        profile: args.profile.as_deref().map_or_else(Profile::default, |path| Profile::to_file(path, device)),
        inbox: Inbox::new(commands),
    };
    events.emit(&Event::Ready {
        format_version: FORMAT_VERSION,
        device: fingerprint.numerics.device.clone(),
        step: run.state.step,
        num_params: run.spec.model.num_params(),
        fingerprint: fingerprint.clone(),
        choices,
    });
    if written_by != fingerprint {
        events.emit(&Event::NumericsChanged { step: run.state.step, before: written_by, now: fingerprint });
    }
    run.ranks = start_matrices.and_then(|start| run.rank_reporter(start));
    run.report_ranks_again();
    run.engine.profile(run.profile.clone());
    let (mut run, ending) = run.train()?;
    run.profile.finish()?;
    run.nodes.finish()?;
    let step = run.state.step;
    match (ending, run.ranks.take()) {
        (Ending::Done, Some(ranks)) => ranks.finish(step, || run.inbox.is_stopping()),
        (Ending::Stopped, Some(ranks)) => ranks.abandon(step),
        _ => {}
    }
    events.emit(&match ending {
        Ending::Done => Event::Done { step },
        Ending::Stopped => Event::Stopped { step },
    });
    Ok(ending)
}

fn read_spec(args: &Args) -> Result<TrainSpec, TrainError> {
    if (args.rank, args.world_size) != (0, 1) {
        let message = format!("rank {} of {}: this trainer runs as one process only", args.rank, args.world_size);
        return Err(TrainError::new(FailureKind::UserConfig, message));
    }
    let config = |reason: String| {
        TrainError::new(FailureKind::UserConfig, format!("read spec {}: {reason}", args.spec.display()))
    };
    let json = fs::read(&args.spec).map_err(|error| config(error.to_string()))?;
    let spec: TrainSpec = serde_json::from_slice(&json).map_err(|error| config(error.to_string()))?;
    Ok(TrainSpec { model: spec.trained_model(), ..spec })
}

/// What a run begins with.
struct Start {
    weights: Weights,
    state: LoopState,
    /// The fingerprint of whoever wrote the state.
    written_by: Fingerprint,
    /// The wrapped matrices at the warm start, where ranks are reported and the warm start is over.
    start_matrices: Option<Vec<Tensor>>,
}

impl Start {
    fn new(
        checkpoint: Option<&Path>,
        spec: &TrainSpec,
        device: tch::Device,
        fingerprint: &Fingerprint,
    ) -> Result<Self, TrainError> {
        let mut state = LoopState::new();
        if matches!(spec.method, MethodSpec::Factorized(_)) {
            state.phase = Phase::LowRank;
        }
        let weights = checkpoint::first_weights(checkpoint, spec, device)?;
        Ok(Self { weights, state, written_by: fingerprint.clone(), start_matrices: None })
    }

    fn resume(state_dir: &Path, spec: &TrainSpec, device: tch::Device) -> Result<Self, TrainError> {
        let file = StateFile::read(state_dir)?;
        file.check_spec(spec)?;
        let state = file.loop_state.clone();
        let wrapping = Wrapping::of(spec).filter(|_| state.phase == Phase::LowRank);
        let mut weights = match &wrapping {
            Some(wrapping) => wrapping.zeros(device),
            None => Weights::zeros(&spec.model, device),
        };
        file.read_tensors(state_dir, &mut weights)?;
        let start_matrices = match wrapping.and(spec.method.rank_threshold()) {
            Some(_) => Some(file.read_start(state_dir, spec)?),
            None => None,
        };
        Ok(Self { weights, state, written_by: file.fingerprint, start_matrices })
    }
}

/// Whether a state lies in this output directory, so that its frozen weights need not be written again.
fn lies_in(state_dir: &Path, out_dir: &Path) -> bool {
    match (state_dir.join("../..").canonicalize(), out_dir.canonicalize()) {
        (Ok(of_state), Ok(out)) => of_state == out,
        _ => false,
    }
}
