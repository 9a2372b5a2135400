//! From a request to a [`TrainSpec`]: every default filled in, every mistake found, all at once.

use super::{
    BatchSpec, CheckpointsSpec, EvalSpec, FrozenWeights, MemorySpec, MergedWeights, MicroBatch, ModelSpec,
    OptimizerSpec, Precision, Recompute, ResourcesSpec, RetriesSpec, ScheduleSpec, TrainSpec, TrainSpecRequest,
    check::{Bounds, Check, MAX_INTEGER, MAX_STEPS},
    normalise_method::fill_in_method,
    presets::{self, PRESETS},
    request::{
        BatchRequest, CheckpointsRequest, MemoryRequest, MethodType, ModelRequest, OptimizerRequest, RetriesRequest,
    },
};
use crate::domain::{
    ids::{DatasetId, TokenizationId},
    json,
    problem::Problem,
};

/// What the data of a job is known to be when the spec is checked.
#[derive(Debug, Clone)]
pub struct DataFacts {
    pub dataset: DatasetId,
    pub tokenization: TokenizationId,
    pub vocab_size: i64,
    /// Tokens to train on; a bound while the dataset is not tokenized yet.
    pub max_train_tokens: i64,
    /// Tokens held out; a bound while the dataset is not tokenized yet.
    pub max_valid_tokens: i64,
}

/// A trainer is one process on one device.
const MAX_GPUS: i64 = 1;

/// Draws count sequences in 32 bits.
const MAX_SEQS: i64 = (1 << 32) - 1;

impl TrainSpecRequest {
    /// Checks and completes the request.
    ///
    /// `data` is `None` where the named data does not exist: the caller has reported that already,
    /// and everything else is still checked. Returns the spec with warnings, or every problem found.
    pub fn normalise(&self, data: Option<&DataFacts>) -> Result<(TrainSpec, Vec<String>), Vec<Problem>> {
        let mut check = Check::default();
        let spec = self.fill_in(&mut check, data);
        match (spec, check.problems.is_empty()) {
            (Some(spec), true) => {
                let warnings = spec.warnings();
                Ok((spec, warnings))
            }
            _ => Err(check.problems),
        }
    }

    fn fill_in(&self, check: &mut Check, data: Option<&DataFacts>) -> Option<TrainSpec> {
        check.integer("/spec_version", self.spec_version.unwrap_or(1), 1, 1);
        let batch = fill_in_batch(check, &self.batch.clone().unwrap_or_default(), data);
        let model = fill_in_model(check, self.model.as_ref(), data, batch.sequence_length);
        let schedule = self.fill_in_schedule(check);
        let last_seq = schedule.num_steps.saturating_mul(batch.num_seqs).saturating_add(batch.skip_seqs);
        if last_seq > MAX_SEQS {
            check.problem("/schedule/num_steps", format!("makes {last_seq} sequences; a run has {MAX_SEQS} at most"));
        }
        let method = fill_in_method(check, self.method.as_ref(), &model, &schedule);
        let kind = self.method.as_ref().and_then(|method| method.kind);
        let memory = fill_in_memory(check, &self.memory.clone().unwrap_or_default(), kind);
        let eval = self.eval.clone().unwrap_or_default();
        let prompts = eval.prompts.unwrap_or_default();
        check.at_most_items("/eval/prompts", prompts.len(), 16);
        for (index, prompt) in prompts.iter().enumerate() {
            check.text(&format!("/eval/prompts/{index}"), prompt, 2_000);
        }
        let resources = self.resources.clone().unwrap_or_default();
        let num_gpus = resources.num_gpus.unwrap_or(1);
        check.integer("/resources/num_gpus", num_gpus, 1, MAX_GPUS);
        let labels = self.labels.clone().unwrap_or_default();
        check.at_most_items("/labels", labels.len(), 64);
        for (key, value) in &labels {
            let pointer = format!("/labels/{}", json::escape(key));
            check.text(&pointer, key, 100);
            check.text(&pointer, value, 255);
        }
        let name = self.name.clone().unwrap_or_else(|| "untitled".into());
        check.text("/name", &name, 200);

        Some(TrainSpec {
            spec_version: 1,
            name,
            dataset: data?.dataset.clone(),
            tokenization: data?.tokenization.clone(),
            init_checkpoint: self.init_checkpoint.clone(),
            optimizer: fill_in_optimizer(check, &self.optimizer.clone().unwrap_or_default()),
            precision: self.precision.unwrap_or(Precision::Fp32),
            deterministic: self.deterministic.unwrap_or(true),
            seed: check.integer("/seed", self.seed.unwrap_or(0), 0, i64::from(u32::MAX)),
            eval: EvalSpec {
                every_steps: check.integer("/eval/every_steps", eval.every_steps.unwrap_or(500), 1, MAX_STEPS),
                max_tokens: check.integer("/eval/max_tokens", eval.max_tokens.unwrap_or(10_000_000), 1, MAX_INTEGER),
                prompts,
            },
            checkpoints: fill_in_checkpoints(check, &self.checkpoints.clone().unwrap_or_default()),
            state_every_s: check.integer("/state_every_s", self.state_every_s.unwrap_or(60), 1, 86_400),
            resources: ResourcesSpec { device: resources.device.unwrap_or(super::Device::Auto), num_gpus },
            priority: check.integer("/priority", self.priority.unwrap_or(0), -1_000, 1_000),
            labels,
            max_runtime_s: self.max_runtime_s.map(|s| check.integer("/max_runtime_s", s, 1, MAX_INTEGER)),
            max_stall_s: check.integer("/max_stall_s", self.max_stall_s.unwrap_or(900), 1, 86_400),
            retries: fill_in_retries(check, &self.retries.clone().unwrap_or_default()),
            model,
            method,
            schedule,
            batch,
            memory,
        })
    }

