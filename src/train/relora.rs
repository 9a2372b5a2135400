//! ReLoRA's own part: wrapping matrices with low-rank factors, merging the factors into them, drawing them again.
//!
//! W + s·B·A is what the model computes; wrapping and drawing again leave it unchanged because B is zero.

use tch::{Device, Kind, Tensor};

use super::{
    model::{self, LINEARS, linear_path},
    random::{Draws, Purpose},
    weights::{Group, LowRankWeights, Parameter, Weights},
};
use crate::domain::spec::{LowRank, ModelSpec, Precision};

/// A wrapped matrix: no gradient, changed only by merges.
pub struct Frozen {
    pub name: String,
    /// In fp32: merged in bf16, small updates would be lost.
    pub master: Tensor,
    /// What products use: the master itself, or a copy in bf16 that follows it.
    pub compute: Tensor,
}

impl Frozen {
    fn new(name: String, master: Tensor, precision: Precision) -> Self {
        let kind = match precision {
            Precision::Fp32 => Kind::Float,
            Precision::Bf16 => Kind::BFloat16,
        };
        Self { name, compute: master.to_kind(kind), master }
    }

    /// The compute copy of a changed master; a no-op where they are one tensor.
    pub fn refresh(&mut self) {
        if self.compute.kind() != self.master.kind() {
            self.compute.copy_(&self.master);
        }
    }
}

impl Weights {
    /// Weights for a full-rank phase: matrices normal around zero, norms one.
    pub fn initial(spec: &ModelSpec, seed: i64, device: Device) -> Self {
        let mut weights = Self::zeros(spec, device);
        for (index, parameter) in model::parameters(spec).iter().enumerate() {
            let len = parameter.shape.iter().product::<i64>() as usize;
            let values = match parameter.shape.len() {
                1 => vec![1.0; len],
                _ => {
                    let draws = Draws::new(seed, Purpose::Weights, [0, index as i64]);
                    draws.normal(len, spec.initializer_range as f32)
                }
            };
            let values = Tensor::from_slice(&values).view(parameter.shape.as_slice());
            weights.full_rank.set_by_name(&parameter.name, &values);
        }
        weights
    }

    /// Full-rank weights with every value zero: the shape into which a state is read.
    pub fn zeros(spec: &ModelSpec, device: Device) -> Self {
        Self { full_rank: Group::new(model::parameters(spec), device), low_rank: None }
    }

    /// Wrapped weights with every value zero: the shape into which a state is read.
    pub fn zeros_wrapped(spec: &ModelSpec, low_rank: LowRank, precision: Precision, device: Device) -> Self {
        let (linears, others): (Vec<_>, Vec<_>) = model::parameters(spec).into_iter().partition(is_linear);
        let zeros = |p: &Parameter| Tensor::zeros(p.shape.as_slice(), (Kind::Float, device));
        Self {
            full_rank: Group::new(others, device),
            low_rank: Some(LowRankWeights {
                factors: Group::new(factor_parameters(spec, low_rank.rank), device),
                frozen: linears.iter().map(|p| Frozen::new(p.name.clone(), zeros(p), precision)).collect(),
            }),
        }
    }

    /// Freezes the matrices and puts factors beside them. The function stays, every optimizer state is new.
    pub fn wrap(&mut self, spec: &ModelSpec, low_rank: LowRank, precision: Precision, seed: i64) {
        let _guard = tch::no_grad_guard();
        self.full_rank.free_training_buffers();
        let mut wrapped = Self::zeros_wrapped(spec, low_rank, precision, self.full_rank.values.device());
        for (name, value) in self.full_rank.names().zip(&self.full_rank.leaves) {
            match wrapped.low_rank.as_mut().and_then(|l| l.frozen.iter_mut().find(|frozen| frozen.name == name)) {
                Some(frozen) => {
                    frozen.master.copy_(value);
                    frozen.refresh();
                }
                None => wrapped.full_rank.set_by_name(name, value),
            }
        }
        if let Some(low_rank) = &mut wrapped.low_rank {
            low_rank.draw_factors(seed, 0);
        }
        *self = wrapped;
    }

