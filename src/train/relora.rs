//! ReLoRA's own part: wrapping matrices with low-rank factors, merging the factors into them, drawing them again.
//!
//! W + s·B·A is what the model computes; wrapping and drawing again leave it unchanged because B is zero. A factorized
//! model has the factors alone.

use std::collections::BTreeMap;

use tch::{Device, Kind, Tensor};

use super::{
    host_copy::{copy_to_host, into_host},
    model::{self, linear_path},
    random::{Draws, Purpose},
    weights::{Group, LowRankWeights, Parameter, Weights, buffer_len, views},
};
use crate::domain::spec::{FactorsSpec, FrozenWeights, Linear, MethodSpec, ModelSpec, TrainSpec};

/// A matrix without a gradient: one that is wrapped, changed only by merges, or an embedding that does not train.
pub struct Frozen {
    pub name: String,
    /// In fp32: merged in bf16, small updates would be lost.
    pub master: Tensor,
}

/// Zeros of these shapes. They lie in one buffer, so that neighbours can be multiplied with as one matrix.
fn frozen_zeros(parameters: Vec<Parameter>, device: Device) -> Vec<Frozen> {
    let buffer = Tensor::zeros([buffer_len(&parameters)], (Kind::Float, device));
    let masters = views(&parameters, &buffer);
    parameters.into_iter().zip(masters).map(|(parameter, master)| Frozen { name: parameter.name, master }).collect()
}

/// A matrix with factors beside it, or in its place.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Wrapped {
    /// Of the matrix, `{path}.weight`.
    pub name: String,
    pub linear: Linear,
}

/// How a model is wrapped: what the spec says of it, together.
pub struct Wrapping<'a> {
    model: &'a ModelSpec,
    factors: &'a FactorsSpec,
    /// Whether the factors stand in the place of the matrices.
    is_factorized: bool,
    frozen_weights: FrozenWeights,
    seed: i64,
}

impl<'a> Wrapping<'a> {
    /// None with a method that has no factors.
    pub fn of(spec: &'a TrainSpec) -> Option<Self> {
        Some(Self {
            model: &spec.model,
            factors: spec.method.factors()?,
            is_factorized: matches!(spec.method, MethodSpec::Factorized(_)),
            frozen_weights: spec.memory.frozen_weights,
            seed: spec.seed,
        })
    }

    /// Every matrix that has factors, layer by layer.
    fn wrapped(&self) -> Vec<(Wrapped, (i64, i64))> {
        let of_layer = |layer| {
            let linears = Linear::ALL.into_iter().zip(self.model.linear_shapes());
            let targets = linears.filter(|(linear, _)| self.factors.target_modules.contains(linear));
            targets.map(move |(linear, shape)| {
                (Wrapped { name: format!("{}.weight", linear_path(layer, linear)), linear }, shape)
            })
        };
        (0..self.model.num_hidden_layers).flat_map(of_layer).collect()
    }

    fn freezes(&self, name: &str) -> bool {
        match name {
            model::EMBEDDING => !self.factors.train_embeddings,
            model::HEAD => !self.factors.train_head,
            _ => false,
        }
    }

    /// Weights with every value zero: the shape into which a state is read.
    pub fn zeros(&self, device: Device) -> Weights {
        let wrapped = self.wrapped();
        let matrix = |(wrapped, (rows, columns)): &(Wrapped, (i64, i64))| Parameter {
            name: wrapped.name.clone(),
            shape: vec![*rows, *columns],
            decays: false,
        };
        let matrices = if self.is_factorized { Vec::new() } else { wrapped.iter().map(matrix).collect() };
        // Of quantised matrices the device has the codes alone.
        let is_quantised = self.frozen_weights != FrozenWeights::Full;
        let mut frozen = frozen_zeros(matrices, if is_quantised { Device::Cpu } else { device });
        let mut full_rank = model::parameters(self.model);
        full_rank.retain(|parameter| !wrapped.iter().any(|(wrapped, _)| wrapped.name == parameter.name));
        let not_trained = full_rank.extract_if(.., |parameter| self.freezes(&parameter.name)).collect();
        frozen.extend(frozen_zeros(not_trained, device));
        let factors = factor_parameters(&wrapped, self.factors.rank);
        Weights {
            full_rank: Group::new(full_rank, device),
            low_rank: Some(LowRankWeights {
                factors: Group::new(factors, device),
                wrapped: wrapped.into_iter().map(|(wrapped, _)| wrapped).collect(),
                frozen,
                scale: self.factors.scale,
            }),
        }
    }

