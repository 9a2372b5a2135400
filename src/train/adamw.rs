//! AdamW over a group's flat buffers, equal to `torch.optim.AdamW`. Padding stays zero: its gradients are.

use super::weights::Group;
use crate::domain::spec::OptimizerSpec;

impl Group {
    /// One update in place. Gradients are kept.
    pub fn adamw_update(&mut self, spec: &OptimizerSpec, learning_rate: f64) {
        let _guard = tch::no_grad_guard();
        let [beta1, beta2] = spec.betas;
        self.num_updates += 1;
        let exponent = self.num_updates as f64;
        let (correction1, correction2) = (1.0 - beta1.powf(exponent), 1.0 - beta2.powf(exponent));

        if spec.weight_decay != 0.0 {
            let mut decayed = self.values.narrow(0, 0, self.decayed_len);
            decayed *= 1.0 - learning_rate * spec.weight_decay;
        }
        let _ = self.exp_avg.lerp_(&self.gradients, 1.0 - beta1);
        self.exp_avg_sq *= beta2;
        self.exp_avg_sq += self.gradients.square() * (1.0 - beta2);

        let mut denominator = self.exp_avg_sq.sqrt();
        denominator /= correction2.sqrt();
        denominator += spec.eps;
        let mut change = &self.exp_avg / denominator;
        change *= learning_rate / correction1;
        self.values -= change;
    }
}

#[cfg(test)]
mod tests {
    use tch::{Device, Tensor};

    use super::*;
    use crate::train::weights::Parameter;

    fn group() -> Group {
        let parameter = |name: &str, decays| Parameter { name: name.into(), shape: vec![3], decays };
        let mut group = Group::new(vec![parameter("norm", false), parameter("matrix", true)], Device::Cpu);
        group.set(0, &Tensor::from_slice(&[0.5f32, -0.25, 1.0])); // what decays comes first: the matrix
        group.set(1, &Tensor::from_slice(&[1.0f32, 2.0, 3.0]));
        group
    }

    fn values(group: &Group, index: usize) -> Vec<f32> {
        Vec::try_from(group.leaves[index].detach()).expect("a vector")
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
        let mut group = group();
        assert_eq!(group.names().collect::<Vec<_>>(), ["matrix", "norm"]);
        let gradients = [Tensor::from_slice(&[0.1f32, -0.2, 0.3]), Tensor::from_slice(&[1.0f32, 0.0, -1e-4])];
        for step in 1..=3 {
            let _ = group.gradients.zero_();
            group.add_gradients(&gradients.each_ref().map(|gradient| gradient * f64::from(step)));
            group.adamw_update(&spec, 0.01);
        }
        let want = [[0.469_506, -0.220_255, 0.968_008], [0.970_975, 2.0, 3.029_023]];
        for (index, want) in want.into_iter().enumerate() {
            for (got, want) in values(&group, index).into_iter().zip(want) {
                assert!((got - want).abs() < 2e-6, "parameter {index}: got {got}, want {want}");
            }
        }
    }
}