    fn fill_in_schedule(&self, check: &mut Check) -> ScheduleSpec {
        let request = self.schedule.clone().unwrap_or_default();
        let num_steps = check.required("/schedule/num_steps", request.num_steps, 1, MAX_STEPS);
        let warmup_steps = request.warmup_steps.unwrap_or_else(|| (num_steps / 20).min(500));
        check.integer("/schedule/warmup_steps", warmup_steps, 0, num_steps - 1);
        let min_lr_frac = request.min_lr_frac.unwrap_or(0.1);
        check.number("/schedule/min_lr_frac", min_lr_frac, Bounds::OpenClosed(0.0, 1.0));
        ScheduleSpec { num_steps, warmup_steps, min_lr_frac }
    }
}

fn fill_in_retries(check: &mut Check, request: &RetriesRequest) -> RetriesSpec {
    RetriesSpec {
        infrastructure: check.integer("/retries/infrastructure", request.infrastructure.unwrap_or(5), 0, 1_000),
        user: check.integer("/retries/user", request.user.unwrap_or(0), 0, 1_000),
    }
}

fn fill_in_model(
    check: &mut Check,
    request: Option<&ModelRequest>,
    data: Option<&DataFacts>,
    sequence_length: i64,
) -> ModelSpec {
    let Some(request) = request else {
        check.problem("/model", "is required: name a preset, give the sizes, or name an init_checkpoint");
        return ModelSpec::smallest();
    };
    let preset = request.preset.as_deref().and_then(presets::find);
    if let (Some(name), None) = (&request.preset, preset) {
        let known: Vec<_> = PRESETS.iter().map(|preset| preset.name).collect();
        check.problem("/model/preset", format!("{name:?} is not known; there are {}", known.join(", ")));
        return ModelSpec::smallest();
    }
    let mut size = |name: &str, given: Option<i64>, of_preset: Option<i64>, max: i64| {
        check.required(&format!("/model/{name}"), given.or(of_preset), 1, max)
    };
    let hidden_size = size("hidden_size", request.hidden_size, preset.map(|p| p.hidden_size), 65_536);
    let intermediate_size =
        size("intermediate_size", request.intermediate_size, preset.map(|p| p.intermediate_size), 262_144);
    let num_hidden_layers =
        size("num_hidden_layers", request.num_hidden_layers, preset.map(|p| p.num_hidden_layers), 512);
    let num_attention_heads =
        size("num_attention_heads", request.num_attention_heads, preset.map(|p| p.num_attention_heads), 1_024);
    let num_key_value_heads =
        size("num_key_value_heads", request.num_key_value_heads, Some(num_attention_heads), 1_024);
    let max_position_embeddings =
        size("max_position_embeddings", request.max_position_embeddings, Some(sequence_length.max(2_048)), 1 << 20);
    let data_vocab_size = data.map_or(1, |data| data.vocab_size);
    let vocab_size = request.vocab_size.unwrap_or(data_vocab_size);

    check.integer("/model/vocab_size", vocab_size, data_vocab_size, 1 << 20);
    if hidden_size % num_attention_heads != 0 {
        check.problem(
            "/model/num_attention_heads",
            format!("{num_attention_heads} does not divide hidden_size {hidden_size}"),
        );
    } else if hidden_size / num_attention_heads % 2 != 0 {
        check.problem(
            "/model/num_attention_heads",
            format!(
                "gives heads of {} elements; rotary embeddings need an even number",
                hidden_size / num_attention_heads
            ),
        );
    }
    if num_attention_heads % num_key_value_heads != 0 {
        check.problem(
            "/model/num_key_value_heads",
            format!("{num_key_value_heads} does not divide num_attention_heads {num_attention_heads}"),
        );
    }
    if max_position_embeddings < sequence_length {
        check.problem(
            "/model/max_position_embeddings",
            format!("{max_position_embeddings} is less than the sequence length {sequence_length}"),
        );
    }
    let rms_norm_eps = request.rms_norm_eps.unwrap_or(1e-6);
    check.number("/model/rms_norm_eps", rms_norm_eps, Bounds::OpenClosed(0.0, 1.0));
    let rope_theta = request.rope_theta.unwrap_or(10_000.0);
    check.number("/model/rope_theta", rope_theta, Bounds::Closed(1.0, 1e9));
    let initializer_range = request.initializer_range.unwrap_or(0.02);
    check.number("/model/initializer_range", initializer_range, Bounds::OpenClosed(0.0, 1.0));

    ModelSpec {
        preset: request.preset.clone(),
        vocab_size,
        hidden_size,
        intermediate_size,
        num_hidden_layers,
        num_attention_heads,
        num_key_value_heads,
        max_position_embeddings,
        rms_norm_eps,
        rope_theta,
        initializer_range,
        tie_word_embeddings: request.tie_word_embeddings.unwrap_or(false),
    }
}