    /// Weights in which the factors stand in the place of the matrices: A as ever, and B ~ U(±1/√r) too, since a zero
    /// product would leave nothing to compute with.
    pub fn initial_factorized(&self, device: Device) -> Weights {
        let mut weights = self.zeros(device);
        weights.fill_initial(self.model, self.seed);
        if let Some(low_rank) = &mut weights.low_rank {
            low_rank.draw_factors(self.seed, 0);
            low_rank.draw_b(self.seed);
        }
        weights
    }

    /// Freezes the matrices and puts factors beside them. The function stays, every optimizer state is new.
    pub fn wrap(&self, weights: &mut Weights) {
        let _guard = tch::no_grad_guard();
        weights.full_rank.free_training_buffers();
        let mut wrapped = self.wrapped_zeros(weights.full_rank.values.device());
        for (name, value) in weights.full_rank.names().zip(&weights.full_rank.leaves) {
            wrapped.set(name, value);
        }
        *weights = wrapped;
    }

    /// Zeros with the factors of the first cycle.
    fn wrapped_zeros(&self, device: Device) -> Weights {
        let mut weights = self.zeros(device);
        if let Some(low_rank) = &mut weights.low_rank {
            low_rank.draw_factors(self.seed, 0);
        }
        weights
    }
}

impl Weights {
    /// The weights that a run begins with.
    pub fn initial(spec: &TrainSpec, device: Device) -> Self {
        match Wrapping::of(spec) {
            Some(wrapping) if wrapping.is_factorized => wrapping.initial_factorized(device),
            _ => {
                let mut weights = Self::of_first_phase(spec, device);
                weights.fill_initial(&spec.model, spec.seed);
                weights
            }
        }
    }

    /// Zeros, and factors where there is no warm start: the memory that full-rank training takes may not be there.
    pub fn of_first_phase(spec: &TrainSpec, device: Device) -> Self {
        match Wrapping::of(spec).filter(|_| spec.method.lora().is_some_and(|lora| lora.warm_start_steps == 0)) {
            Some(wrapping) => wrapping.wrapped_zeros(device),
            None => Self::zeros(&spec.model, device),
        }
    }

    /// Full-rank weights with every value zero: the shape into which a state or a checkpoint is read.
    pub fn zeros(spec: &ModelSpec, device: Device) -> Self {
        Self { full_rank: Group::new(model::parameters(spec), device), low_rank: None }
    }

    /// Matrices normal around zero, norms one. What has factors in its place is passed over.
    fn fill_initial(&mut self, spec: &ModelSpec, seed: i64) {
        for (index, parameter) in model::parameters(spec).iter().enumerate() {
            let len = parameter.shape.iter().product::<i64>() as usize;
            let values = match parameter.shape.len() {
                1 => vec![1.0; len],
                _ => {
                    let draws = Draws::new(seed, Purpose::Weights, [0, index as i64]);
                    draws.normal(len, spec.initializer_range as f32)
                }
            };
            self.set(&parameter.name, &Tensor::from_slice(&values).view(parameter.shape.as_slice()));
        }
    }

    /// Sets the trained or frozen tensor of this name, if there is one.
    pub fn set(&mut self, name: &str, value: &Tensor) {
        let _guard = tch::no_grad_guard();
        let frozen = self.low_rank.iter_mut().flat_map(|low_rank| &mut low_rank.frozen);
        match frozen.into_iter().find(|frozen| frozen.name == name) {
            Some(frozen) => frozen.master.copy_(value),
            None => self.full_rank.set_by_name(name, value),
        }
    }

    /// The tensor of this name, trained or not.
    pub fn find(&self, name: &str) -> Option<Tensor> {
        self.place(name).map(|place| place.value).or_else(|| self.master(name))
    }

