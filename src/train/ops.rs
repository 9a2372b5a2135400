//! The operations of a training step that libtorch's matrix products do not do, each over buffers that are there already.
//!
//! On the CPU they are the fused kernels of `native`, and on a GPU if that is asked for; else the same is said in
//! operations of libtorch, which the tests run beside the kernels. Shapes and kinds are those that `native::kernels`
//! documents.

use tch::{Device, Kind, Tensor};

use super::{
    native::kernels::{AdamwSettings, Kernels, MaskPlace},
    random::{Draws, Purpose},
};

/// Elements that libtorch's operations update at a time: 64 MiB of each buffer, and of what lies between operations.
const ADAMW_PART_LEN: i64 = if cfg!(test) { 1 << 12 } else { 1 << 24 };

pub enum Ops {
    Kernels(Kernels),
    Libtorch { sum_kind: Kind },
}

/// Which operations to compute with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum OpsChoice {
    /// Kernels on the CPU, libtorch's on a GPU.
    Proven,
    /// Kernels on a GPU too. Ours have run in an emulation alone, so they have to be asked for.
    GpuKernels,
    /// The same, and the pass over a micro-batch as one launch.
    GpuGraphs,
    /// libtorch's everywhere, beside which the tests run the others.
    #[cfg(test)]
    Libtorch,
}

/// The kind in which sums are held for products of this kind.
pub fn sum_kind(product_kind: Kind) -> Kind {
    if product_kind == Kind::Double { Kind::Double } else { Kind::Float }
}

impl Ops {
    /// Those of the device, for products of this kind.
    ///
    /// # Panics
    /// If kernels were asked for that the GPU cannot run.
    pub fn new(choice: OpsChoice, product_kind: Kind, device: Device) -> Self {
        match (choice, device) {
            // The tests have no GPU, and emulate its kernels.
            (OpsChoice::GpuKernels | OpsChoice::GpuGraphs, _) if device.is_cuda() || cfg!(test) => {
                let kernels = Kernels::on_gpu(product_kind, device)
                    .unwrap_or_else(|error| panic!("CUDA error: the trainer's own kernels cannot be used: {error}"));
                Self::Kernels(kernels)
            }
            (OpsChoice::Proven | OpsChoice::GpuKernels | OpsChoice::GpuGraphs, Device::Cpu) => {
                Self::Kernels(Kernels::new(product_kind, tch::get_num_threads()))
            }
            _ => Self::Libtorch { sum_kind: sum_kind(product_kind) },
        }
    }

    pub fn rms_norm(
        &self,
        x: &Tensor,
        branch: Option<(&Tensor, &Tensor)>,
        weight: &Tensor,
        eps: f64,
        (y, rstd): (&Tensor, &Tensor),
    ) {
        match self {
            Self::Kernels(kernels) => kernels.rms_norm(x, branch, weight, eps, (y, rstd)),
            Self::Libtorch { .. } => {
                let x = match branch {
                    Some((branch, sum)) => {
                        set(sum, &(x + branch));
                        sum
                    }
                    None => x,
                };
                let mean_square = x.square().mean_dim([1i64].as_slice(), true, x.kind());
                let scale = (mean_square + eps).rsqrt();
                set(rstd, &scale.squeeze_dim(1));
                set(y, &(x * scale * weight));
            }
        }
    }

    pub fn rms_norm_backward(
        &self,
        dy: &Tensor,
        norm: (&Tensor, &Tensor, &Tensor),
        dx: &Tensor,
        cast: Option<&Tensor>,
        dweight: Option<&Tensor>,
    ) {
        match self {
            Self::Kernels(kernels) => kernels.rms_norm_backward(dy, norm, dx, cast, dweight),
            Self::Libtorch { sum_kind } => {
                let (x, rstd, weight) = norm;
                let rstd = rstd.unsqueeze(1);
                let (dy, normed) = (dy.to_kind(*sum_kind), x * &rstd);
                let scaled = &dy * weight;
                let dot = (&scaled * &normed).mean_dim([1i64].as_slice(), true, *sum_kind);
                add(dx, &((scaled - &normed * dot) * rstd));
                if let Some(cast) = cast {
                    set(cast, dx);
                }
                if let Some(dweight) = dweight {
                    add(dweight, &(dy * normed).sum_dim_intlist([0i64].as_slice(), false, *sum_kind));
                }
            }
        }
    }

    pub fn rotate(
        &self,
        x: &Tensor,
        heads: i64,
        (cos, sin): (&Tensor, &Tensor),
        sequence_length: i64,
        is_backwards: bool,
    ) {
        match self {
            Self::Kernels(kernels) => kernels.rotate(x, heads, (cos, sin), sequence_length, is_backwards),
            Self::Libtorch { .. } => {
                let half = cos.size()[1];
                let x = x.view([-1, sequence_length, x.size()[1] / (2 * half), 2 * half]).narrow(2, 0, heads);
                let angle = |table: &Tensor| table.narrow(0, 0, sequence_length).unsqueeze(1);
                let (cos, sin) = (angle(cos), if is_backwards { -angle(sin) } else { angle(sin) });
                let (first, second) = (x.narrow(3, 0, half), x.narrow(3, half, half));
                let turned = (&first * &cos - &second * &sin, &second * &cos + &first * &sin);
                set(&first, &turned.0);
                set(&second, &turned.1);
            }
        }
    }