impl ModelSpec {
    /// Stands in where the sizes are wrong, so that the rest of a spec can still be checked.
    fn smallest() -> Self {
        Self {
            preset: None,
            vocab_size: 1,
            hidden_size: i64::from(u16::MAX),
            intermediate_size: i64::from(u16::MAX),
            num_hidden_layers: 1,
            num_attention_heads: 1,
            num_key_value_heads: 1,
            max_position_embeddings: 1,
            rms_norm_eps: 1e-6,
            rope_theta: 1e4,
            initializer_range: 0.02,
            tie_word_embeddings: false,
        }
    }
}

fn fill_in_batch(check: &mut Check, request: &BatchRequest, data: Option<&DataFacts>) -> BatchSpec {
    let num_seqs = check.required("/batch/num_seqs", request.num_seqs, 1, 1 << 20);
    let sequence_length = check.required("/batch/sequence_length", request.sequence_length, 2, 1 << 20);
    let micro_batch_seqs = match request.micro_batch_seqs {
        Some(MicroBatch::Seqs(seqs)) => MicroBatch::Seqs(check.integer("/batch/micro_batch_seqs", seqs, 1, num_seqs)),
        Some(MicroBatch::Auto(_)) | None => MicroBatch::AUTO,
    };
    let splits = data.map(|data| [("training", data.max_train_tokens), ("validation", data.max_valid_tokens)]);
    for (split, max_tokens) in splits.into_iter().flatten().filter(|&(_, max_tokens)| max_tokens < sequence_length) {
        check.problem(
            "/batch/sequence_length",
            format!("{sequence_length} is longer than the {split} data, which has {max_tokens} tokens at most"),
        );
    }
    let skip_seqs = check.integer("/batch/skip_seqs", request.skip_seqs.unwrap_or(0), 0, MAX_SEQS);
    BatchSpec { num_seqs, sequence_length, micro_batch_seqs, skip_seqs }
}

