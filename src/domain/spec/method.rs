//! How the weights are trained: the methods of the paper, and every choice that they leave.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::ModelSpec;

/// How the weights are trained.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum MethodSpec {
    /// Every parameter at full rank.
    #[schema(title = "FullMethod")]
    Full {},
    /// A smaller model at full rank, with as many parameters as a low-rank method would train.
    #[schema(title = "ControlMethod")]
    Control(ControlSpec),
    /// Every wrapped matrix is the product sBA alone, from the start: the paper's row "LoRA".
    #[schema(title = "FactorizedMethod")]
    Factorized(FactorsSpec),
    /// W0 frozen, one pair of factors per matrix for the whole run: W0 + sBA.
    #[schema(title = "LoraMethod")]
    Lora(LoraSpec),
    /// LoRA with restarts: merge, draw again, reset the optimizer, warm up again.
    #[schema(title = "ReloraMethod")]
    Relora(ReloraSpec),
}

/// The model that `control` trains: the spec's own, but for these sizes.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct ControlSpec {
    /// Rank of the low-rank method that this run is compared with.
    pub rank: i64,
    pub hidden_size: i64,
    pub intermediate_size: i64,
}

/// Low-rank factors, and what is trained beside them.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct FactorsSpec {
    pub rank: i64,
    /// The s of W + sBA. `peft` writes it as lora_alpha / r.
    pub scale: f64,
    /// Dropout on the input of the factors.
    pub dropout: f64,
    /// The matrices that get factors. The others train at full rank, as the norms do.
    pub target_modules: Vec<Linear>,
    pub train_embeddings: bool,
    pub train_head: bool,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct LoraSpec {
    #[serde(flatten)]
    pub factors: FactorsSpec,
    /// Full-rank updates before the model is wrapped.
    pub warm_start_steps: i64,
    /// Learning-rate warm-up at the start of the low-rank phase.
    pub relora_warmup_steps: i64,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct ReloraSpec {
    #[serde(flatten)]
    pub lora: LoraSpec,
    /// Updates between merges.
    pub restart_every_steps: i64,
    /// Updates between resets of optimizer and learning rate.
    pub reset_every_steps: i64,
    pub restart_warmup_steps: i64,
    pub restart_schedule: RestartSchedule,
    pub restart_lr: RestartLr,
    pub optimizer_reset: OptimizerReset,
    pub allow_short_last_cycle: bool,
    /// Singular values of W - W(warm start) above this are counted at every restart; null counts none.
    pub rank_threshold: Option<f64>,
}

/// Settings that go together. A field that is given counts more than its preset.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum MethodPreset {
    /// What this project advises.
    #[default]
    Recommended,
    /// As the paper's code does it, its zero-initialisation bug excepted.
    Published,
}

/// A matrix of a layer that may be wrapped.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, ToSchema)]
pub enum Linear {
    #[serde(rename = "q_proj")]
    Query,
    #[serde(rename = "k_proj")]
    Key,
    #[serde(rename = "v_proj")]
    Value,
    #[serde(rename = "o_proj")]
    Output,
    #[serde(rename = "gate_proj")]
    Gate,
    #[serde(rename = "up_proj")]
    Up,
    #[serde(rename = "down_proj")]
    Down,
}

impl Linear {
    /// In the order of `ModelSpec::linear_shapes`.
    pub const ALL: [Self; 7] = [Self::Query, Self::Key, Self::Value, Self::Output, Self::Gate, Self::Up, Self::Down];

    /// The name of the module.
    pub fn name(self) -> &'static str {
        match self {
            Self::Query => "q_proj",
            Self::Key => "k_proj",
            Self::Value => "v_proj",
            Self::Output => "o_proj",
            Self::Gate => "gate_proj",
            Self::Up => "up_proj",
            Self::Down => "down_proj",
        }
    }

    /// The path of the module within its layer.
    pub fn path(self) -> &'static str {
        match self {
            Self::Query => "self_attn.q_proj",
            Self::Key => "self_attn.k_proj",
            Self::Value => "self_attn.v_proj",
            Self::Output => "self_attn.o_proj",
            Self::Gate => "mlp.gate_proj",
            Self::Up => "mlp.up_proj",
            Self::Down => "mlp.down_proj",
        }
    }
}

/// How the learning rate goes over the restarts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum RestartSchedule {
    /// It falls at every reset and warms up again to the cosine.
    Jagged,
    /// Every cycle is a cosine of its own, from the full peak. Its warm-up is `relora_warmup_steps`.
    Cyclical,
    /// One cosine, whatever restarts.
    Plain,
}

