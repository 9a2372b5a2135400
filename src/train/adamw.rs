//! AdamW over a group's flat buffers, equal to `torch.optim.AdamW`. Padding stays zero: its gradients are.

use super::{native::kernels::AdamwSettings, ops::Ops, weights::Group};
use crate::domain::spec::OptimizerSpec;

impl Group {
    /// One update in place. Gradients are scaled as they are read, and kept.
    pub fn adamw_update(&mut self, ops: &Ops, spec: &OptimizerSpec, learning_rate: f64, gradient_scale: f64) {
        let _guard = tch::no_grad_guard();
        let [beta1, beta2] = spec.betas;
        self.num_updates += 1;
        let exponent = self.num_updates as f64;
        let settings = AdamwSettings {
            learning_rate,
            beta1,
            beta2,
            eps: spec.eps,
            weight_decay: spec.weight_decay,
            correction1: 1.0 - beta1.powf(exponent),
            correction2: 1.0 - beta2.powf(exponent),
            gradient_scale,
        };
        let buffers = [&self.values, &self.gradients, &self.exp_avg, &self.exp_avg_sq];
        ops.adamw(buffers, self.decayed_len, &settings);
    }
}

#[cfg(test)]
mod tests {
    use tch::{Device, Kind, Tensor};

    use super::*;
    use crate::train::{ops::OpsChoice, weights::Parameter};

    fn group() -> Group {
        let parameter = |name: &str, decays| Parameter { name: name.into(), shape: vec![3], decays };
        let mut group = Group::new(vec![parameter("norm", false), parameter("matrix", true)], Device::Cpu);
        group.set(0, &Tensor::from_slice(&[0.5f32, -0.25, 1.0])); // what decays comes first: the matrix
        group.set(1, &Tensor::from_slice(&[1.0f32, 2.0, 3.0]));
        group
    }

    fn values(group: &Group, index: usize) -> Vec<f32> {
        Vec::try_from(&group.leaves[index]).expect("a vector")
    }

    #[test]
    fn three_updates_equal_those_of_torch() {
        // torch 2.11: AdamW([{matrix, weight_decay .1}, {norm, 0}], lr=.01, betas=(.9, .95), eps=1e-8), the gradients
        // below, scaled by 1, 2, 3.
        let spec = OptimizerSpec {
            learning_rate: 0.01,
            warm_start_learning_rate: 0.01,
            betas: [0.9, 0.95],
            eps: 1e-8,
            weight_decay: 0.1,
            clip_norm: 0.0,
        };
        for choice in [OpsChoice::Proven, OpsChoice::GpuKernels, OpsChoice::Libtorch] {
            let ops = Ops::new(choice, Kind::Float, Device::Cpu);
            let mut group = group();
            assert_eq!(group.names().collect::<Vec<_>>(), ["matrix", "norm"]);
            group.place("matrix").unwrap().gradient.copy_(&Tensor::from_slice(&[0.1f32, -0.2, 0.3]));
            group.place("norm").unwrap().gradient.copy_(&Tensor::from_slice(&[1.0f32, 0.0, -1e-4]));
            for step in 1..=3 {
                group.adamw_update(&ops, &spec, 0.01, f64::from(step));
            }
            let want = [[0.469_506, -0.220_255, 0.968_008], [0.970_975, 2.0, 3.029_023]];
            for (index, want) in want.into_iter().enumerate() {
                for (got, want) in values(&group, index).into_iter().zip(want) {
                    assert!((got - want).abs() < 2e-6, "parameter {index}: got {got}, want {want}");
                }
            }
        }
    }
}
