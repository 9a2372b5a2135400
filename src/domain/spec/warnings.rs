//! What a valid spec asks for that cannot gain, or is a likely mistake.

use super::{ReloraSpec, RestartSchedule, TrainSpec};

impl TrainSpec {
    pub fn warnings(&self) -> Vec<String> {
        let mut warnings = Vec::new();
        if let Some(factors) = self.method.factors() {
            warnings.extend(rank_warnings(factors.rank, factors.target_shapes(&self.model).collect()));
        }
        warnings.extend(self.method.relora().and_then(cycle_warning));
        warnings.extend(keep_best_warning(self));
        warnings
    }
}

fn rank_warnings(rank: i64, shapes: Vec<(i64, i64)>) -> Vec<String> {
    let mut warnings = Vec::new();
    // Freezing saves 2·in·out FLOPs per token, the factors add 6·r·(in+out).
    let no_gain = shapes.iter().filter(|&&(o, i)| 3 * rank * (o + i) > o * i).count();
    if no_gain > 0 {
        warnings.push(format!(
            "/method/rank: at rank {rank} the LoRA factors cost more arithmetic than freezing saves, in {no_gain} of \
             the {} matrices of a layer; expect no gain in speed at this model size",
            shapes.len()
        ));
    }
    let (in_factors, in_matrices) =
        shapes.iter().fold((0, 0), |(factors, matrices), (o, i)| (factors + rank * (o + i), matrices + o * i));
    if in_factors >= in_matrices {
        warnings.push(format!(
            "/method/rank: at rank {rank} the LoRA factors have as many parameters as the matrices they update; \
             expect no gain in memory at this model size"
        ));
    }
    warnings
}

fn cycle_warning(relora: &ReloraSpec) -> Option<String> {
    let (cycle, warmup) = (relora.reset_every_steps, relora.restart_warmup_steps);
    let is_short = relora.restart_schedule == RestartSchedule::Jagged && cycle < 10 * warmup;
    is_short.then(|| {
        format!(
            "/method/restart_warmup_steps: a cycle of {cycle} steps spends more than a tenth of its steps in the \
             learning-rate warm-up of {warmup} steps"
        )
    })
}

fn keep_best_warning(spec: &TrainSpec) -> Option<String> {
    let (stored, evaluated) = (spec.checkpoints.every_steps, spec.eval.every_steps);
    (spec.checkpoints.keep_best.is_some() && stored % evaluated != 0).then(|| {
        format!(
            "/checkpoints/keep_best: with a checkpoint every {stored} steps and an evaluation every {evaluated}, some \
             checkpoints have no evaluation at their step; those are never among the best"
        )
    })
}
