//! What a reset does to the Adam state of the factors: clear it, or a share of it.
//!
//! Tensors are edited in place. What is trained beside the factors keeps its state.

use tch::{Device, Kind, Tensor};

use super::{
    random::{Draws, Purpose},
    weights::Group,
};
use crate::domain::spec::OptimizerReset;

/// The two moments, as draws count them.
const EXP_AVG: i64 = 0;
const EXP_AVG_SQ: i64 = 1;

impl Group {
    /// Resets the optimizer state of these parameters. `number` counts the resets of the run, from 1.
    ///
    /// Returns the share of the moments' entries that are zero afterwards.
    pub fn reset_optimizer(&mut self, reset: OptimizerReset, seed: i64, number: i64) -> f64 {
        let _guard = tch::no_grad_guard();
        if let OptimizerReset::Zero { .. } = reset {
            let _ = (self.exp_avg.zero_(), self.exp_avg_sq.zero_());
        }
        let moments = self.views(&self.exp_avg).into_iter().zip(self.views(&self.exp_avg_sq));
        let mut num_zeros = Tensor::zeros([], (Kind::Int64, self.values.device()));
        let mut num_entries = 0;
        for (index, (mut exp_avg, mut exp_avg_sq)) in moments.enumerate() {
            let random = |moment, like: &Tensor, frac| {
                kept_at_random(
                    like,
                    frac,
                    Draws::new(seed, Purpose::OptimizerReset, [number, 2 * index as i64 + moment]),
                )
            };
            match reset {
                OptimizerReset::Zero { .. } | OptimizerReset::None {} => {}
                OptimizerReset::Magnitude { frac, joint_mask, .. } => {
                    let kept = kept_by_magnitude(&exp_avg, frac);
                    exp_avg_sq *= if joint_mask { kept.shallow_clone() } else { kept_by_magnitude(&exp_avg_sq, frac) };
                    exp_avg *= kept;
                }
                OptimizerReset::Random { frac, joint_mask, .. } => {
                    let kept = random(EXP_AVG, &exp_avg, frac);
                    exp_avg_sq *= if joint_mask { kept.shallow_clone() } else { random(EXP_AVG_SQ, &exp_avg_sq, frac) };
                    exp_avg *= kept;
                }
            }
            num_zeros += exp_avg.eq(0.0).sum(Kind::Int64) + exp_avg_sq.eq(0.0).sum(Kind::Int64);
            num_entries += 2 * exp_avg.numel();
        }
        if reset.resets_step_count() {
            self.num_updates = 0;
        }
        num_zeros.int64_value(&[]) as f64 / num_entries.max(1) as f64 // device sync
    }
}

/// Zero for the round(frac·n) entries of the smallest magnitude, and for those that tie with them; else one.
///
/// By the k-th smallest entry and not by `torch.quantile`, which refuses more than 2^24 elements.
fn kept_by_magnitude(moment: &Tensor, frac: f64) -> Tensor {
    let magnitudes = moment.abs();
    let num_cleared = (frac * magnitudes.numel() as f64).round() as i64;
    if num_cleared == 0 {
        return magnitudes.ones_like();
    }
    // On the host: on CUDA there is no deterministic algorithm for it.
    let (threshold, _) = magnitudes.view([-1]).to_device(Device::Cpu).kthvalue(num_cleared, 0, false);
    let threshold = threshold.to_device(magnitudes.device());
    magnitudes.gt_tensor(&threshold).to_kind(Kind::Float)
}

/// Zero with probability `frac`, else one. Drawn in fp32, whatever the model's kind: in bf16 0.999 is 1.
fn kept_at_random(moment: &Tensor, frac: f64, draws: Draws) -> Tensor {
    // 2u - 1 is exact, so the comparison is one of u.
    let drawn = Tensor::from_slice(&draws.uniform(moment.numel(), 1.0)).to_device(moment.device());
    let uniform: Tensor = (drawn.to_kind(Kind::Double) + 1.0) / 2.0;
    uniform.ge(frac).to_kind(Kind::Float).view_as(moment)
}

