//! The settings that fit: chosen before a run, and named after one for which memory was too small.

use super::{MemoryNeeds, WeightBytes, bytes, gib};
use crate::domain::spec::{Choices, Device, FrozenWeights, MemorySpec, MergedPlan, Recompute, TrainSpec};

/// Tokens of a micro-batch beyond which products do not get faster: matrices are larger than the caches by then.
const MAX_TOKENS_CPU: i64 = 4_096;
/// The same on a GPU: products of so many rows keep all of its multiprocessors busy for many rounds.
const MAX_TOKENS_CUDA: i64 = 65_536;

/// The share of the memory that a run is planned for, in per cent. The rest is for what the estimate does not count.
const PLANNED_PERCENT: i64 = 80;

/// Settles what a spec leaves to the trainer. `device` is the one that the run is on, `memory_bytes` what is free there;
/// where that is not known, everything is taken to fit.
pub fn choose(spec: &TrainSpec, device: Device, memory_bytes: Option<i64>) -> Choices {
    let fits = |choices: Choices| memory_bytes.is_none_or(|memory| fits(spec, choices, device, memory));
    let with = |merged_weights| move |micro_batch_seqs| Choices { micro_batch_seqs, merged_weights };
    let is_quantised = spec.memory.frozen_weights != FrozenWeights::Full;
    let given = spec.batch.micro_batch_seqs.seqs();
    let merged_weights = spec.memory.merged_weights.plan().unwrap_or_else(|| {
        match !is_quantised && fits(with(MergedPlan::Resident)(given.unwrap_or(1))) {
            true => MergedPlan::Resident,
            false => MergedPlan::Scratch,
        }
    });
    let max_tokens = if device == Device::Cuda { MAX_TOKENS_CUDA } else { MAX_TOKENS_CPU };
    let most = (max_tokens / spec.batch.sequence_length).clamp(1, spec.batch.num_seqs);
    let micro_batch_seqs = given.unwrap_or_else(|| {
        let fitting = largest(most, |seqs| fits(with(merged_weights)(seqs)));
        // With fewer than one it fails, and says why.
        fitting.unwrap_or(1)
    });
    with(merged_weights)(micro_batch_seqs)
}

/// What a run that goes on after `step` updates needs at the least with the settings that it has: what they leave open
/// is chosen for little memory, and a warm start that is over needs none.
pub fn needed_bytes(spec: &TrainSpec, step: i64, device: Device) -> i64 {
    let choices = Choices {
        micro_batch_seqs: spec.batch.micro_batch_seqs.seqs().unwrap_or(1),
        merged_weights: spec.memory.merged_weights.plan().unwrap_or(MergedPlan::Scratch),
    };
    let mut needs = MemoryNeeds::of(spec, &choices, device);
    if spec.method.lora().is_some_and(|lora| step > lora.warm_start_steps) {
        needs.full_rank = WeightBytes::default();
    }
    needs.bytes()
}

/// A run for which memory is too small.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Shortage {
    /// The part of the spec whose change would help, as a JSON pointer.
    pub pointer: &'static str,
    /// What the run needs, and what would fit.
    pub message: String,
}

/// What is wrong with a run for which this memory is too small, whatever is chosen where the spec leaves a choice.
/// Nothing, where it may do.
pub fn shortage(spec: &TrainSpec, device: Device, memory_bytes: i64) -> Option<Shortage> {
    let choices = choose(spec, device, Some(memory_bytes));
    let needs = MemoryNeeds::of(spec, &choices, device);
    (needs.bytes() > memory_bytes).then(|| {
        let (pointer, advice) = remedy(spec, choices, device, memory_bytes);
        Shortage { pointer, message: told(&needs, &advice) }
    })
}

/// Says of a run that memory was too small for what it holds there, and which settings would fit. What the spec leaves
/// to the trainer is chosen as for a run.
pub fn too_large(spec: &TrainSpec, device: Device, memory_bytes: Option<i64>) -> String {
    let choices = choose(spec, device, memory_bytes);
    let advice = match memory_bytes {
        Some(memory) => remedy(spec, choices, device, memory).1,
        None => "lower batch.micro_batch_seqs, set memory.recompute to layers, or take a smaller model".into(),
    };
    told(&MemoryNeeds::of(spec, &choices, device), &advice)
}

fn told(needs: &MemoryNeeds, advice: &str) -> String {
    format!("{needs}; by this estimate {} at once. {advice}", gib(needs.bytes()))
}