fn fill_in_memory(check: &mut Check, request: &MemoryRequest, method: Option<MethodType>) -> MemorySpec {
    let spec = MemorySpec {
        recompute: request.recompute.unwrap_or(Recompute::Cheap),
        frozen_weights: request.frozen_weights.unwrap_or(FrozenWeights::Full),
        merged_weights: request.merged_weights.unwrap_or(MergedWeights::Auto),
    };
    if spec.frozen_weights == FrozenWeights::Full {
        return spec;
    }
    if let Some(kind) = method.filter(|kind| !matches!(kind, MethodType::Lora | MethodType::Relora)) {
        let message = format!("only lora and relora have frozen weights; the method {} trains all", kind.name());
        check.problem("/memory/frozen_weights", message);
    }
    if spec.merged_weights == MergedWeights::Resident {
        check.problem(
            "/memory/merged_weights",
            "excludes quantised frozen weights: resident would keep all of them unquantised; take scratch or auto",
        );
    }
    spec
}

fn fill_in_checkpoints(check: &mut Check, request: &CheckpointsRequest) -> CheckpointsSpec {
    let every_steps = check.integer("/checkpoints/every_steps", request.every_steps.unwrap_or(1_000), 1, MAX_STEPS);
    let mut optional = |name: &str, value: Option<i64>, max: i64| {
        value.map(|value| check.integer(&format!("/checkpoints/{name}"), value, 1, max))
    };
    let spec = CheckpointsSpec {
        every_steps,
        keep_last: optional("keep_last", request.keep_last, MAX_STEPS),
        keep_every_steps: optional("keep_every_steps", request.keep_every_steps, MAX_STEPS),
        keep_best: optional("keep_best", request.keep_best, MAX_STEPS),
        ttl_s: optional("ttl_s", request.ttl_s, MAX_INTEGER),
    };
    for (name, value) in [("keep_every_steps", spec.keep_every_steps), ("keep_best", spec.keep_best)] {
        if value.is_some() && spec.keep_last.is_none() {
            check.problem(format!("/checkpoints/{name}"), "needs a keep_last beside it: without one all are kept");
        }
    }
    if let Some(keep) = request.keep_every_steps.filter(|&keep| keep > 0 && keep % every_steps != 0) {
        let message =
            format!("{keep} is no multiple of every_steps {every_steps}: there is no checkpoint at such a step");
        check.problem("/checkpoints/keep_every_steps", message);
    }
    spec
}

fn fill_in_optimizer(check: &mut Check, request: &OptimizerRequest) -> OptimizerSpec {
    let learning_rate = request.learning_rate.unwrap_or(1e-3);
    let spec = OptimizerSpec {
        learning_rate,
        warm_start_learning_rate: request.warm_start_learning_rate.unwrap_or(learning_rate / 2.0),
        betas: request.betas.unwrap_or([0.9, 0.999]),
        eps: request.eps.unwrap_or(1e-8),
        weight_decay: request.weight_decay.unwrap_or(0.0),
        clip_norm: request.clip_norm.unwrap_or(1.0),
    };
    check.number("/optimizer/learning_rate", spec.learning_rate, Bounds::OpenClosed(0.0, 10.0));
    check.number("/optimizer/warm_start_learning_rate", spec.warm_start_learning_rate, Bounds::OpenClosed(0.0, 10.0));
    check.number("/optimizer/betas/0", spec.betas[0], Bounds::ClosedOpen(0.0, 1.0));
    check.number("/optimizer/betas/1", spec.betas[1], Bounds::ClosedOpen(0.0, 1.0));
    check.number("/optimizer/eps", spec.eps, Bounds::OpenClosed(0.0, 1.0));
    check.number("/optimizer/weight_decay", spec.weight_decay, Bounds::Closed(0.0, 10.0));
    check.number("/optimizer/clip_norm", spec.clip_norm, Bounds::Closed(0.0, 1e6));
    spec
}
