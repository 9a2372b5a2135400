//! The model's forward and backward pass, written out over buffers that are taken once: no autograd, no graph.
//!
//! In shapes: b sequences, t positions, n = b·t tokens, h hidden, f intermediate, v vocabulary. Matrix products run in
//! the product kind; norms, rotations, the residual stream, the loss and all gradients of parameters in the sum kind.

mod attention;
mod attention_products;
mod graphs;
mod layer;
mod parts;
mod projection;
mod quantised;
mod scratch;
mod shared;
#[cfg(test)]
mod tests;

use tch::{Kind, Tensor};

use attention::Attention;
use graphs::Graphs;
use layer::{Context, GradientStream, Kept, Layer, Norm, Pass};
use parts::Embedding;
use projection::Projection;
use scratch::Scratch;
use shared::Shared;

use super::{
    native::kernels::{Heads, MaskPlace},
    ops::{Ops, OpsChoice, sum_kind},
    profile::Profile,
    weights::Weights,
};
use crate::domain::spec::{FrozenWeights, MergedPlan, ModelSpec, Precision, Recompute, TrainSpec};

/// Tokens whose logits are in memory at a time.
const LOSS_CHUNK_TOKENS: i64 = 1_024;

/// Sizes of matrices are rounded up to a multiple of this many elements: where rows begin at odd addresses, products by
/// MKL take a third as long again (docs/performance.md), and a GPU's matrix units want multiples of 16 bytes.
const PADDING: i64 = 16;

/// How the engine computes, beside what.
#[derive(Debug, Clone, Copy)]
pub struct Settings {
    pub product_kind: Kind,
    pub recompute: Recompute,
    pub plan: MergedPlan,
    pub frozen_weights: FrozenWeights,
    pub dropout: f64,
    /// Sizes of matrices are rounded up to a multiple of this.
    pub padding: i64,
    pub ops: OpsChoice,
}

impl Settings {
    pub fn new(precision: Precision) -> Self {
        Self {
            product_kind: match precision {
                Precision::Fp32 => Kind::Float,
                Precision::Bf16 => Kind::BFloat16,
            },
            recompute: Recompute::Cheap,
            plan: MergedPlan::Resident,
            frozen_weights: FrozenWeights::Full,
            dropout: 0.0,
            padding: PADDING,
            ops: OpsChoice::Proven,
        }
    }

    /// Those of a run.
    pub fn of(spec: &TrainSpec) -> Self {
        Self {
            recompute: spec.memory.recompute,
            // Settled in the spec of every run.
            plan: spec.memory.merged_weights.plan().unwrap_or(MergedPlan::Scratch),
            frozen_weights: spec.memory.frozen_weights,
            dropout: spec.method.factors().map_or(0.0, |factors| factors.dropout),
            ..Self::new(spec.precision)
        }
    }
}

/// What dropout masks depend on: the place of a micro-batch in the whole run's sequence of training rows.
#[derive(Debug, Clone, Copy)]
pub struct DropoutPlace {
    pub seed: i64,
    pub first_seq: i64,
}

/// The model over a set of weights. It shares their storage, and follows them when it is told that they changed.
pub struct Engine {
    embedding: Embedding,
    layers: Vec<Layer>,
    norm: Norm,
    head: Projection,
    vocab_size: i64,
    recompute: Recompute,
    shared: Shared,
    pass: Pass,
    /// The residual stream at every layer's input, and behind the last one.
    inputs: Vec<Scratch>,
    /// Of every layer; empty where whole layers are computed again.
    kept: Vec<Kept>,
    /// Of a layer that is not gone back through, or computed again for that.
    passing: Kept,
    loss: LossBuffers,
    stream: [Scratch; 2],
    /// Present where passes are launched as a whole.
    graphs: Option<Graphs>,
    is_stale: bool,
}