/// The least change after which the estimate fits, with a pointer to what is to be changed.
fn remedy(spec: &TrainSpec, choices: Choices, device: Device, memory: i64) -> (&'static str, String) {
    let there = gib(memory);
    let fitting = |spec: &TrainSpec, merged_weights, most| {
        largest(most, |micro_batch_seqs| fits(spec, Choices { micro_batch_seqs, merged_weights }, device, memory))
    };
    // Where it should have fitted, the memory is not this run's alone, and half is a guess.
    let should_have_fitted = fits(spec, choices, device, memory);
    let fewer = if should_have_fitted { choices.micro_batch_seqs / 2 } else { choices.micro_batch_seqs - 1 };
    if let Some(seqs) = fitting(spec, choices.merged_weights, fewer) {
        let advice = format!("{there} are there, for which a batch.micro_batch_seqs of {seqs} would do");
        return ("/batch/micro_batch_seqs", advice);
    }
    if should_have_fitted {
        return ("/memory", format!("{there} are there, which should do: something else uses them"));
    }
    for smallest in smaller_forms(spec) {
        if let Some(seqs) = fitting(&smallest, MergedPlan::Scratch, choices.micro_batch_seqs) {
            let settings = changes(spec, choices, smallest.memory.frozen_weights).join(", ");
            let advice =
                format!("{there} are there, for which {settings} and a batch.micro_batch_seqs of {seqs} would do");
            return ("/memory", advice);
        }
    }
    let least = least_bytes(spec, device);
    let planned =
        if least <= memory { format!(", of which {PLANNED_PERCENT} % may be planned with") } else { "".into() };
    let least = gib(least);
    let advice = format!(
        "The model does not fit: {there} are there{planned}, and it needs {least} at the least; take a smaller one"
    );
    ("/model", advice)
}

/// What a run needs at the least with any settings: one sequence at a time, whatever can be computed again computed
/// again, and the frozen weights in the form that takes least.
pub(super) fn least_bytes(spec: &TrainSpec, device: Device) -> i64 {
    let choices = Choices { micro_batch_seqs: 1, merged_weights: MergedPlan::Scratch };
    smaller_forms(spec).iter().map(|spec| bytes(spec, &choices, device)).min().unwrap_or(i64::MAX)
}

/// The run with every layer computed again, and the frozen weights as they are and in fewer bits.
fn smaller_forms(spec: &TrainSpec) -> Vec<TrainSpec> {
    let forms = [FrozenWeights::Full, FrozenWeights::Int8, FrozenWeights::Nf4];
    let kept = spec.memory.frozen_weights;
    let num_forms = if spec.method.lora().is_some() { forms.len() } else { 1 };
    let of_form = |frozen_weights| {
        let memory = MemorySpec { recompute: Recompute::Layers, frozen_weights, ..spec.memory };
        TrainSpec { memory, ..spec.clone() }
    };
    forms.into_iter().skip_while(|form| *form != kept).take(num_forms).map(of_form).collect()
}

/// The settings that save most, but for those that the run had.
fn changes(spec: &TrainSpec, choices: Choices, frozen_weights: FrozenWeights) -> Vec<&'static str> {
    let had = &spec.memory;
    let is_merged = spec.method.lora().is_some();
    let settings = [
        (had.recompute != Recompute::Layers, "memory.recompute layers"),
        (is_merged && choices.merged_weights != MergedPlan::Scratch, "memory.merged_weights scratch"),
        (
            had.frozen_weights != frozen_weights,
            match frozen_weights {
                FrozenWeights::Nf4 => "memory.frozen_weights nf4",
                _ => "memory.frozen_weights int8",
            },
        ),
    ];
    settings.into_iter().filter(|(is_new, _)| *is_new).map(|(_, setting)| setting).collect()
}

fn fits(spec: &TrainSpec, choices: Choices, device: Device, memory_bytes: i64) -> bool {
    bytes(spec, &choices, device) <= memory_bytes / 100 * PLANNED_PERCENT
}

/// The largest number up to `most` that fits. What is needed grows with it.
fn largest(most: i64, fits: impl Fn(i64) -> bool) -> Option<i64> {
    let (mut fitting, mut beyond) = (0, most + 1);
    while beyond - fitting > 1 {
        let middle = fitting + (beyond - fitting) / 2;
        if fits(middle) {
            fitting = middle;
        } else {
            beyond = middle;
        }
    }
    (fitting > 0).then_some(fitting)
}