    /// What computes attention as a whole; else it is products, with `causal_softmax` between them.
    pub fn attention_kernels(&self) -> Option<&Kernels> {
        match self {
            Self::Kernels(kernels) if kernels.has_attention() => Some(kernels),
            _ => None,
        }
    }

    pub fn causal_softmax(&self, scores: &Tensor, scale: f64, probabilities: &Tensor) {
        match self {
            Self::Kernels(kernels) => kernels.causal_softmax(scores, scale, probabilities),
            Self::Libtorch { sum_kind } => {
                let t = scores.size()[2];
                let later = Tensor::ones([t, t], (Kind::Bool, scores.device())).triu(1);
                let seen = (scores * scale).masked_fill(&later, f64::NEG_INFINITY);
                set(probabilities, &seen.softmax(-1, *sum_kind));
            }
        }
    }

    pub fn causal_softmax_backward(&self, probabilities: &Tensor, scale: f64, gradients: &Tensor) {
        match self {
            Self::Kernels(kernels) => kernels.causal_softmax_backward(probabilities, scale, gradients),
            Self::Libtorch { sum_kind } => {
                let (p, dp) = (probabilities.to_kind(*sum_kind), gradients.to_kind(*sum_kind));
                let dot = (&p * &dp).sum_dim_intlist([-1i64].as_slice(), true, *sum_kind);
                set(gradients, &((dp - dot) * p * scale));
            }
        }
    }

    pub fn swiglu(&self, gate_up: &Tensor, product: &Tensor) {
        match self {
            Self::Kernels(kernels) => kernels.swiglu(gate_up, product),
            Self::Libtorch { sum_kind } => {
                let [gate, up] = halves(gate_up).map(|half| half.to_kind(*sum_kind));
                set(product, &(gate.silu() * up));
            }
        }
    }

    pub fn swiglu_backward(&self, dproduct: &Tensor, gate_up: &Tensor) {
        match self {
            Self::Kernels(kernels) => kernels.swiglu_backward(dproduct, gate_up),
            Self::Libtorch { sum_kind } => {
                let [gate, up] = halves(gate_up);
                let (g, u, d) = (gate.to_kind(*sum_kind), up.to_kind(*sum_kind), dproduct.to_kind(*sum_kind));
                let sigmoid = g.sigmoid();
                // Both before either is written: g and u may be gate and up themselves.
                let (dgate, dup) = (&d * u * &sigmoid * ((1.0 - &sigmoid) * &g + 1.0), d * &g * &sigmoid);
                set(&gate, &dgate);
                set(&up, &dup);
            }
        }
    }

    pub fn cross_entropy(&self, logits: &Tensor, vocab: i64, targets: &Tensor, scale: Option<f64>, losses: &Tensor) {
        match self {
            Self::Kernels(kernels) => kernels.cross_entropy(logits, vocab, targets, scale, losses),
            Self::Libtorch { sum_kind } => {
                let targets = targets.unsqueeze(1);
                let known = logits.narrow(1, 0, vocab);
                let log_probabilities = known.to_kind(*sum_kind).log_softmax(1, *sum_kind);
                set(losses, &-log_probabilities.gather(1, &targets, false).squeeze_dim(1));
                if let Some(scale) = scale {
                    let mut gradient = log_probabilities.exp();
                    let minus_one = Tensor::full_like(&targets, -1).to_kind(*sum_kind);
                    let _ = gradient.scatter_add_(1, &targets, &minus_one);
                    let _ = logits.shallow_clone().zero_();
                    set(&known, &(gradient * scale));
                }
            }
        }
    }

    pub fn embedding_backward(&self, ids: &Tensor, dx: &Tensor, dweight: &Tensor) {
        match self {
            Self::Kernels(kernels) => kernels.embedding_backward(ids, dx, dweight),
            Self::Libtorch { .. } => {
                let _ = dweight.shallow_clone().index_add_(0, ids, dx);
            }
        }
    }

    pub fn add_scaled(&self, from: &Tensor, delta: &Tensor, scale: f64, to: &Tensor) {
        match self {
            Self::Kernels(kernels) => kernels.add_scaled(from, delta, scale, to),
            Self::Libtorch { sum_kind } => set(to, &(from + delta.to_kind(*sum_kind) * scale)),
        }
    }

    pub fn add_scaled_int8(&self, (codes, scales): (&Tensor, &Tensor), delta: &Tensor, scale: f64, to: &Tensor) {
        match self {
            Self::Kernels(kernels) => kernels.add_scaled_int8((codes, scales), delta, scale, to),
            Self::Libtorch { sum_kind } => {
                set(to, &(codes.to_kind(*sum_kind) * scales.unsqueeze(1) + delta.to_kind(*sum_kind) * scale));
            }
        }
    }

