//! The engine against the model in plain autograd, and against itself under every setting that must not matter.

use std::collections::HashMap;

use serde_json::{Value, json};
use tch::{Device, Kind, Tensor};

use super::{DropoutPlace, Engine, LOSS_CHUNK_TOKENS, OpsChoice, Settings};
use crate::{
    domain::spec::{FrozenWeights, MergedPlan, Recompute, TrainSpec},
    train::{
        native::kernels::Kernels,
        oracle::Oracle,
        random::{Draws, Purpose},
        relora::Wrapping,
        test_support::{VOCAB_SIZE, method, relative_error, spec},
        weights::Weights,
    },
};

/// Of gradients beside the loss.
const SCALE: f64 = 0.125;
const PLACE: DropoutPlace = DropoutPlace { seed: 3, first_seq: 70 };

/// Every way in which a model can be made of matrices and factors.
fn models() -> Vec<Value> {
    let relora = |change: Value| json!({"method": method(change)});
    let factorized = |targets: Value, dropout: f64| {
        json!({"method": {
            "type": "factorized", "rank": 3, "scale": 2.0, "dropout": dropout, "target_modules": targets,
            "train_embeddings": true, "train_head": true,
        }})
    };
    let all = json!(["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]);
    let grouped = json!({"num_key_value_heads": 2, "tie_word_embeddings": true});
    vec![
        json!({"method": {"type": "full"}}),
        json!({"method": {"type": "full"}, "model": grouped}),
        relora(json!({})),
        json!({"method": method(json!({})), "model": grouped}),
        relora(json!({"target_modules": ["q_proj", "v_proj", "up_proj"], "train_embeddings": false})),
        relora(json!({"target_modules": ["down_proj", "o_proj"], "train_head": false})),
        relora(json!({"dropout": 0.3})),
        relora(json!({"dropout": 0.3, "target_modules": ["k_proj", "gate_proj", "down_proj"]})),
        factorized(all.clone(), 0.0),
        factorized(all, 0.2),
        factorized(json!(["q_proj", "down_proj"]), 0.0),
        factorized(json!(["v_proj", "up_proj"]), 0.2),
    ]
}

fn settings(spec: &TrainSpec, product_kind: Kind) -> Settings {
    Settings { product_kind, ..Settings::of(spec) }
}

/// Settings that may change how a result comes about and nothing else.
fn every_setting(base: Settings) -> Vec<Settings> {
    let mut all = Vec::new();
    for recompute in [Recompute::None, Recompute::Cheap, Recompute::Layers] {
        for plan in [MergedPlan::Resident, MergedPlan::Scratch] {
            all.push(Settings { recompute, plan, ..base });
        }
        all.push(Settings { recompute, padding: 7, ..base });
    }
    all.push(Settings { padding: 1, plan: MergedPlan::Scratch, ..base });
    all
}

/// Operations that must give the same. libtorch draws masks of its own.
fn comparable_ops(dropout: f64) -> Vec<OpsChoice> {
    let mut all = vec![OpsChoice::Proven, OpsChoice::GpuKernels];
    all.extend((dropout == 0.0).then_some(OpsChoice::Libtorch));
    all
}

/// Weights as they are in the middle of a low-rank phase, or of a full-rank run: no factor is zero.
fn weights(spec: &TrainSpec) -> Weights {
    tch::set_num_threads(1);
    let mut weights = Weights::initial(spec, Device::Cpu);
    if let (Some(wrapping), None) = (Wrapping::of(spec), &weights.low_rank) {
        wrapping.wrap(&mut weights);
    }
    for (number, group) in (0..).zip(weights.groups()) {
        let noise = Draws::new(5, Purpose::Weights, [1, number]).normal(group.values.numel(), 0.05);
        let mut values = group.values.shallow_clone();
        values += Tensor::from_slice(&noise);
    }
    weights
}

fn rows() -> Tensor {
    some_rows(4)
}

fn some_rows(num_seqs: i64) -> Tensor {
    let words = (0..num_seqs * 9).map(|n| i64::from(Draws::new(8, Purpose::Weights, [2, n]).block(0)[0]) % VOCAB_SIZE);
    Tensor::from_slice(&words.collect::<Vec<_>>()).view([num_seqs, 9])
}

/// The loss, and every gradient by name.
fn gradients(spec: &TrainSpec, weights: &Weights, settings: Settings) -> (f64, Vec<(String, Tensor)>) {
    gradients_of(&rows(), spec, weights, settings)
}

fn gradients_of(
    rows: &Tensor,
    spec: &TrainSpec,
    weights: &Weights,
    settings: Settings,
) -> (f64, Vec<(String, Tensor)>) {
    weights.groups().for_each(|group| drop(group.gradients.shallow_clone().zero_()));
    let mut engine = Engine::new(&spec.model, weights, settings);
    let loss = engine.forward_backward(rows, SCALE, PLACE).double_value(&[]);
    let named = weights.groups().flat_map(|group| group.names().map(str::to_owned).zip(group.views(&group.gradients)));
    (loss, named.map(|(name, gradient)| (name, gradient.copy())).collect())
}

/// The largest difference of any gradient, relative to the largest element of its tensor.
fn largest_error(got: &[(String, Tensor)], want: &std::collections::BTreeMap<String, Tensor>) -> (f64, String) {
    assert_eq!(got.len(), want.len());
    let error = |(name, gradient): &(String, Tensor)| {
        let want = &want[name];
        assert!(want.abs().max().double_value(&[]) > 0.0, "{name} has no gradient to compare with");
        (relative_error(gradient, want), name.clone())
    };
    got.iter().map(error).max_by(|a, b| a.0.total_cmp(&b.0)).expect("a gradient")
}

fn assert_equals_oracle(rows: &Tensor, spec: &TrainSpec, weights: &Weights, settings: Settings, tolerance: f64) {
    let oracle = Oracle::new(&spec.model, weights, settings.product_kind, settings.dropout);
    let (want_loss, want) = oracle.loss_and_gradients(rows, SCALE, PLACE);
    let (loss, got) = gradients_of(rows, spec, weights, settings);
    let (error, name) = largest_error(&got, &want);
    let what = format!("{:?}, {settings:?}", spec.method);
    assert!(error < tolerance, "{name} is off by {error:e}: {what}");
    assert!((loss / want_loss - 1.0).abs() < tolerance, "{loss}, not {want_loss}: {what}");
}

#[test]
fn every_gradient_equals_that_of_autograd_in_fp64() {
    for patch in models() {
        let spec = spec(patch);
        let weights = weights(&spec).in_double();
        for settings in every_setting(settings(&spec, Kind::Double)) {
            for ops in comparable_ops(settings.dropout) {
                assert_equals_oracle(&rows(), &spec, &weights, Settings { ops, ..settings }, 1e-8);
            }
        }
    }
}

#[test]
fn every_gradient_equals_that_of_autograd_in_fp32() {
    for patch in models() {
        let spec = spec(patch);
        let weights = weights(&spec);
        for settings in every_setting(settings(&spec, Kind::Float)) {
            for ops in [OpsChoice::Proven, OpsChoice::GpuKernels] {
                assert_equals_oracle(&rows(), &spec, &weights, Settings { ops, ..settings }, 2e-5);
            }
        }
    }
}

#[test]
fn a_loss_in_several_chunks_has_the_gradients_of_autograd() {
    let rows = some_rows(LOSS_CHUNK_TOKENS / 8 + 3);
    for patch in models().into_iter().take(6) {
        let spec = spec(patch);
        let weights = weights(&spec).in_double();
        for ops in comparable_ops(0.0) {
            assert_equals_oracle(&rows, &spec, &weights, Settings { ops, ..settings(&spec, Kind::Double) }, 1e-8);
        }
    }
}

#[test]
fn in_bf16_every_gradient_is_as_near_to_that_of_fp32_as_with_autograd() {
    for patch in models() {
        let spec = spec(patch);
        let weights = weights(&spec);
        let dropout = settings(&spec, Kind::Float).dropout;
        let oracle = |kind| Oracle::new(&spec.model, &weights, kind, dropout).loss_and_gradients(&rows(), SCALE, PLACE);
        let ((want_loss, want), (_, rounded)) = (oracle(Kind::Float), oracle(Kind::BFloat16));
        let (of_autograd, _) = largest_error(&rounded.into_iter().collect::<Vec<_>>(), &want);
        for settings in every_setting(settings(&spec, Kind::BFloat16)) {
            for ops in comparable_ops(dropout) {
                let (loss, got) = gradients(&spec, &weights, Settings { ops, ..settings });
                let (error, name) = largest_error(&got, &want);
                let what = format!("{:?}, {settings:?}", spec.method);
                assert!(error < 2.0 * of_autograd, "{name} is off by {error}, autograd by {of_autograd}: {what}");
                assert!((loss / want_loss - 1.0).abs() < 3e-3, "{loss}, not {want_loss}: {what}");
            }
        }
    }
}

#[test]
fn what_is_computed_again_changes_no_bit() {
    for patch in models() {
        let spec = spec(patch);
        let weights = weights(&spec);
        for (kind, ops) in [
            (Kind::Float, OpsChoice::Proven),
            (Kind::BFloat16, OpsChoice::Proven),
            (Kind::BFloat16, OpsChoice::GpuKernels),
        ] {
            let of = |recompute| gradients(&spec, &weights, Settings { recompute, ops, ..settings(&spec, kind) });
            let (loss, want) = of(Recompute::None);
            for recompute in [Recompute::Cheap, Recompute::Layers] {
                let (other_loss, got) = of(recompute);
                assert!(loss.to_bits() == other_loss.to_bits());
                let is_same = want.iter().zip(&got).all(|((_, want), (_, got))| want.equal(got));
                assert!(is_same, "{recompute:?} {kind:?} {ops:?}");
            }
        }
    }
}

/// Losses and gradients of micro-batches of several sizes, with an update of the weights and an evaluation in between.
fn several_passes(spec: &TrainSpec, settings: Settings) -> Vec<Tensor> {
    let weights = weights(spec);
    let mut engine = Engine::new(&spec.model, &weights, settings);
    let rows = rows();
    let mut results = Vec::new();
    for (start, len) in [(0, 2), (2, 2), (1, 1), (0, 2), (0, 4), (2, 2), (3, 1)] {
        results.push(engine.forward_backward(&rows.narrow(0, start, len), SCALE, PLACE));
        results.extend(weights.groups().map(|group| group.gradients.copy()));
        if len == 1 {
            weights.groups().for_each(|group| drop(group.values.shallow_clone().g_mul_scalar_(0.9)));
            engine.weights_changed();
            results.push(engine.summed_loss(&rows));
        }
    }
    results
}

#[test]
fn passes_launched_as_a_whole_change_no_bit() {
    let scratch = |mut patch: Value| {
        patch["memory"] = json!({"merged_weights": "scratch", "recompute": "layers"});
        patch
    };
    for patch in models().into_iter().chain(models().into_iter().map(scratch)) {
        let spec = spec(patch);
        let settings = settings(&spec, Kind::Float);
        let [want, got] = [OpsChoice::GpuKernels, OpsChoice::GpuGraphs]
            .map(|ops| several_passes(&spec, Settings { ops, ..settings }));
        assert!(want.iter().zip(&got).all(|(want, got)| want.equal(got)), "{:?}", spec.method);
        assert_eq!(want.len(), got.len());
    }
}

#[test]
fn the_plan_of_merged_weights_changes_no_bit() {
    let spec = spec(json!({}));
    let weights = weights(&spec);
    for kind in [Kind::Float, Kind::BFloat16] {
        let of = |plan| gradients(&spec, &weights, Settings { plan, ..settings(&spec, kind) });
        let ((_, resident), (_, scratch)) = (of(MergedPlan::Resident), of(MergedPlan::Scratch));
        assert!(resident.iter().zip(&scratch).all(|((_, a), (_, b))| a.equal(b)), "{kind:?}");
    }
}

#[test]
fn quantised_weights_compute_with_what_they_stand_for() {
    for (format, bound) in [(FrozenWeights::Int8, 1.0 / 127.0), (FrozenWeights::Nf4, 0.16)] {
        let spec = spec(json!({}));
        let weights = weights(&spec).in_double();
        let stands_for = weights.in_double();
        let ops = super::Ops::new(OpsChoice::Libtorch, Kind::Double, Device::Cpu);
        for frozen in &stands_for.low_rank.as_ref().expect("wrapped").frozen {
            let master = frozen.master.copy();
            let quantised =
                super::quantised::Quantised::of(&master, format, Device::Cpu).expect("a format of few bits");
            quantised.add_scaled(&ops, &master.zeros_like(), 0.0, &frozen.master);
            let error = (&frozen.master - &master).abs().max().double_value(&[]);
            assert!(
                error > 0.0 && error <= bound * master.abs().max().double_value(&[]),
                "{format:?} is off by {error}"
            );
        }
        let oracle = Oracle::new(&spec.model, &copy_trained(&weights, stands_for), Kind::Double, 0.0);
        let (_, want) = oracle.loss_and_gradients(&rows(), SCALE, PLACE);
        for ops in comparable_ops(0.0) {
            let settings = Settings { frozen_weights: format, ops, ..settings(&spec, Kind::Double) };
            let (error, name) = largest_error(&gradients(&spec, &weights, settings).1, &want);
            assert!(error < 1e-8, "{format:?}: {name} is off by {error:e}");
        }
    }
}

fn copy_trained(from: &Weights, to: Weights) -> Weights {
    for (from, to) in from.groups().zip(to.groups()) {
        to.values.shallow_clone().copy_(&from.values);
    }
    to
}

#[test]
fn evaluation_gives_the_loss_that_training_gives() {
    for patch in models().into_iter().take(6) {
        let spec = spec(patch);
        let weights = weights(&spec);
        let mut engine = Engine::new(&spec.model, &weights, settings(&spec, Kind::Float));
        let trained = engine.forward_backward(&rows(), 1.0, PLACE).double_value(&[]);
        assert_eq!(engine.summed_loss(&rows()).double_value(&[]).to_bits(), trained.to_bits());
    }
}

#[test]
fn a_smaller_micro_batch_after_a_larger_one_finds_nothing_of_it() {
    let spec = spec(json!({}));
    let weights = weights(&spec);
    let few = rows().narrow(0, 1, 2);
    let fresh = Engine::of(&spec, &weights, OpsChoice::Proven).summed_loss(&few).double_value(&[]);
    let mut engine = Engine::of(&spec, &weights, OpsChoice::Proven);
    let _ = engine.forward_backward(&rows(), 1.0, PLACE);
    assert_eq!(engine.summed_loss(&few).double_value(&[]).to_bits(), fresh.to_bits());
}

/// The model as it is exported after a few updates, by name.
fn trained(spec: &TrainSpec, settings: Settings) -> Vec<(String, Tensor)> {
    let mut weights = weights(spec).in_double();
    let mut engine = Engine::new(&spec.model, &weights, settings);
    for _ in 0..3 {
        weights.groups().for_each(|group| drop(group.gradients.shallow_clone().zero_()));
        let _ = engine.forward_backward(&rows(), 1.0, PLACE);
        weights.groups_mut().for_each(|group| group.adamw_update(engine.ops(), &spec.optimizer, 0.01, 1.0));
        engine.weights_changed();
    }
    weights.merged()
}

#[test]
fn padding_changes_no_weight_that_is_exported() {
    for change in [json!({}), json!({"vocab_size": VOCAB_SIZE + 2, "intermediate_size": 23})] {
        for method in [json!({"type": "full"}), method(json!({}))] {
            let spec = spec(json!({"model": change, "method": method}));
            let of = |padding| trained(&spec, Settings { padding, ..settings(&spec, Kind::Double) });
            let (want, padded) = (of(1), of(16));
            let expected = crate::domain::checkpoint::tensors(&spec.model);
            let shapes: HashMap<_, _> = expected.into_iter().map(|tensor| (tensor.name, tensor.shape)).collect();
            assert_eq!(padded.len(), shapes.len());
            for ((name, want), (_, got)) in want.iter().zip(&padded) {
                assert_eq!(got.size(), shapes[name], "{name}");
                // Sums of products in another order, and nothing else.
                let error = relative_error(got, want);
                assert!(error < 1e-11, "{name} is off by {error:e}");
            }
        }
    }
}

/// The loss where every trained value is moved along its gradient, by `step` over all of them.
fn loss_along(gradients: &[Tensor], step: f64, spec: &TrainSpec, weights: &Weights, settings: Settings) -> f64 {
    let move_by = |step: f64| {
        for (group, gradient) in weights.groups().zip(gradients) {
            let mut values = group.values.shallow_clone();
            values += gradient * step;
        }
    };
    move_by(step);
    let (loss, _) = self::gradients(spec, weights, settings);
    move_by(-step);
    loss
}

#[test]
fn libtorch_draws_the_same_masks_backward_as_forward() {
    for change in models() {
        let spec = spec(change.clone());
        let base = Settings { ops: OpsChoice::Libtorch, ..settings(&spec, Kind::Double) };
        if base.dropout == 0.0 {
            continue;
        }
        let weights = weights(&spec).in_double();
        for settings in every_setting(base) {
            gradients(&spec, &weights, settings);
            let found: Vec<_> = weights.groups().map(|group| group.gradients.copy()).collect();
            let square =
                found.iter().map(|gradient| gradient.square().sum(Kind::Double).double_value(&[])).sum::<f64>();
            let step = 1e-5 / square.sqrt();
            let loss = |step| loss_along(&found, step, &spec, &weights, settings);
            let slope = SCALE * (loss(step) - loss(-step)) / (2.0 * step);
            assert!((slope / square - 1.0).abs() < 1e-6, "{slope} for {square}: {settings:?} of {change}");
        }
    }
}

#[test]
fn dropout_masks_are_the_draws_of_their_place() {
    let emulated = Kernels::on_gpu(Kind::Float, Device::Cpu).expect("an emulation");
    for kernels in [Kernels::new(Kind::Float, 1), emulated] {
        assert_masks_are_draws(&kernels);
    }
}

fn assert_masks_are_draws(kernels: &Kernels) {
    let (num_seqs, length, width, keep) = (3, 5, 11, 0.75);
    let place = super::MaskPlace { seed: 9, first_seq: 40, matrix: 6, sequence_length: length };
    let ones = Tensor::ones([num_seqs * length, width + 2], (Kind::Float, Device::Cpu));
    let masked = ones.empty_like();
    kernels.dropout((&ones, width), keep, place, false, &masked);
    let quarter = (width + 3) / 4;
    for row in 0..num_seqs * length {
        let draws = Draws::new(9, Purpose::Dropout, [6, 40 + row / length]);
        for column in 0..width {
            let block = draws.block((column % quarter) as u64 | ((row % length) as u64) << 32);
            let is_kept = f64::from(block[(column / quarter) as usize]) < keep * 4_294_967_296.0;
            let got = masked.double_value(&[row, column]);
            assert_eq!(got, if is_kept { f64::from((1.0 / keep) as f32) } else { 0.0 }, "row {row}, column {column}");
        }
        assert_eq!(masked.double_value(&[row, width]), 0.0, "padding");
    }
}