/// Memory for what lies behind the layers.
struct LossBuffers {
    normed: Scratch,
    dnormed: Scratch,
    rstd: Scratch,
    logits: Scratch,
    losses: Scratch,
}

/// A micro-batch, as every part of the model needs it.
struct Batch {
    num_seqs: i64,
    sequence_length: i64,
    tokens: Tensor,  // (n)
    targets: Tensor, // (n)
    /// Where its dropout masks come from; None where nothing is dropped out.
    masks: Option<MaskPlace>,
}

impl Engine {
    /// The model of a run.
    pub fn of(spec: &TrainSpec, weights: &Weights, ops: OpsChoice) -> Self {
        Self::new(&spec.model, weights, Settings { ops, ..Settings::of(spec) })
    }

    /// # Panics
    /// If a tensor is missing: weights are made from the same spec.
    pub fn new(spec: &ModelSpec, weights: &Weights, settings: Settings) -> Self {
        let device = weights.full_rank.values.device();
        let products = (settings.product_kind, device);
        let sums = (sum_kind(settings.product_kind), device);
        let shared = Shared::new(settings, device);
        let heads = Heads {
            num_query: spec.num_attention_heads,
            num_key_value: spec.num_key_value_heads,
            dim: spec.head_dim(),
        };
        let layers: Vec<_> =
            (0..spec.num_hidden_layers).map(|index| parts::layer(spec, weights, index, &shared)).collect();
        let num_kept = if settings.recompute == Recompute::Layers { 0 } else { layers.len() };
        let mut engine = Self {
            embedding: parts::embedding(weights),
            norm: Norm::new(weights.place("model.norm.weight").expect("a norm trains"), spec.rms_norm_eps),
            head: parts::head(spec, weights, &shared),
            vocab_size: spec.vocab_size,
            recompute: settings.recompute,
            pass: Pass::new(Attention::new(heads, products), settings.recompute, parts::rotary(spec, sums), products),
            inputs: (0..=layers.len()).map(|_| Scratch::new(sums)).collect(),
            kept: (0..num_kept).map(|_| Kept::new(products, sums)).collect(),
            passing: Kept::new(products, sums),
            loss: LossBuffers {
                normed: Scratch::new(products),
                dnormed: Scratch::new(products),
                rstd: Scratch::new(sums),
                logits: Scratch::new(products),
                losses: Scratch::new(sums),
            },
            stream: [Scratch::new(sums), Scratch::new(products)],
            // Where masks come from differs between passes.
            graphs: (settings.ops == OpsChoice::GpuGraphs && settings.dropout == 0.0).then(|| Graphs::new(device)),
            is_stale: true,
            shared,
            layers,
        };
        engine.frozen_changed();
        engine
    }

    /// Records where the time goes from here on.
    pub fn profile(&mut self, profile: Profile) {
        if profile.is_wanted() {
            // Within a launch nobody looks at the time.
            self.graphs = None;
        }
        self.shared.profile = profile;
    }

    pub fn ops(&self) -> &Ops {
        &self.shared.ops
    }

    /// To be called after an update: what is computed from the parameters is not theirs any more.
    pub fn weights_changed(&mut self) {
        self.is_stale = true;
    }

    /// To be called after a merge: the frozen matrices are others, too.
    pub fn frozen_changed(&mut self) {
        let _guard = tch::no_grad_guard();
        for projection in self.layers.iter_mut().flat_map(Layer::projections_mut) {
            projection.refresh_frozen(&self.shared);
        }
        // Quantised matrices lie elsewhere now.
        self.graphs.iter_mut().for_each(Graphs::forget);
        self.is_stale = true;
    }

