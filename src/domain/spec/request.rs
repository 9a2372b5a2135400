//! The training spec as a client sends it: every field may be absent, unknown ones are refused.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use serde_json::Value;
use utoipa::ToSchema;

use super::{
    Device, FrozenWeights, Linear, MergedWeights, MethodPreset, MicroBatch, Precision, Recompute, RestartLr,
    RestartSchedule,
};
use crate::domain::{
    ids::{DatasetId, NodeId, TokenizationId},
    json,
    problem::Problem,
};

/// A training spec to submit. An absent field, or `null`, takes its default.
#[derive(Debug, Clone, Default, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct TrainSpecRequest {
    /// Version of this format: 1.
    pub spec_version: Option<i64>,
    pub name: Option<String>,
    /// The dataset to train on.
    #[schema(required, value_type = DatasetId)]
    pub dataset: Option<DatasetId>,
    /// How the dataset was turned into tokens; by default its newest tokenization.
    pub tokenization: Option<TokenizationId>,
    /// A stored checkpoint or base whose weights the run begins with.
    pub init_checkpoint: Option<NodeId>,
    /// Required without `init_checkpoint`; with it the model is the checkpoint's, and may be left out.
    pub model: Option<ModelRequest>,
    #[schema(required, value_type = MethodRequest)]
    pub method: Option<MethodRequest>,
    pub optimizer: Option<OptimizerRequest>,
    #[schema(required, value_type = ScheduleRequest)]
    pub schedule: Option<ScheduleRequest>,
    #[schema(required, value_type = BatchRequest)]
    pub batch: Option<BatchRequest>,
    pub memory: Option<MemoryRequest>,
    /// `fp32` by default.
    pub precision: Option<Precision>,
    /// Whether the same spec gives the same bits on the same kind of device; true by default.
    pub deterministic: Option<bool>,
    pub seed: Option<i64>,
    pub eval: Option<EvalRequest>,
    pub checkpoints: Option<CheckpointsRequest>,
    /// Seconds between states for an exact continuation; 60 by default.
    pub state_every_s: Option<i64>,
    pub resources: Option<ResourcesRequest>,
    /// Higher is sooner; 0 by default.
    pub priority: Option<i64>,
    pub labels: Option<BTreeMap<String, String>>,
    /// The job fails with `timeout` after this many seconds of running; no limit by default.
    pub max_runtime_s: Option<i64>,
    /// An attempt that says nothing for so many seconds fails with `stalled`; 900 by default.
    pub max_stall_s: Option<i64>,
    pub retries: Option<RetriesRequest>,
}

/// How often a job is tried again after an attempt has failed.
#[derive(Debug, Clone, Default, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct RetriesRequest {
    /// After failures of the infrastructure, in a row and without a newer state in between; 5 by default.
    pub infrastructure: Option<i64>,
    /// After failures of other kinds but `timeout`, in the whole job; 0 by default.
    pub user: Option<i64>,
}

/// Either a preset or all sizes; a size given beside a preset replaces the preset's.
#[derive(Debug, Clone, Default, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct ModelRequest {
    /// One of the paper's sizes, `llama-9m` to `llama-7b`.
    pub preset: Option<String>,
    /// By default the tokenization's.
    pub vocab_size: Option<i64>,
    pub hidden_size: Option<i64>,
    pub intermediate_size: Option<i64>,
    pub num_hidden_layers: Option<i64>,
    pub num_attention_heads: Option<i64>,
    /// Fewer than the attention heads for grouped-query attention; by default as many.
    pub num_key_value_heads: Option<i64>,
    /// By default 2048, or the sequence length where that is more.
    pub max_position_embeddings: Option<i64>,
    pub rms_norm_eps: Option<f64>,
    pub rope_theta: Option<f64>,
    pub initializer_range: Option<f64>,
    pub tie_word_embeddings: Option<bool>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum MethodType {
    Full,
    Control,
    Factorized,
    Lora,
    Relora,
}

impl MethodType {
    pub fn name(self) -> &'static str {
        match self {
            Self::Full => "full",
            Self::Control => "control",
            Self::Factorized => "factorized",
            Self::Lora => "lora",
            Self::Relora => "relora",
        }
    }
}

