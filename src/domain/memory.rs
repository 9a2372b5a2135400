//! What a run holds in memory, by what it is for. Activations depend on the engine and are not counted.

use std::fmt;

use super::spec::{Precision, TrainSpec};

/// Sizes in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MemoryNeeds {
    /// Values, gradients and both moments of what a full-rank phase trains; 0 if there is none.
    pub full_rank_phase_bytes: i64,
    /// The same of what a low-rank phase trains, and its frozen weights; 0 if there is none.
    pub low_rank_phase_bytes: i64,
    /// The logits of one micro-batch, in fp32.
    pub logits_bytes: i64,
    micro_batch_seqs: i64,
    sequence_length: i64,
}

/// An fp32 value with its gradient and its two moments.
const TRAINED_BYTES: i64 = 16;

impl MemoryNeeds {
    pub fn of(spec: &TrainSpec) -> Self {
        let model = spec.trained_model();
        let (low_rank_phase_bytes, has_full_rank_phase) = match (spec.method.factors(), spec.method.lora()) {
            (Some(_), None) => (low_rank_phase_bytes(spec), false),
            (Some(_), Some(lora)) => (low_rank_phase_bytes(spec), lora.warm_start_steps > 0),
            (None, _) => (0, true),
        };
        let batch = &spec.batch;
        Self {
            full_rank_phase_bytes: if has_full_rank_phase { TRAINED_BYTES * model.num_params() } else { 0 },
            low_rank_phase_bytes,
            logits_bytes: 4 * batch.micro_batch_seqs * (batch.sequence_length - 1) * model.vocab_size,
            micro_batch_seqs: batch.micro_batch_seqs,
            sequence_length: batch.sequence_length,
        }
    }
}

fn low_rank_phase_bytes(spec: &TrainSpec) -> i64 {
    let Some(factors) = spec.method.factors() else { return 0 };
    let model = &spec.model;
    let of_layers = |per_layer: i64| model.num_hidden_layers * per_layer;
    let wrapped_params = of_layers(factors.target_shapes(model).map(|(o, i)| o * i).sum());
    let factor_params = of_layers(factors.target_shapes(model).map(|(o, i)| factors.rank * (o + i)).sum());
    let trained_beside = model.num_params() - wrapped_params;
    // A master in fp32, and a copy for bf16 products.
    let frozen_bytes = match (spec.method.lora(), spec.precision) {
        (None, _) => 0,
        (Some(_), Precision::Fp32) => 4 * wrapped_params,
        (Some(_), Precision::Bf16) => 6 * wrapped_params,
    };
    TRAINED_BYTES * (trained_beside + factor_params) + frozen_bytes
}

impl fmt::Display for MemoryNeeds {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let phases = [("full-rank", self.full_rank_phase_bytes), ("low-rank", self.low_rank_phase_bytes)];
        for (phase, bytes) in phases.into_iter().filter(|(_, bytes)| *bytes > 0) {
            write!(f, "the {phase} phase holds {} of weights, gradients and moments, ", gib(bytes))?;
        }
        let (seqs, length) = (self.micro_batch_seqs, self.sequence_length);
        write!(
            f,
            "and the logits of a micro-batch of {seqs} x {length} tokens {}, beside all activations",
            gib(self.logits_bytes)
        )
    }
}

fn gib(bytes: i64) -> String {
    format!("{:.2} GiB", bytes as f64 / f64::from(1 << 30))
}
