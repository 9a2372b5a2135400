//! The kernels of every instruction set beside libtorch's operations in fp64, and beside themselves on other threads.

use tch::{Device, Kind, Tensor};

use super::{
    native::kernels::{AdamwSettings, Kernels, MaskPlace},
    ops::{Ops, OpsChoice, sum_kind},
    test_support::{noise, relative_error},
};

/// Enough for several threads, and no multiple of what a vector holds.
const ROWS: i64 = 45;
const WIDTH: i64 = 1_034;

/// Tensors of the same values in whatever kinds an operation takes: those that a model's kind can hold.
struct Inputs {
    rounded_to: Kind,
    product: Kind,
    sum: Kind,
}

impl Inputs {
    fn new(rounded_to: Kind, product: Kind) -> Self {
        Self { rounded_to, product, sum: sum_kind(product) }
    }

    fn noise(&self, shape: &[i64], seed: i64) -> Tensor {
        noise(shape, seed).to_kind(self.rounded_to)
    }

    fn product(&self, shape: &[i64], seed: i64) -> Tensor {
        self.noise(shape, seed).to_kind(self.product)
    }

    fn sum(&self, shape: &[i64], seed: i64) -> Tensor {
        self.noise(shape, seed).to_kind(self.sum)
    }

    fn indices(&self, len: i64, bound: i64) -> Tensor {
        ((self.noise(&[len], 99).to_kind(Kind::Double) + 1.0) * (bound as f64 / 2.0)).to_kind(Kind::Int64)
    }

    /// What every operation leaves, by name.
    fn results(&self, ops: &Ops) -> Vec<(&'static str, Tensor)> {
        let parts = [self.of_layers(ops), self.of_the_loss(ops), self.of_weights(ops)];
        parts.into_iter().flatten().collect()
    }

    fn of_layers(&self, ops: &Ops) -> Vec<(&'static str, Tensor)> {
        let shape = [ROWS, WIDTH];
        let (x, weight) = (self.sum(&shape, 1), self.sum(&[WIDTH], 2));
        let (sum, y, rstd) = (self.sum(&shape, 0), self.product(&shape, 0), self.sum(&[ROWS], 0));
        ops.rms_norm(&x, Some((&self.product(&shape, 3), &sum)), &weight, 1e-5, (&y, &rstd));
        let (dx, cast, dweight) = (self.sum(&shape, 5), self.product(&shape, 0), self.sum(&[WIDTH], 6));
        ops.rms_norm_backward(&self.product(&shape, 4), (&sum, &rstd, &weight), &dx, Some(&cast), Some(&dweight));

        let (cos, sin) = (self.sum(&[9, 47], 7), self.sum(&[9, 47], 8));
        let [turned, turned_back] = [false, true].map(|is_backwards| {
            let x = self.product(&shape, 9);
            ops.rotate(&x, 10, (&cos, &sin), 9, is_backwards);
            x
        });

        let gate_up = self.product(&[ROWS, 2 * WIDTH], 10);
        let product = self.product(&shape, 0);
        ops.swiglu(&gate_up, &product);
        ops.swiglu_backward(&self.product(&shape, 11), &gate_up);
        vec![
            ("norm's sum", sum),
            ("norm", y),
            ("rstd", rstd),
            ("norm's gradient", dx),
            ("its copy", cast),
            ("norm weight's gradient", dweight),
            ("rotary", turned),
            ("rotary, backwards", turned_back),
            ("swiglu", product),
            ("swiglu's gradients", gate_up),
        ]
    }

    fn of_the_loss(&self, ops: &Ops) -> Vec<(&'static str, Tensor)> {
        let vocab = WIDTH - 7;
        let logits: Tensor = self.product(&[ROWS, WIDTH], 12) * 8.0;
        let (targets, losses) = (self.indices(ROWS, vocab), self.sum(&[ROWS], 0));
        ops.cross_entropy(&logits, vocab, &targets, Some(0.5), &losses);
        let embedding = self.sum(&[17, WIDTH], 13);
        ops.embedding_backward(&self.indices(ROWS, 17), &self.sum(&[ROWS, WIDTH], 14), &embedding);
        vec![("losses", losses), ("logits' gradients", logits), ("embedding's gradient", embedding)]
    }