    /// The summed cross-entropy of rows (b, t + 1), each of which gives t targets, in fp64 on the device. Adds the
    /// gradients of `scale` times the sum to those of the parameters.
    pub fn forward_backward(&mut self, rows: &Tensor, scale: f64, place: DropoutPlace) -> Tensor {
        let _guard = tch::no_grad_guard();
        let batch = self.begin(rows, Some(place));
        match self.graphs.take() {
            Some(mut graphs) => {
                graphs.run(&batch, scale, |batch| self.whole_pass(batch, scale));
                self.graphs = Some(graphs);
            }
            None => self.whole_pass(&batch, scale),
        }
        self.summed(&batch)
    }

    /// Forward and backward. Once its buffers have grown to their sizes it takes no memory, so that it can be recorded.
    fn whole_pass(&mut self, batch: &Batch, scale: f64) {
        let mid = self.forward(batch, true);
        self.loss(batch, &mid, Some(scale));
        self.backward(batch);
    }

    /// The summed cross-entropy of rows (b, t + 1), without dropout, in fp64 on the device.
    pub fn summed_loss(&mut self, rows: &Tensor) -> Tensor {
        let _guard = tch::no_grad_guard();
        let batch = self.begin(rows, None);
        let mid = self.forward(&batch, false);
        self.loss(&batch, &mid, None);
        self.summed(&batch)
    }

    /// The sum of the losses of a batch's tokens, in fp64.
    fn summed(&mut self, batch: &Batch) -> Tensor {
        self.loss.losses.take(&batch.tokens.size()).sum(Kind::Double)
    }

    /// The logits (b·t, v) of tokens (b, t), without dropout, in the sum kind.
    pub fn logits(&mut self, tokens: &Tensor) -> Tensor {
        let _guard = tch::no_grad_guard();
        // A last token that is a target alone.
        let rows = tokens.constant_pad_nd([0, 1]);
        let batch = self.begin(&rows, None);
        let mid = self.forward(&batch, false);
        let (normed, _) = self.final_norm(&mid);
        let logits = Tensor::empty([batch.tokens.size()[0], self.head.outputs], self.shared.products());
        self.head.forward(&normed, &logits, None, &mut self.shared);
        logits.narrow(1, 0, self.vocab_size).contiguous().to_kind(sum_kind(self.shared.product_kind))
    }

    fn begin(&mut self, rows: &Tensor, place: Option<DropoutPlace>) -> Batch {
        if self.is_stale {
            let _span = self.shared.profile.span("weights", "refresh");
            let projections = self.layers.iter_mut().flat_map(Layer::projections_mut).chain([&mut self.head]);
            projections.for_each(|projection| projection.refresh(&mut self.shared));
            self.is_stale = false;
        }
        let (num_seqs, length) = rows.size2().expect("rows of tokens");
        let sequence_length = length - 1;
        let place = place.filter(|_| self.shared.dropout > 0.0);
        Batch {
            num_seqs,
            sequence_length,
            tokens: rows.narrow(1, 0, sequence_length).reshape([-1]),
            targets: rows.narrow(1, 1, sequence_length).reshape([-1]),
            masks: place.map(|place| MaskPlace {
                seed: place.seed,
                first_seq: place.first_seq,
                matrix: 0,
                sequence_length,
            }),
        }
    }

    /// Through all layers. What the last one adds to its mid, which is returned, is in the pass's branch.
    fn forward(&mut self, batch: &Batch, keeps: bool) -> Tensor {
        let _span = self.shared.profile.span("forward", "forward");
        let shape = [batch.tokens.size()[0], self.embedding.value.size()[1]];
        let first = self.inputs[0].take(&shape);
        let span = self.shared.profile.span("forward", "embedding");
        let _ = self.embedding.value.index_select_out(&first, 0, &batch.tokens);
        drop(span);
        let mut mid = None;
        for (index, layer) in self.layers.iter().enumerate() {
            let x = self.inputs[if keeps { index } else { index % 2 }].take(&shape);
            let kept = if keeps { self.kept.get_mut(index) } else { None };
            let kept = kept.unwrap_or(&mut self.passing);
            let context = Context { batch, pass: &mut self.pass, shared: &mut self.shared };
            mid = Some(layer.forward(&x, mid.as_ref(), kept, context));
        }
        mid.expect("a model has a layer")
    }