    /// The tensor that the model computes with under this name.
    ///
    /// # Panics
    /// If there is none: the names come from the same spec as the weights.
    pub fn tensor(&self, name: &str) -> Tensor {
        let frozen = self.low_rank.iter().flat_map(|l| &l.frozen).find(|f| f.name == name).map(|f| &f.compute);
        let found = self.groups().find_map(|group| group.leaf(name)).or(frozen);
        found.unwrap_or_else(|| panic!("the model has no parameter {name}")).shallow_clone()
    }

    /// A copy, in host memory, of the model with its factors merged, by name. The weights are not touched.
    pub fn merged(&self, scale: f64) -> Vec<(String, Tensor)> {
        let _guard = tch::no_grad_guard();
        let mut merged = self.full_rank_values();
        if let Some(low_rank) = &self.low_rank {
            for (index, frozen) in low_rank.frozen.iter().enumerate() {
                merged.push((
                    frozen.name.clone(),
                    (&frozen.master + low_rank.delta(index, scale)).to_device(Device::Cpu),
                ));
            }
        }
        merged
    }

    /// A copy, in host memory, of what is trained at full rank, by name.
    pub fn full_rank_values(&self) -> Vec<(String, Tensor)> {
        let copy = copy_to_host(&self.full_rank.values);
        self.full_rank.names().map(str::to_owned).zip(self.full_rank.views(&copy)).collect()
    }
}

impl LowRankWeights {
    /// W += s·B·A, matrix by matrix. The factors are not touched: `draw_factors` or `zero_b` must follow.
    pub fn merge(&mut self, scale: f64) {
        let _guard = tch::no_grad_guard();
        for index in 0..self.frozen.len() {
            let delta = self.delta(index, scale);
            self.frozen[index].master += delta;
            self.frozen[index].refresh();
        }
    }

    /// A ~ U(±1/√in) as a function of (seed, restart, matrix), B = 0.
    pub fn draw_factors(&mut self, seed: i64, restart: i64) {
        for index in 0..self.frozen.len() {
            let shape = self.factors.leaves[2 * index].size();
            let (rank, num_columns) = (shape[0], shape[1]);
            let draws = Draws::new(seed, Purpose::Factors, [restart, index as i64]);
            let a = draws.uniform((rank * num_columns) as usize, 1.0 / (num_columns as f32).sqrt());
            self.factors.set(2 * index, &Tensor::from_slice(&a).view([rank, num_columns]));
        }
        self.zero_b();
    }

    /// Takes the factors out of the function.
    pub fn zero_b(&mut self) {
        let _guard = tch::no_grad_guard();
        for b in self.factors.leaves.iter_mut().skip(1).step_by(2) {
            let _ = b.zero_();
        }
    }

    /// A copy of the factors in host memory, by name.
    pub fn factor_values(&self) -> Vec<(String, Tensor)> {
        let copy = copy_to_host(&self.factors.values);
        self.factors.names().map(str::to_owned).zip(self.factors.views(&copy)).collect()
    }

    /// s·B·A of the matrix with this index. The factors lie in pairs, in the order of the frozen matrices.
    fn delta(&self, index: usize, scale: f64) -> Tensor {
        let (a, b) = (&self.factors.leaves[2 * index], &self.factors.leaves[2 * index + 1]);
        b.mm(a) * scale
    }
}

pub fn copy_to_host(tensor: &Tensor) -> Tensor {
    let _guard = tch::no_grad_guard();
    // A device sync where the tensor is on a GPU.
    tensor.detach().to_device_(Device::Cpu, Kind::Float, false, true)
}

fn is_linear(parameter: &Parameter) -> bool {
    LINEARS.iter().any(|linear| parameter.name.ends_with(&format!("{linear}.weight")))
}

