//! What a run holds in memory, by what it is for. Activations depend on the engine and are not counted.

use std::fmt;

use super::spec::{FactorsSpec, MethodSpec, Precision, TrainSpec};

/// Sizes in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MemoryNeeds {
    /// Values, gradients and both moments of all parameters: the full-rank phase, or, without one, the moment before the
    /// model is wrapped. 0 where there is neither.
    pub full_rank_bytes: i64,
    /// The same of what the low-rank phase trains, and its frozen weights; 0 if there is none.
    pub low_rank_bytes: i64,
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
        let is_factorized = matches!(spec.method, MethodSpec::Factorized(_));
        let batch = &spec.batch;
        Self {
            full_rank_bytes: if is_factorized { 0 } else { TRAINED_BYTES * model.num_params() },
            low_rank_bytes: spec.method.factors().map_or(0, |factors| low_rank_bytes(spec, factors, is_factorized)),
            logits_bytes: 4 * batch.micro_batch_seqs * (batch.sequence_length - 1) * model.vocab_size,
            micro_batch_seqs: batch.micro_batch_seqs,
            sequence_length: batch.sequence_length,
        }
    }
}

fn low_rank_bytes(spec: &TrainSpec, factors: &FactorsSpec, is_factorized: bool) -> i64 {
    let model = &spec.model;
    let of_layers = |per_layer: i64| model.num_hidden_layers * per_layer;
    let wrapped = of_layers(factors.target_shapes(model).map(|(o, i)| o * i).sum());
    let in_factors = of_layers(factors.target_shapes(model).map(|(o, i)| factors.rank * (o + i)).sum());
    let embedding = model.vocab_size * model.hidden_size;
    let not_trained = if factors.train_embeddings { 0 } else { embedding }
        + if factors.train_head || model.tie_word_embeddings { 0 } else { embedding };
    // A master in fp32, and for products in bf16 a copy.
    let frozen_bytes = match (is_factorized, spec.precision) {
        (true, _) => 0,
        (false, Precision::Fp32) => 4 * wrapped,
        (false, Precision::Bf16) => 6 * wrapped,
    };
    TRAINED_BYTES * (model.num_params() - wrapped - not_trained + in_factors) + frozen_bytes + 4 * not_trained
}

impl fmt::Display for MemoryNeeds {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let phases = [("at full rank", self.full_rank_bytes), ("at low rank", self.low_rank_bytes)];
        for (when, bytes) in phases.into_iter().filter(|(_, bytes)| *bytes > 0) {
            write!(f, "{when} the run holds {} of weights, gradients and moments, ", gib(bytes))?;
        }
        let (seqs, length, logits) = (self.micro_batch_seqs, self.sequence_length, gib(self.logits_bytes));
        write!(
            f,
            "beside all activations, of which the logits of a micro-batch of {seqs} x {length} tokens are {logits}; \
             lower micro_batch_seqs or take a smaller model"
        )
    }
}

fn gib(bytes: i64) -> String {
    format!("{:.2} GiB", bytes as f64 / f64::from(1 << 30))
}