    /// The normed end of the residual stream, and 1 / rms of it.
    fn final_norm(&mut self, mid: &Tensor) -> (Tensor, Tensor) {
        let shape = mid.size();
        let x = self.inputs[self.layers.len()].take(&shape);
        let (normed, rstd) = (self.loss.normed.take(&shape), self.loss.rstd.take(&shape[..1]));
        let branch = self.pass.branch(&shape);
        let _span = self.shared.profile.span("loss", "norm");
        self.norm.forward(&x, Some((mid, &branch)), &normed, &rstd, &self.shared);
        (normed, rstd)
    }

    /// The loss of every token, in chunks of tokens: all logits together would be the largest thing in memory. With a
    /// scale, the gradients follow each chunk at once.
    fn loss(&mut self, batch: &Batch, mid: &Tensor, scale: Option<f64>) {
        let _span = self.shared.profile.span("loss", "loss");
        let (normed, _) = self.final_norm(mid);
        let num_tokens = normed.size()[0];
        let losses = self.loss.losses.take(&[num_tokens]);
        let dnormed = scale.map(|_| self.loss.dnormed.take(&normed.size()));
        for start in (0..num_tokens).step_by(LOSS_CHUNK_TOKENS as usize) {
            let chunk = |tensor: &Tensor| tensor.narrow(0, start, LOSS_CHUNK_TOKENS.min(num_tokens - start));
            let normed = chunk(&normed);
            let logits = self.loss.logits.take(&[normed.size()[0], self.head.outputs]);
            let span = self.shared.profile.span("loss", "logits");
            self.head.forward(&normed, &logits, None, &mut self.shared);
            drop(span);
            let span = self.shared.profile.span("loss", "cross-entropy");
            let (targets, losses) = (chunk(&batch.targets), chunk(&losses));
            self.shared.ops.cross_entropy(&logits, self.vocab_size, &targets, scale, &losses);
            drop(span);
            if let Some(dnormed) = &dnormed {
                let _span = self.shared.profile.span("loss", "head");
                self.head.backward(&normed, &logits, &chunk(dnormed), None, &mut self.shared);
            }
        }
    }

    /// Back through everything before the head, whose gradient the loss has left.
    fn backward(&mut self, batch: &Batch) {
        let _span = self.shared.profile.span("backward", "backward");
        let shape = [batch.tokens.size()[0], self.embedding.value.size()[1]];
        let [sums, cast] = &mut self.stream;
        let casts = self.shared.product_kind != self.embedding.value.kind();
        let stream = GradientStream { sums: sums.take(&shape).zero_(), cast: casts.then(|| cast.take(&shape)) };
        let (dnormed, rstd) = (self.loss.dnormed.take(&shape), self.loss.rstd.take(&shape[..1]));
        let end = self.inputs[self.layers.len()].take(&shape);
        let span = self.shared.profile.span("backward", "norm");
        self.norm.backward(&dnormed, &end, &rstd, &stream, &self.shared);
        drop(span);
        for (index, layer) in self.layers.iter().enumerate().rev() {
            let x = self.inputs[index].take(&shape);
            let kept = self.kept.get_mut(index).unwrap_or(&mut self.passing);
            if self.recompute == Recompute::Layers {
                let _span = self.shared.profile.span("backward", "layer again");
                let context = Context { batch, pass: &mut self.pass, shared: &mut self.shared };
                let _ = layer.forward(&x, None, kept, context);
            }
            layer.backward(&x, kept, &stream, Context { batch, pass: &mut self.pass, shared: &mut self.shared });
        }
        if let Some(gradient) = &self.embedding.gradient {
            let _span = self.shared.profile.span("backward", "embedding");
            self.shared.ops.embedding_backward(&batch.tokens, &stream.sums, gradient);
        }
    }
}