/// A and B of every wrapped matrix, in pairs.
fn factor_parameters(spec: &ModelSpec, rank: i64) -> Vec<Parameter> {
    let mut factors = Vec::new();
    for layer in 0..spec.num_hidden_layers {
        for (linear, (rows, columns)) in spec.linear_shapes().into_iter().enumerate() {
            let path = linear_path(layer, linear);
            for (factor, shape) in [("lora_A", vec![rank, columns]), ("lora_B", vec![rows, rank])] {
                factors.push(Parameter { name: format!("{path}.{factor}.weight"), shape, decays: true });
            }
        }
    }
    factors
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::{
        domain::spec::TrainSpec,
        train::{model::Llama, test_support},
    };

    /// A wrapped model, its weights, and rows to look at it with.
    fn wrapped() -> (TrainSpec, LowRank, Weights, Tensor, Tensor) {
        tch::set_num_threads(1);
        let spec = test_support::spec(json!({}));
        let low_rank = spec.method.low_rank().expect("relora");
        let mut weights = Weights::initial(&spec.model, spec.seed, Device::Cpu);
        let rows = Tensor::arange(18, (Kind::Int64, Device::Cpu)).view([2, 9]);
        let before = Llama::new(&spec.model, &weights, None, spec.precision).forward(&rows, None).detach();
        weights.wrap(&spec.model, low_rank, spec.precision, spec.seed);
        (spec, low_rank, weights, rows, before)
    }

    fn factors(weights: &Weights) -> &[Tensor] {
        &weights.low_rank.as_ref().expect("wrapped").factors.leaves
    }

    #[test]
    fn a_wrap_leaves_logits_equal_to_the_bit_and_only_b_has_a_gradient_at_first() {
        let (spec, low_rank, weights, rows, before) = wrapped();
        let model = Llama::new(&spec.model, &weights, Some(low_rank), spec.precision);
        assert!(model.forward(&rows, None).equal(&before));

        let gradients = Tensor::run_backward(&[model.summed_loss(&rows, None)], factors(&weights), false, false);
        for pair in gradients.chunks(2) {
            assert_eq!(pair[0].abs().max().double_value(&[]), 0.0, "A");
            assert!(pair[1].abs().max().double_value(&[]) > 0.0, "B");
        }
    }

    #[test]
    fn a_merge_leaves_logits_equal_and_begins_with_new_factors() {
        let (spec, low_rank, mut weights, rows, _) = wrapped();
        for (index, b) in (0..).zip(factors(&weights).iter().skip(1).step_by(2)) {
            let value = Draws::new(5, Purpose::Weights, [0, index]).uniform(b.numel(), 0.1);
            tch::no_grad(|| b.shallow_clone().copy_(&Tensor::from_slice(&value).view(b.size().as_slice())));
        }
        let model = Llama::new(&spec.model, &weights, Some(low_rank), spec.precision);
        let before = model.forward(&rows, None);
        let old_a = factors(&weights)[0].detach().copy();
        let exported = weights.merged(low_rank.scale);
        assert!(model.forward(&rows, None).equal(&before), "the export touched the model");

        let parts = weights.low_rank.as_mut().expect("wrapped");
        parts.merge(low_rank.scale);
        parts.draw_factors(spec.seed, 1);

        let after = model.forward(&rows, None);
        let error = (&after - &before).abs().max().double_value(&[]);
        assert!(error < 1e-5 && error > 0.0, "{error}");
        assert!(!factors(&weights)[0].equal(&old_a));
        assert!(factors(&weights).iter().skip(1).step_by(2).all(|b| b.abs().max().double_value(&[]) == 0.0));
        for ((name, exported), (_, merged)) in exported.iter().zip(weights.merged(low_rank.scale)) {
            assert!(exported.equal(&merged), "{name}");
        }
    }

    #[test]
    fn the_factor_a_is_uniform_within_one_over_the_root_of_its_width() {
        let (_, _, weights, _, _) = wrapped();
        let largest = factors(&weights)[0].abs().max().double_value(&[]);
        assert!(largest <= 0.25 && largest > 0.2, "{largest}"); // width 16
    }
}