    pub fn add_scaled_nf4(
        &self,
        (codes, scales, levels): (&Tensor, &Tensor, &Tensor),
        delta: &Tensor,
        scale: f64,
        to: &Tensor,
    ) {
        match self {
            Self::Kernels(kernels) => kernels.add_scaled_nf4((codes, scales, levels), delta, scale, to),
            Self::Libtorch { sum_kind } => {
                let len = delta.numel() as i64;
                let codes = Tensor::stack(&[codes.bitwise_and(15), codes.bitwise_right_shift_tensor_scalar(4)], 1);
                let levels = levels.index_select(0, &codes.flatten(0, -1).to_kind(Kind::Int)).narrow(0, 0, len);
                let scales = scales.repeat_interleave_self_int(64, 0, None).narrow(0, 0, len);
                set(to, &((levels * scales).view_as(delta) + delta.to_kind(*sum_kind) * scale));
            }
        }
    }

    pub fn accumulate(&self, from: &Tensor, sum: &Tensor) {
        match self {
            Self::Kernels(kernels) => kernels.accumulate(from, sum),
            Self::Libtorch { .. } => add(sum, from),
        }
    }

    /// Kernels and libtorch draw different masks: every one of libtorch's comes from its own generator, under a seed of the
    /// sequence and the matrix, so that micro-batches do not matter.
    pub fn dropout(&self, (x, width): (&Tensor, i64), keep: f64, place: MaskPlace, adds: bool, to: &Tensor) {
        match self {
            Self::Kernels(kernels) => kernels.dropout((x, width), keep, place, adds, to),
            Self::Libtorch { .. } => {
                let shape = [place.sequence_length, width];
                let masks: Vec<_> = (0..x.size()[0] / place.sequence_length)
                    .map(|row| {
                        let indices = [place.matrix, place.first_seq + row];
                        let [low, high, ..] = Draws::new(place.seed, Purpose::Dropout, indices).block(0);
                        tch::manual_seed((i64::from(high) << 31) ^ i64::from(low));
                        Tensor::empty(shape, (Kind::Float, x.device())).bernoulli_float_(keep)
                    })
                    .collect();
                let padding = x.size()[1] - width;
                let mask = (Tensor::cat(&masks, 0) / keep).constant_pad_nd([0, padding]).to_kind(x.kind());
                if adds { add(to, &(x * mask)) } else { set(to, &(x * mask)) }
            }
        }
    }

    pub fn adamw(&self, buffers: [&Tensor; 4], decayed_len: i64, settings: &AdamwSettings) {
        match self {
            Self::Kernels(kernels) => kernels.adamw(buffers, decayed_len, settings),
            Self::Libtorch { .. } => adamw(buffers, decayed_len, settings),
        }
    }

    /// The sum of squares of a flat buffer, whose length is a multiple of 1,024, in fp64 on the device.
    pub fn square_sum(&self, x: &Tensor) -> Tensor {
        match self {
            Self::Kernels(kernels) => kernels.square_sum(x),
            // In two levels: one fp32 sum over all elements loses digits.
            Self::Libtorch { .. } => {
                let rows = x.view([-1, 1_024]).square().sum_dim_intlist([1i64].as_slice(), false, x.kind());
                rows.sum(Kind::Double)
            }
        }
    }
}

/// In parts, so that little lies in memory between operations, however large the buffers are.
fn adamw(buffers: [&Tensor; 4], decayed_len: i64, settings: &AdamwSettings) {
    let len = buffers[0].numel() as i64;
    for start in (0..len).step_by(ADAMW_PART_LEN as usize) {
        let part_len = ADAMW_PART_LEN.min(len - start);
        let part = buffers.map(|buffer| buffer.narrow(0, start, part_len));
        adamw_part(part, (decayed_len - start).clamp(0, part_len), settings);
    }
}

fn adamw_part(
    [mut value, gradient, mut exp_avg, mut exp_avg_sq]: [Tensor; 4],
    decayed_len: i64,
    settings: &AdamwSettings,
) {
    let AdamwSettings { learning_rate, beta1, beta2, eps, weight_decay, correction1, correction2, gradient_scale } =
        *settings;
    let gradient = gradient * gradient_scale;
    if weight_decay != 0.0 {
        let mut decayed = value.narrow(0, 0, decayed_len);
        decayed *= 1.0 - learning_rate * weight_decay;
    }
    let _ = exp_avg.lerp_(&gradient, 1.0 - beta1);
    exp_avg_sq *= beta2;
    exp_avg_sq += gradient.square() * (1.0 - beta2);
    let mut denominator = exp_avg_sq.sqrt();
    denominator /= correction2.sqrt();
    denominator += eps;
    let mut change = exp_avg / denominator;
    change *= learning_rate / correction1;
    value -= change;
}

/// Gate and up of rows that hold both.
fn halves(gate_up: &Tensor) -> [Tensor; 2] {
    let width = gate_up.size()[1] / 2;
    [gate_up.narrow(1, 0, width), gate_up.narrow(1, width, width)]
}

fn set(to: &Tensor, value: &Tensor) {
    to.shallow_clone().copy_(value);
}

fn add(to: &Tensor, value: &Tensor) {
    let mut to = to.shallow_clone();
    to += value;
}