/// The learning rate of the first update after a reset.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum RestartLr {
    /// One part in `restart_warmup_steps` of the value where the warm-up joins the cosine.
    OneOverW,
    /// Zero, as in the published code: the first update of a cycle moves nothing.
    Zero,
}

/// What a reset does to the Adam state of the factors.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(tag = "type", rename_all = "snake_case", deny_unknown_fields)]
pub enum OptimizerReset {
    /// Moments back to zero.
    #[schema(title = "ZeroReset")]
    Zero {
        /// Whether Adam's step count begins again too, and its bias correction with it.
        reset_step_count: bool,
    },
    /// The moments' smallest entries, a share of each factor's, become zero.
    #[schema(title = "MagnitudeReset")]
    Magnitude {
        frac: f64,
        reset_step_count: bool,
        /// Whether one mask, made from the first moment, acts on both.
        joint_mask: bool,
    },
    /// A random share of the moments' entries becomes zero.
    #[schema(title = "RandomReset")]
    Random { frac: f64, reset_step_count: bool, joint_mask: bool },
    /// Nothing is reset.
    #[schema(title = "NoReset")]
    None {},
}

impl OptimizerReset {
    pub fn resets_step_count(self) -> bool {
        match self {
            Self::Zero { reset_step_count }
            | Self::Magnitude { reset_step_count, .. }
            | Self::Random { reset_step_count, .. } => reset_step_count,
            Self::None {} => false,
        }
    }
}

impl MethodSpec {
    /// The factors of a low-rank method.
    pub fn factors(&self) -> Option<&FactorsSpec> {
        match self {
            Self::Full {} | Self::Control(_) => None,
            Self::Factorized(factors) => Some(factors),
            Self::Lora(lora) => Some(&lora.factors),
            Self::Relora(relora) => Some(&relora.lora.factors),
        }
    }

    /// The low-rank phase of a method that has one beside its full-rank phase.
    pub fn lora(&self) -> Option<&LoraSpec> {
        match self {
            Self::Lora(lora) => Some(lora),
            Self::Relora(relora) => Some(&relora.lora),
            _ => None,
        }
    }

    /// Above which singular values are counted at every restart, where ranks are asked for.
    pub fn rank_threshold(&self) -> Option<f64> {
        self.relora()?.rank_threshold
    }

    pub fn relora(&self) -> Option<&ReloraSpec> {
        match self {
            Self::Relora(relora) => Some(relora),
            _ => None,
        }
    }
}

impl FactorsSpec {
    /// (out, in) of a layer's wrapped matrices.
    pub fn target_shapes(&self, model: &ModelSpec) -> impl Iterator<Item = (i64, i64)> {
        let wrapped = Linear::ALL.into_iter().zip(model.linear_shapes());
        wrapped.filter(|(linear, _)| self.target_modules.contains(linear)).map(|(_, shape)| shape)
    }
}

impl ControlSpec {
    /// The sizes at which a model of this shape has as many parameters as LoRA at this rank would train: its layers
    /// and heads stay, and its feed-forward part is as wide, compared with the rest, as nearly as can be.
    pub fn of(rank: i64, model: &ModelSpec) -> Self {
        let trained = model.num_params() - model.num_linear_params() + model.num_lora_params(rank);
        let aspect = model.intermediate_size as f64 / model.hidden_size as f64;
        // A head keeps an even number of elements.
        let width_step = 2 * model.num_attention_heads;
        let sized = |hidden_size: i64| {
            let without_mlp = ModelSpec { hidden_size, intermediate_size: 0, ..model.clone() }.num_params();
            let left = (trained - without_mlp) as f64;
            let intermediate_size = (left / (3 * hidden_size * model.num_hidden_layers) as f64).round() as i64;
            Self { rank, hidden_size, intermediate_size }
        };
        let off = |sizes: &Self| {
            let ratio = sizes.intermediate_size.max(1) as f64 / sizes.hidden_size as f64 / aspect;
            ratio.ln().abs()
        };
        let candidates = (1..=2 * (model.hidden_size / width_step).max(1)).map(|n| sized(n * width_step));
        let nearest = candidates.filter(|sizes| sizes.intermediate_size >= 1).min_by(|a, b| off(a).total_cmp(&off(b)));
        nearest.unwrap_or(Self { rank, hidden_size: width_step, intermediate_size: 1 })
    }
}
