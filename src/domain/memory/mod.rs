//! What a run holds in memory, by what it is for: an estimate from the spec and from what the trainer chose.
//!
//! Not counted: libtorch's own buffers and kernels; what attention works in, on the CPU
//! up to 4 KB a position and thread, on a GPU copies by head of one layer's queries, keys and values; with dropout a
//! layer's masked inputs; padding; and the copies of tensors that are on their way to the disk.

mod choose;
#[cfg(test)]
mod tests;

use std::fmt;

use super::spec::{
    Choices, Device, FactorsSpec, FrozenWeights, Linear, MergedPlan, MethodSpec, ModelSpec, Precision, Recompute,
    TrainSpec,
};
pub use choose::{Shortage, choose, needed_bytes, shortage, too_large};

/// An fp32 value with its gradient and its two moments.
const TRAINED_BYTES: i64 = 16;
const FP32_BYTES: i64 = 4;
/// Tokens whose logits are there at once.
const LOSS_CHUNK_TOKENS: i64 = 1_024;
/// Elements of an NF4 block, which share a scale.
const NF4_BLOCK: i64 = 64;

/// What lies in the memory of one device at once, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MemoryNeeds {
    /// The full-rank phase; empty if there is none, as in a low-rank method without a warm start.
    pub full_rank: WeightBytes,
    /// The low-rank phase; empty if there is none.
    pub low_rank: WeightBytes,
    /// What the backward pass of a micro-batch finds kept.
    pub activations: i64,
    /// The probabilities of attention, and the scores of one layer. None on the CPU, where neither is kept.
    pub probabilities: i64,
    /// What a layer uses while it is computed.
    pub transient: i64,
    /// The logits that are there at once.
    pub logits: i64,
    micro_batch_seqs: i64,
    sequence_length: i64,
}

/// What a phase holds whatever the batch.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct WeightBytes {
    /// Trained parameters with gradients and moments, and what beside the matrices of the layers is not trained.
    pub parameters: i64,
    /// Copies in bf16 of the trained matrices, and the largest gradient before it is added up in fp32.
    pub bf16_copies: i64,
    /// The frozen matrices in fp32. Of quantised ones this master lies in host memory, and not on a GPU.
    pub master: i64,
    /// The frozen matrices, quantised.
    pub quantised: i64,
    /// W + sBA, of all layers or of one. With dropout copies of W, of which fp32 mostly needs none.
    pub merged: i64,
}

/// What a run with these choices needs on a device.
pub fn bytes(spec: &TrainSpec, choices: &Choices, device: Device) -> i64 {
    MemoryNeeds::of(spec, choices, device).bytes()
}

impl MemoryNeeds {
    pub fn of(spec: &TrainSpec, choices: &Choices, device: Device) -> Self {
        let model = spec.trained_model();
        let (hidden, intermediate) = (model.hidden_size, model.intermediate_size);
        let element = element_bytes(spec.precision);
        let tokens = choices.micro_batch_seqs.saturating_mul(spec.batch.sequence_length);
        let full_rank = full_rank_bytes(&model, spec.precision);
        let low_rank = |factors| low_rank_bytes(spec, factors, choices.merged_weights, device);
        let probabilities = if device == Device::Cuda { probability_bytes_per_token(spec, &model, element) } else { 0 };
        Self {
            full_rank: if has_full_rank_phase(&spec.method) { full_rank } else { WeightBytes::default() },
            low_rank: spec.method.factors().map(low_rank).unwrap_or_default(),
            activations: tokens.saturating_mul(kept_bytes_per_token(&model, spec.memory.recompute, element)),
            probabilities: tokens.saturating_mul(probabilities),
            transient: tokens.saturating_mul(3 * FP32_BYTES * hidden + element * (hidden + 3 * intermediate)),
            logits: element * tokens.min(LOSS_CHUNK_TOKENS) * model.vocab_size,
            micro_batch_seqs: choices.micro_batch_seqs,
            sequence_length: spec.batch.sequence_length,
        }
    }