#[cfg(test)]
mod tests {

    use super::*;
    use crate::train::weights::Parameter;

    /// A group of parameters of random shapes whose moments have no zero.
    fn group(case: i64) -> Group {
        let [a, b, c, d] = Draws::new(case, Purpose::Weights, [0, 0]).block(0).map(|word| i64::from(word % 60 + 20));
        let parameter = |name: &str, shape| Parameter { name: name.into(), shape, decays: true };
        let mut group = Group::new(vec![parameter("a", vec![a, b]), parameter("b", vec![c, d])], Device::Cpu);
        for buffer in [&mut group.exp_avg, &mut group.exp_avg_sq] {
            let values = Draws::new(case, Purpose::Weights, [1, 0]).normal(buffer.numel(), 1.0);
            buffer.copy_(&Tensor::from_slice(&values));
        }
        let _ = group.exp_avg_sq.square_();
        group.num_updates = 7;
        group
    }

    fn num_zeros(group: &Group, buffer: &Tensor) -> i64 {
        group.views(buffer).iter().map(|view| view.eq(0.0).sum(Kind::Int64).int64_value(&[])).sum()
    }

    #[test]
    fn the_share_that_was_asked_for_is_cleared_and_reported() {
        for case in 0..12 {
            let frac = [0.0, 0.25, 0.9, 0.99][case as usize % 4];
            let (reset_step_count, joint_mask) = (case % 3 == 0, case % 2 == 0);
            for reset in [
                OptimizerReset::Magnitude { frac, reset_step_count, joint_mask },
                OptimizerReset::Random { frac, reset_step_count, joint_mask },
            ] {
                let mut group = group(case);
                let cleared = group.reset_optimizer(reset, 3, 1);
                let num_entries: usize = group.leaves.iter().map(Tensor::numel).sum();
                let tolerance = match reset {
                    OptimizerReset::Random { .. } => 4.0 * (0.25 / num_entries as f64).sqrt(),
                    _ => 1.0 / num_entries as f64,
                };
                assert!((cleared - frac).abs() <= tolerance, "{reset:?}: cleared {cleared} of {num_entries}");
                let zeros = num_zeros(&group, &group.exp_avg) + num_zeros(&group, &group.exp_avg_sq);
                assert_eq!(cleared, zeros as f64 / (2 * num_entries) as f64);
                assert_eq!(group.num_updates, if reset_step_count { 0 } else { 7 });
                let masks_are_equal = group.exp_avg.eq(0.0).equal(&group.exp_avg_sq.eq(0.0));
                // The square of a moment is as large as the moment: by magnitude both masks are the same here.
                let is_joint = joint_mask || matches!(reset, OptimizerReset::Magnitude { .. }) || frac == 0.0;
                assert_eq!(masks_are_equal, is_joint, "{reset:?}");
            }
        }
    }

    #[test]
    fn by_magnitude_the_largest_stay() {
        let moment = Tensor::from_slice(&[0.5f32, -3.0, 0.1, 2.0, -0.2]);
        let kept = Vec::<f32>::try_from(kept_by_magnitude(&moment, 0.6)).expect("a vector");
        assert_eq!(kept, [0.0, 1.0, 0.0, 1.0, 0.0]);
    }

    #[test]
    fn zero_clears_everything_and_none_nothing() {
        let mut group = group(1);
        assert_eq!(group.reset_optimizer(OptimizerReset::None {}, 0, 1), 0.0);
        assert_eq!(group.num_updates, 7);
        assert_eq!(group.reset_optimizer(OptimizerReset::Zero { reset_step_count: false }, 0, 1), 1.0);
        assert_eq!(group.num_updates, 7);
        group.reset_optimizer(OptimizerReset::Zero { reset_step_count: true }, 0, 2);
        assert_eq!(group.num_updates, 0);
    }
}