    /// The same in fp64: what the gradients of hand-written code are checked in.
    #[cfg(test)]
    pub fn in_double(&self) -> Self {
        let low_rank = self.low_rank.as_ref().map(|low_rank| LowRankWeights {
            factors: low_rank.factors.in_double(),
            wrapped: low_rank.wrapped.clone(),
            frozen: low_rank
                .frozen
                .iter()
                .map(|f| Frozen { name: f.name.clone(), master: f.master.to_kind(Kind::Double) })
                .collect(),
            scale: low_rank.scale,
        });
        Self { full_rank: self.full_rank.in_double(), low_rank }
    }

    /// A copy, in host memory, of the model with its factors merged, by name. The weights are not touched.
    pub fn merged(&self) -> Vec<(String, Tensor)> {
        let _guard = tch::no_grad_guard();
        let mut merged = self.full_rank_values();
        let Some(low_rank) = &self.low_rank else { return merged };
        let mut frozen: BTreeMap<_, _> = low_rank.frozen.iter().map(|f| (f.name.as_str(), &f.master)).collect();
        for (index, wrapped) in low_rank.wrapped.iter().enumerate() {
            let delta = low_rank.delta(index);
            let value = match frozen.remove(wrapped.name.as_str()) {
                Some(master) => master + delta.to_device(master.device()),
                None => delta,
            };
            merged.push((wrapped.name.clone(), into_host(value)));
        }
        merged.extend(frozen.into_iter().map(|(name, master)| (name.to_owned(), copy_to_host(master))));
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
    ///
    /// Returns the norm of what was added, over all matrices of a kind.
    pub fn merge(&mut self) -> BTreeMap<Linear, f64> {
        let _guard = tch::no_grad_guard();
        let mut squares: BTreeMap<Linear, Tensor> = BTreeMap::new();
        for (index, wrapped) in self.wrapped.iter().enumerate() {
            let delta = self.delta(index);
            let square = delta.square().sum(Kind::Double);
            squares.entry(wrapped.linear).and_modify(|sum| *sum += &square).or_insert(square);
            let master = &mut self.frozen[index].master;
            *master += delta.to_device(master.device());
        }
        squares.into_iter().map(|(linear, sum)| (linear, sum.double_value(&[]).sqrt())).collect() // device sync
    }

    /// A ~ U(±1/√in) as a function of (seed, restart, matrix), B = 0.
    pub fn draw_factors(&mut self, seed: i64, restart: i64) {
        for index in 0..self.wrapped.len() {
            let num_columns = self.factors.leaves[2 * index].size()[1];
            self.draw(2 * index, num_columns, Draws::new(seed, Purpose::Factors, [restart, index as i64]));
        }
        self.zero_b();
    }

    /// B ~ U(±1/√r), for factors that have no matrix beside them.
    fn draw_b(&mut self, seed: i64) {
        for index in 0..self.wrapped.len() {
            let rank = self.factors.leaves[2 * index + 1].size()[1];
            let of_b = (self.wrapped.len() + index) as i64;
            self.draw(2 * index + 1, rank, Draws::new(seed, Purpose::Factors, [0, of_b]));
        }
    }

    /// Uniform within one over the root of the number of inputs, as Kaiming's rule with a = √5 has it.
    fn draw(&mut self, factor: usize, num_inputs: i64, draws: Draws) {
        let shape = self.factors.leaves[factor].size();
        let values = draws.uniform(shape.iter().product::<i64>() as usize, 1.0 / (num_inputs as f32).sqrt());
        self.factors.set(factor, &Tensor::from_slice(&values).view(shape.as_slice()));
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

    /// s·B·A of the matrix with this index. The factors lie in pairs, in the order of the wrapped matrices.
    fn delta(&self, index: usize) -> Tensor {
        let (a, b) = (&self.factors.leaves[2 * index], &self.factors.leaves[2 * index + 1]);
        scaled_product(a, b, self.scale)
    }
}

/// s·B·A, which a restart adds to a matrix.
pub fn scaled_product(a: &Tensor, b: &Tensor, scale: f64) -> Tensor {
    b.mm(a) * scale
}

/// A and B of every wrapped matrix, in pairs.
fn factor_parameters(wrapped: &[(Wrapped, (i64, i64))], rank: i64) -> Vec<Parameter> {
    let factor = |wrapped: &Wrapped, name: &str, shape: [i64; 2]| Parameter {
        name: factor_name(&wrapped.name, name),
        shape: shape.to_vec(),
        decays: true,
    };
    let pair = |(wrapped, (rows, columns)): &(Wrapped, (i64, i64))| {
        [factor(wrapped, "lora_A", [rank, *columns]), factor(wrapped, "lora_B", [*rows, rank])]
    };
    wrapped.iter().flat_map(pair).collect()
}

/// `{path}.lora_A.weight` of the matrix `{path}.weight`.
pub fn factor_name(matrix: &str, factor: &str) -> String {
    let path = matrix.strip_suffix(".weight").unwrap_or(matrix);
    format!("{path}.{factor}.weight")
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::train::{
        engine::{DropoutPlace, Engine},
        ops::OpsChoice,
        test_support::{self, method},
    };

    const PLACE: DropoutPlace = DropoutPlace { seed: 0, first_seq: 0 };

    fn logits(spec: &TrainSpec, weights: &Weights, rows: &Tensor) -> Tensor {
        Engine::of(spec, weights, OpsChoice::Proven).logits(rows)
    }

    /// A wrapped model, its weights, rows to look at it with, and its logits before it was wrapped.
    fn wrapped(patch: serde_json::Value) -> (TrainSpec, Weights, Tensor, Tensor) {
        tch::set_num_threads(1);
        let spec = test_support::spec(patch);
        let mut weights = Weights::initial(&spec, Device::Cpu);
        let rows = Tensor::arange(18, (Kind::Int64, Device::Cpu)).view([2, 9]);
        let before = logits(&spec, &weights, &rows);
        Wrapping::of(&spec).expect("relora").wrap(&mut weights);
        (spec, weights, rows, before)
    }

    fn factors(weights: &Weights) -> &[Tensor] {
        &weights.low_rank.as_ref().expect("wrapped").factors.leaves
    }

    fn draw_every_b(weights: &Weights) {
        for (index, b) in (0..).zip(factors(weights).iter().skip(1).step_by(2)) {
            let value = Draws::new(5, Purpose::Weights, [0, index]).uniform(b.numel(), 0.1);
            b.shallow_clone().copy_(&Tensor::from_slice(&value).view(b.size().as_slice()));
        }
    }

    #[test]
    fn a_wrap_leaves_logits_equal_to_the_bit_and_only_b_has_a_gradient_at_first() {
        for patch in [
            json!({}),
            json!({"precision": "bf16"}),
            json!({"method": method(json!({"target_modules": ["k_proj", "up_proj"], "train_embeddings": false}))}),
            json!({"method": method(json!({"train_head": false, "train_embeddings": false})), "precision": "bf16"}),
        ] {
            let (spec, weights, rows, before) = wrapped(patch);
            let mut engine = Engine::of(&spec, &weights, OpsChoice::Proven);
            assert!(engine.logits(&rows).equal(&before));

            let _ = engine.forward_backward(&rows, 1.0, PLACE);
            let factors = &weights.low_rank.as_ref().expect("wrapped").factors;
            for pair in factors.views(&factors.gradients).chunks(2) {
                assert_eq!(pair[0].abs().max().double_value(&[]), 0.0, "A");
                assert!(pair[1].abs().max().double_value(&[]) > 0.0, "B");
            }
        }
    }

    #[test]
    fn what_trains_beside_the_factors_is_what_the_spec_says() {
        let trained = |change| {
            let (_, weights, _, _) = wrapped(json!({"method": method(change)}));
            let all: Vec<_> = weights.full_rank.names().map(str::to_owned).collect();
            all.into_iter().filter(|name| !name.contains("norm")).collect::<Vec<_>>()
        };
        assert_eq!(trained(json!({})), ["lm_head.weight", "model.embed_tokens.weight"]);
        assert_eq!(trained(json!({"train_head": false})), ["model.embed_tokens.weight"]);
        assert_eq!(trained(json!({"train_embeddings": false})), ["lm_head.weight"]);
        let without_query = json!({
            "target_modules": ["k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
            "train_embeddings": false, "train_head": false,
        });
        let queries = [0, 1].map(|layer| format!("model.layers.{layer}.self_attn.q_proj.weight"));
        assert_eq!(trained(without_query), queries);
    }

    #[test]
    fn a_merge_leaves_logits_equal_and_begins_with_new_factors() {
        for case in 0..8 {
            let [rank, heads, width, layers] = Draws::new(case, Purpose::Weights, [0, 0]).block(0).map(i64::from);
            let model = json!({
                "hidden_size": 4 * (heads % 3 + 1) * (width % 5 + 1), "num_attention_heads": 2, "num_key_value_heads": 1,
                "intermediate_size": width % 37 + 5, "num_hidden_layers": layers % 3 + 1,
                "tie_word_embeddings": case % 2 == 0,
            });
            let change = json!({"rank": rank % 5 + 1, "scale": 1.0 + (rank % 7) as f64 / 4.0});
            let (spec, mut weights, rows, _) = wrapped(json!({"model": model, "method": method(change)}));
            draw_every_b(&weights);
            let mut engine = Engine::of(&spec, &weights, OpsChoice::Proven);
            let before = engine.logits(&rows);
            let old_a = factors(&weights)[0].copy();
            let exported = weights.merged();
            assert!(engine.logits(&rows).equal(&before), "the export touched the model");

            let parts = weights.low_rank.as_mut().expect("wrapped");
            let first = parts.frozen[0].master.copy();
            let norms = parts.merge();
            parts.draw_factors(spec.seed, 1);

            assert_eq!(norms.len(), 7);
            let of_first = (&parts.frozen[0].master - first).norm().double_value(&[]);
            assert!(norms[&Linear::Query] >= of_first * 0.999 && of_first > 0.0, "{norms:?}, {of_first}");
            engine.frozen_changed();
            let after = engine.logits(&rows);
            let error = (&after - &before).abs().max().double_value(&[]);
            assert!(error < 1e-5 * before.abs().max().double_value(&[]).max(1.0), "{error}");
            assert!(!factors(&weights)[0].equal(&old_a));
            assert!(factors(&weights).iter().skip(1).step_by(2).all(|b| b.abs().max().double_value(&[]) == 0.0));
            for ((name, exported), (_, merged)) in exported.iter().zip(weights.merged()) {
                assert!(exported.equal(&merged), "{name}");
            }
        }
    }

    #[test]
    fn a_factorized_model_computes_with_its_product_and_exports_it() {
        let method = json!({
            "type": "factorized", "rank": 3, "scale": 2.0, "dropout": 0.0, "target_modules": ["q_proj", "down_proj"],
            "train_embeddings": true, "train_head": true,
        });
        let spec = test_support::spec(json!({"method": method}));
        let weights = Weights::initial(&spec, Device::Cpu);
        let rows = Tensor::arange(18, (Kind::Int64, Device::Cpu)).view([2, 9]);
        let factorized = logits(&spec, &weights, &rows);

        let mut full = Weights::zeros(&spec.model, Device::Cpu);
        for (name, value) in weights.merged() {
            full.set(&name, &value);
        }
        let error = (logits(&spec, &full, &rows) - &factorized).abs().max().double_value(&[]);
        assert!(error < 1e-5 && factorized.abs().max().double_value(&[]) > 0.1, "{error}");
        let query = full.find("model.layers.0.self_attn.q_proj.weight").expect("a matrix");
        assert_eq!(query.linalg_matrix_rank(1e-5, false).int64_value(&[]), 3);
    }

    #[test]
    fn the_factor_a_is_uniform_within_one_over_the_root_of_its_width() {
        let (_, weights, _, _) = wrapped(json!({}));
        let largest = factors(&weights)[0].abs().max().double_value(&[]);
        assert!(largest <= 0.25 && largest > 0.2, "{largest}"); // width 16
    }
}