    /// All of it. From one phase to the next only the trained values stay, while there are no activations.
    pub fn bytes(&self) -> i64 {
        let parts = [self.activations, self.probabilities, self.transient, self.logits];
        let of_batch = parts.into_iter().fold(0, i64::saturating_add);
        self.full_rank.bytes().max(self.low_rank.bytes()).saturating_add(of_batch)
    }
}

impl WeightBytes {
    fn bytes(&self) -> i64 {
        self.parameters + self.bf16_copies + self.master + self.quantised + self.merged
    }
}

/// Of an operand of a matrix product.
fn element_bytes(precision: Precision) -> i64 {
    match precision {
        Precision::Fp32 => FP32_BYTES,
        Precision::Bf16 => 2,
    }
}

/// Copies in bf16 of this many elements, where products take them.
fn bf16_bytes(precision: Precision, num_elements: i64) -> i64 {
    match precision {
        Precision::Fp32 => 0,
        Precision::Bf16 => 2 * num_elements,
    }
}

fn has_full_rank_phase(method: &MethodSpec) -> bool {
    match method {
        MethodSpec::Full {} | MethodSpec::Control(_) => true,
        MethodSpec::Factorized(_) => false,
        MethodSpec::Lora(_) | MethodSpec::Relora(_) => method.lora().is_some_and(|lora| lora.warm_start_steps > 0),
    }
}

fn full_rank_bytes(model: &ModelSpec, precision: Precision) -> WeightBytes {
    let head = model.vocab_size * model.hidden_size;
    let largest_gradient = model.linear_shapes().into_iter().map(|(o, i)| o * i).fold(head, i64::max);
    WeightBytes {
        parameters: TRAINED_BYTES * model.num_params(),
        bf16_copies: bf16_bytes(precision, model.num_linear_params() + head + largest_gradient),
        ..WeightBytes::default()
    }
}

fn low_rank_bytes(spec: &TrainSpec, factors: &FactorsSpec, plan: MergedPlan, device: Device) -> WeightBytes {
    let model = &spec.model;
    let layers = model.num_hidden_layers;
    let of_a_layer = |bytes: fn(i64, i64) -> i64| factors.target_shapes(model).map(|(o, i)| bytes(o, i)).sum::<i64>();
    let wrapped_in_a_layer = of_a_layer(|o, i| o * i);
    let wrapped = layers * wrapped_in_a_layer;
    let in_factors = layers * factors.rank * of_a_layer(|o, i| o + i);
    let embedding = model.vocab_size * model.hidden_size;
    let head_gradient = if factors.train_head { embedding } else { 0 };
    let trained_whole = Linear::ALL.into_iter().zip(model.linear_shapes());
    let trained_whole = trained_whole.filter(|(linear, _)| !factors.target_modules.contains(linear));
    let largest_gradient = trained_whole
        .map(|(_, (o, i))| o * i)
        .chain(factors.target_shapes(model).map(|(o, i)| factors.rank * o.max(i)))
        .fold(head_gradient, i64::max);
    let not_trained = if factors.train_embeddings { 0 } else { embedding }
        + if factors.train_head || model.tie_word_embeddings { 0 } else { embedding };
    let beside = WeightBytes {
        parameters: TRAINED_BYTES * (model.num_params() - wrapped - not_trained + in_factors)
            + FP32_BYTES * not_trained,
        bf16_copies: bf16_bytes(
            spec.precision,
            model.num_linear_params() - wrapped + embedding + in_factors + largest_gradient,
        ),
        ..WeightBytes::default()
    };
    // The factors stand in the place of the matrices: nothing is frozen, and nothing merged.
    if matches!(spec.method, MethodSpec::Factorized(_)) {
        return beside;
    }
    let is_quantised = spec.memory.frozen_weights != FrozenWeights::Full;
    WeightBytes {
        master: if is_quantised && device == Device::Cuda { 0 } else { FP32_BYTES * wrapped },
        quantised: match spec.memory.frozen_weights {
            FrozenWeights::Full => 0,
            FrozenWeights::Int8 => layers * of_a_layer(|o, i| o * i + FP32_BYTES * o),
            FrozenWeights::Nf4 => layers * of_a_layer(|o, i| (o * i + 1) / 2 + FP32_BYTES * num_blocks(o * i)),
        },
        merged: element_bytes(spec.precision)
            * match plan {
                MergedPlan::Resident => wrapped,
                MergedPlan::Scratch => wrapped_in_a_layer,
            },
        ..beside
    }
}