    fn of_weights(&self, ops: &Ops) -> Vec<(&'static str, Tensor)> {
        let shape = [ROWS, WIDTH];
        let delta = self.product(&shape, 15);
        let [merged, of_int8, of_nf4] = [0; 3].map(|seed| self.product(&shape, seed));
        ops.add_scaled(&self.sum(&shape, 16), &delta, 0.25, &merged);
        let codes = (self.noise(&shape, 17).to_kind(Kind::Double) * 127.0).to_kind(Kind::Int8);
        ops.add_scaled_int8((&codes, &self.sum(&[ROWS], 18)), &delta, 0.25, &of_int8);
        let len = ROWS * WIDTH;
        let pairs = self.indices((len + 1) / 2, 256).to_kind(Kind::Uint8);
        ops.add_scaled_nf4((&pairs, &self.sum(&[(len + 63) / 64], 19), &self.sum(&[16], 20)), &delta, 0.25, &of_nf4);

        let sum = self.sum(&shape, 21);
        ops.accumulate(&delta, &sum);
        let flat = [64 * 1_024];
        let [value, gradient, exp_avg] = [22, 23, 24].map(|seed| self.sum(&flat, seed));
        let exp_avg_sq = self.sum(&flat, 25).abs();
        let settings = AdamwSettings {
            learning_rate: 0.1,
            beta1: 0.9,
            beta2: 0.95,
            eps: 1e-6,
            weight_decay: 0.1,
            correction1: 0.3,
            correction2: 0.2,
            gradient_scale: 0.5,
        };
        ops.adamw([&value, &gradient, &exp_avg, &exp_avg_sq], 50_001, &settings);
        vec![
            ("merged weight", merged),
            ("merged weight, int8", of_int8),
            ("merged weight, nf4", of_nf4),
            ("sum of gradients", sum),
            ("sum of squares", ops.square_sum(&gradient)),
            ("AdamW's value", value),
            ("AdamW's first moment", exp_avg),
            ("AdamW's second moment", exp_avg_sq),
        ]
    }

    /// libtorch draws other masks.
    fn dropped_out(&self, ops: &Ops) -> Tensor {
        let to = self.product(&[ROWS, WIDTH], 0);
        let place = MaskPlace { seed: 5, first_seq: 7, matrix: 3, sequence_length: 9 };
        ops.dropout((&self.product(&[ROWS, WIDTH], 26), WIDTH - 3), 0.7, place, false, &to);
        to
    }
}

fn kernels(kind: Kind, threads: i32) -> Vec<Ops> {
    Kernels::of_every_set(kind, threads).into_iter().map(Ops::Kernels).collect()
}

#[test]
fn the_kernels_of_every_instruction_set_give_what_libtorch_gives() {
    for (kind, tolerance) in [(Kind::Double, 1e-13), (Kind::Float, 1e-5), (Kind::BFloat16, 1e-2)] {
        let libtorch = Ops::new(OpsChoice::Libtorch, Kind::Double, Device::Cpu);
        let want = Inputs::new(kind, Kind::Double).results(&libtorch);
        for ops in kernels(kind, 2) {
            for ((name, got), (_, want)) in Inputs::new(kind, kind).results(&ops).into_iter().zip(&want) {
                let error = relative_error(&got, want);
                assert!(error < tolerance, "{name} in {kind:?} is off by {error:e}");
            }
        }
    }
}

#[test]
fn neither_threads_nor_instructions_change_a_mask() {
    for kind in [Kind::Double, Kind::Float, Kind::BFloat16] {
        let inputs = Inputs::new(kind, kind);
        let masked: Vec<_> =
            kernels(kind, 1).iter().chain(&kernels(kind, 3)).map(|ops| inputs.dropped_out(ops)).collect();
        assert!(masked.iter().all(|other| other.equal(&masked[0])), "{kind:?}");
    }
}

#[test]
fn the_number_of_threads_changes_no_bit() {
    for kind in [Kind::Double, Kind::Float, Kind::BFloat16] {
        let inputs = Inputs::new(kind, kind);
        for (alone, together) in kernels(kind, 1).iter().zip(&kernels(kind, 3)) {
            for ((name, want), (_, got)) in inputs.results(alone).into_iter().zip(inputs.results(together)) {
                assert!(want.equal(&got), "{name} in {kind:?}");
            }
        }
    }
}