/// A field that does not belong to the named method is refused.
#[derive(Debug, Clone, Default, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct MethodRequest {
    #[serde(rename = "type")]
    #[schema(required, value_type = MethodType)]
    pub kind: Option<MethodType>,
    /// Where the defaults of `lora` and `relora` come from; `recommended` by default.
    pub preset: Option<MethodPreset>,
    /// Rank of the LoRA factors; 128 by default.
    pub rank: Option<i64>,
    /// The factors' product is scaled by alpha / rank; 32 by default. Or give `scale`.
    pub alpha: Option<f64>,
    /// What the factors' product is scaled by.
    pub scale: Option<f64>,
    /// Dropout on the input of the LoRA branch; 0 by default, 0.1 if `published`.
    pub dropout: Option<f64>,
    /// The matrices that get factors; all seven by default. The others train at full rank.
    pub target_modules: Option<Vec<Linear>>,
    /// Whether the embeddings train beside the factors; true by default.
    pub train_embeddings: Option<bool>,
    /// Whether the head trains beside the factors; true by default.
    pub train_head: Option<bool>,
    /// Full-rank updates before the model is wrapped; 0 by default.
    pub warm_start_steps: Option<i64>,
    /// Learning-rate warm-up at the start of the low-rank phase; by default the schedule's.
    pub relora_warmup_steps: Option<i64>,
    /// Updates between merges.
    pub restart_every_steps: Option<i64>,
    /// Updates between resets of optimizer and learning rate; by default `restart_every_steps`.
    pub reset_every_steps: Option<i64>,
    /// Learning-rate warm-up after a reset; by default a tenth of the period, 100 at most.
    pub restart_warmup_steps: Option<i64>,
    /// `jagged` by default.
    pub restart_schedule: Option<RestartSchedule>,
    /// `one_over_w` by default, `zero` if `published`.
    pub restart_lr: Option<RestartLr>,
    /// `zero` by default.
    pub optimizer_reset: Option<OptimizerResetRequest>,
    /// Allows a last cycle shorter than the others.
    pub allow_short_last_cycle: Option<bool>,
    /// Reports at every restart how many singular values of W - W(warm start) lie above this.
    pub rank_threshold: Option<f64>,
    /// Width of a control; by default what fits its number of parameters.
    pub hidden_size: Option<i64>,
    /// Feed-forward width of a control; by default what fits its number of parameters.
    pub intermediate_size: Option<i64>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum OptimizerResetType {
    Zero,
    Magnitude,
    Random,
    None,
}

#[derive(Debug, Clone, Default, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct OptimizerResetRequest {
    #[serde(rename = "type")]
    pub kind: Option<OptimizerResetType>,
    /// The share that `magnitude` and `random` clear.
    pub frac: Option<f64>,
    /// Whether Adam's step count begins again too; true by default, false if `published`.
    pub reset_step_count: Option<bool>,
    /// Whether `magnitude` and `random` clear both moments at the same places; true by default, false if `published`.
    pub joint_mask: Option<bool>,
}

#[derive(Debug, Clone, Default, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct OptimizerRequest {
    /// 1e-3 by default.
    pub learning_rate: Option<f64>,
    /// Half of `learning_rate` by default (the paper's rule, read backwards).
    pub warm_start_learning_rate: Option<f64>,
    /// [0.9, 0.999] by default.
    #[schema(value_type = Option<Vec<f64>>, min_items = 2, max_items = 2)]
    pub betas: Option<[f64; 2]>,
    pub eps: Option<f64>,
    /// 0 by default; never on norms and embeddings.
    pub weight_decay: Option<f64>,
    /// 1 by default; 0 switches clipping off.
    pub clip_norm: Option<f64>,
}

#[derive(Debug, Clone, Default, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct ScheduleRequest {
    /// Updates in the whole run, the warm start included.
    #[schema(required, value_type = i64)]
    pub num_steps: Option<i64>,
    /// By default a twentieth of the run, 500 at most.
    pub warmup_steps: Option<i64>,
    /// 0.1 by default.
    pub min_lr_frac: Option<f64>,
}

#[derive(Debug, Clone, Default, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct BatchRequest {
    /// Sequences per update.
    #[schema(required, value_type = i64)]
    pub num_seqs: Option<i64>,
    /// Tokens per sequence.
    #[schema(required, value_type = i64)]
    pub sequence_length: Option<i64>,
    /// Sequences that go through the model at once; `auto` by default, which leaves it to the trainer.
    pub micro_batch_seqs: Option<MicroBatch>,
    /// Sequences at the start of the run's order to pass over, because an earlier job has read them; 0 by default.
    pub skip_seqs: Option<i64>,
}