fn num_blocks(num_elements: i64) -> i64 {
    (num_elements + NF4_BLOCK - 1) / NF4_BLOCK
}

/// Activations of all layers that are kept for the backward pass, per token.
fn kept_bytes_per_token(model: &ModelSpec, recompute: Recompute, element: i64) -> i64 {
    let (hidden, intermediate, heads) = (model.hidden_size, model.intermediate_size, model.num_attention_heads);
    let keys_and_values = 2 * model.num_key_value_heads * model.head_dim();
    // The residual at the layer's input and in its middle; queries, keys and values; the attention's output and the
    // logarithms of its sums; gate and up.
    let of_a_layer = 2 * FP32_BYTES * hidden
        + element * (hidden + keys_and_values)
        + element * hidden
        + FP32_BYTES * heads
        + element * 2 * intermediate;
    let cheap = element * (2 * hidden + intermediate);
    match recompute {
        Recompute::None => model.num_hidden_layers * (of_a_layer + cheap),
        Recompute::Cheap => model.num_hidden_layers * of_a_layer,
        Recompute::Layers => model.num_hidden_layers * FP32_BYTES * hidden + of_a_layer,
    }
}

/// The probabilities of every layer that is kept whole, and the scores of the one that is computed, in fp32 and with
/// their gradients.
fn probability_bytes_per_token(spec: &TrainSpec, model: &ModelSpec, element: i64) -> i64 {
    let num_layers = if spec.memory.recompute == Recompute::Layers { 1 } else { model.num_hidden_layers };
    let per_layer = model.num_attention_heads * spec.batch.sequence_length;
    per_layer * (num_layers * element + FP32_BYTES + element)
}

impl fmt::Display for MemoryNeeds {
    /// Names the parts, each in GiB.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let phases = [("at full rank", self.full_rank), ("at low rank", self.low_rank)];
        for (when, phase) in phases.into_iter().filter(|(_, phase)| *phase != WeightBytes::default()) {
            write!(f, "{when} the run holds {} of weights, gradients and moments", gib(phase.parameters))?;
            let parts = [
                ("what is in bf16 beside them", phase.bf16_copies),
                ("frozen matrices", phase.master),
                ("quantised ones", phase.quantised),
                ("merged ones", phase.merged),
            ];
            for (name, bytes) in parts.into_iter().filter(|(_, bytes)| *bytes > 0) {
                write!(f, ", {} of {name}", gib(bytes))?;
            }
            write!(f, "; ")?;
        }
        let Self { micro_batch_seqs, sequence_length, .. } = self;
        let [activations, transient, logits] = [self.activations, self.transient, self.logits].map(gib);
        write!(
            f,
            "a micro-batch of {micro_batch_seqs} x {sequence_length} tokens takes {activations} of activations, "
        )?;
        if self.probabilities > 0 {
            write!(f, "{} of attention's probabilities, ", gib(self.probabilities))?;
        }
        write!(f, "{transient} while a layer is computed and {logits} of logits")
    }
}

pub(super) fn gib(bytes: i64) -> String {
    format!("{:.2} GiB", bytes as f64 / f64::from(1 << 30))
}