/// How memory is spent.
#[derive(Debug, Clone, Default, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct MemoryRequest {
    /// What the backward pass computes again instead of keeping it; `cheap` by default. The results do not depend on it.
    pub recompute: Option<Recompute>,
    /// How `lora` and `relora` keep the frozen matrices on the device; `full` by default.
    pub frozen_weights: Option<FrozenWeights>,
    /// Where W + sBA is kept, which is applied as one matrix; `auto` by default.
    pub merged_weights: Option<MergedWeights>,
}

#[derive(Debug, Clone, Default, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct EvalRequest {
    /// 500 by default.
    pub every_steps: Option<i64>,
    /// 10,000,000 by default.
    pub max_tokens: Option<i64>,
    pub prompts: Option<Vec<String>>,
}

#[derive(Debug, Clone, Default, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct CheckpointsRequest {
    /// 1000 by default.
    pub every_steps: Option<i64>,
    /// How many of the newest are kept; all by default. The newest one and pinned ones stay in any case.
    pub keep_last: Option<i64>,
    /// With `keep_last`, beside the newest: those whose step is a multiple of this.
    pub keep_every_steps: Option<i64>,
    /// With `keep_last`, beside the newest: as many with the lowest evaluation loss at their step.
    pub keep_best: Option<i64>,
    /// Seconds after which one goes in any case, unless it is pinned or the newest; never by default.
    pub ttl_s: Option<i64>,
}

#[derive(Debug, Clone, Default, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct ResourcesRequest {
    /// `auto` by default.
    pub device: Option<Device>,
    /// 1 by default.
    pub num_gpus: Option<i64>,
}

impl TrainSpecRequest {
    /// Reads a spec and reports every unknown field and wrong type at once.
    pub fn parse(mut json: Value) -> (Self, Vec<Problem>) {
        let mut problems = take_out_arrays(&mut json);
        let (request, more) = json::parse(json);
        problems.extend(more);
        (request, problems)
    }
}

/// serde also reads an object's fields from an array, in their order: nobody means that.
fn take_out_arrays(json: &mut Value) -> Vec<Problem> {
    const OBJECTS: [&str; 11] = [
        "/model",
        "/method/optimizer_reset",
        "/method",
        "/optimizer",
        "/schedule",
        "/batch",
        "/memory",
        "/eval",
        "/checkpoints",
        "/resources",
        "/retries",
    ];
    let is_array = |pointer: &&str| json.pointer(pointer).is_some_and(Value::is_array);
    let pointers: Vec<_> = OBJECTS.into_iter().filter(is_array).collect();
    for pointer in &pointers {
        json::take_out(json, pointer);
    }
    pointers.into_iter().map(|pointer| Problem::new(pointer, "must be an object, not an array")).collect()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn pointers(json: Value) -> Vec<String> {
        let (_, problems) = TrainSpecRequest::parse(json);
        problems.into_iter().map(|problem| problem.pointer).collect()
    }

    #[test]
    fn every_unknown_field_and_wrong_type_is_reported_at_once() {
        let mut found = pointers(json!({
            "colour": "red",
            "seed": "zero",
            "model": {"preset": "llama-9m", "heads": 4},
            "method": {"type": "relora", "rank": 1.5, "optimizer_reset": {"type": "maybe"}},
            "optimizer": {"betas": [0.9, "x"]},
            "batch": {"micro_batch_seqs": "some"},
            "memory": {"recompute": "all", "frozen": "int8"},
            "schedule": [1, 100],
        }));
        found.sort();
        assert_eq!(
            found,
            [
                "/batch/micro_batch_seqs",
                "/colour",
                "/memory/frozen",
                "/memory/recompute",
                "/method/optimizer_reset/type",
                "/method/rank",
                "/model/heads",
                "/optimizer/betas/1",
                "/schedule",
                "/seed",
            ]
        );
    }

    #[test]
    fn a_document_that_is_no_object_is_one_problem() {
        assert_eq!(pointers(json!([1, 2])), [""]);
        assert_eq!(pointers(json!("spec")), [""]);
    }

    #[test]
    fn settings_in_groups_are_objects() {
        assert_eq!(pointers(json!({"memory": ["none", "full", "auto"]})), ["/memory"]);
        assert_eq!(pointers(json!({"retries": [3, 1]})), ["/retries"]);
        assert_eq!(pointers(json!({"memory": null, "batch": {"micro_batch_seqs": "auto"}})), [""; 0]);
    }

    #[test]
    fn integers_may_be_written_with_a_fraction_of_zero() {
        let (request, problems) = TrainSpecRequest::parse(json!({"schedule": {"num_steps": 1475.0}}));
        assert_eq!(problems, []);
        assert_eq!(request.schedule.and_then(|s| s.num_steps), Some(1475));
    }
}
