//! One decoder layer, forward and backward: x + attention(norm(x)), then + mlp(norm(·)).

use tch::{Device, Kind, Tensor};

use super::{
    Batch,
    attention::{Attended, Attention},
    projection::Projection,
    scratch::Scratch,
    shared::Shared,
};
use crate::{domain::spec::Recompute, train::weights::Place};

pub struct Norm {
    weight: Place,
    eps: f64,
}

impl Norm {
    pub fn new(weight: Place, eps: f64) -> Self {
        Self { weight, eps }
    }

    /// y = norm(x), after x = mid + branch where there is a branch. Keeps 1 / rms(x).
    pub fn forward(&self, x: &Tensor, sum: Option<(&Tensor, &Tensor)>, y: &Tensor, rstd: &Tensor, shared: &Shared) {
        let weight = &self.weight.value;
        match sum {
            Some((mid, branch)) => shared.ops.rms_norm(mid, Some((branch, x)), weight, self.eps, (y, rstd)),
            None => shared.ops.rms_norm(x, None, weight, self.eps, (y, rstd)),
        }
    }

    /// Adds to the residual stream's gradient what comes through the norm.
    pub fn backward(&self, dy: &Tensor, x: &Tensor, rstd: &Tensor, stream: &GradientStream, shared: &Shared) {
        let Place { value, gradient } = &self.weight;
        shared.ops.rms_norm_backward(dy, (x, rstd, value), &stream.sums, stream.cast.as_ref(), Some(gradient));
    }
}

/// The gradient of the residual stream (n, h).
pub struct GradientStream {
    pub sums: Tensor,
    /// The same in the kind of products, where that is another.
    pub cast: Option<Tensor>,
}

impl GradientStream {
    /// What products read.
    fn products(&self) -> &Tensor {
        self.cast.as_ref().unwrap_or(&self.sums)
    }
}

/// What the backward pass of one layer needs of its forward pass.
pub struct Kept {
    /// The residual stream between attention and mlp (n, h).
    mid: Scratch,
    rstds: [Scratch; 2],
    /// Turned queries and keys, and values.
    qkv: Scratch,
    attended: Attended,
    gate_up: Scratch,
    /// Only where nothing is computed again: outputs of both norms, and the product of gate and up.
    normed: [Scratch; 2],
    product: Scratch,
}

impl Kept {
    pub fn new(products: (Kind, Device), sums: (Kind, Device)) -> Self {
        Self {
            mid: Scratch::new(sums),
            rstds: [Scratch::new(sums), Scratch::new(sums)],
            qkv: Scratch::new(products),
            attended: Attended::new(products, sums),
            gate_up: Scratch::new(products),
            normed: [Scratch::new(products), Scratch::new(products)],
            product: Scratch::new(products),
        }
    }
}

/// What a pass through the layers needs at one layer at a time.
pub struct Pass {
    attention: Attention,
    recompute: Recompute,
    rotary: (Tensor, Tensor),
    /// What attention or mlp adds to the stream (n, h).
    branch: Scratch,
    normed: Scratch,
    product: Scratch,
    dproduct: Scratch,
    dqkv: Scratch,
    dnormed: Scratch,
    dattended: Scratch,
}

impl Pass {
    pub fn new(attention: Attention, recompute: Recompute, rotary: (Tensor, Tensor), products: (Kind, Device)) -> Self {
        let scratch = || Scratch::new(products);
        Self {
            attention,
            recompute,
            rotary,
            branch: scratch(),
            normed: scratch(),
            product: scratch(),
            dproduct: scratch(),
            dqkv: scratch(),
            dnormed: scratch(),
            dattended: scratch(),
        }
    }

    pub fn branch(&mut self, shape: &[i64]) -> Tensor {
        self.branch.take(shape)
    }
}

/// What a layer is passed with: the micro-batch, and memory that is not the layer's own.
pub struct Context<'a> {
    pub batch: &'a Batch,
    pub pass: &'a mut Pass,
    pub shared: &'a mut Shared,
}

pub struct Layer {
    pub input_norm: Norm,
    pub post_attention_norm: Norm,
    pub qkv: Projection,
    pub output: Projection,
    pub gate_up: Projection,
    pub down: Projection,
}

impl Layer {
    pub fn projections_mut(&mut self) -> [&mut Projection; 4] {
        [&mut self.qkv, &mut self.output, &mut self.gate_up, &mut self.down]
    }

    /// From x (n, h), which is first set to `mid` + the pass's branch where a mid is given. Leaves what the layer adds to
    /// its own mid, which it returns, in the pass's branch.
    pub fn forward(&self, x: &Tensor, mid: Option<&Tensor>, kept: &mut Kept, context: Context<'_>) -> Tensor {
        let Context { batch, pass, shared } = context;
        let shape = x.size();
        let num_tokens = shape[0];
        let branch = pass.branch.take(&shape);

        let normed = normed(kept, pass, 0, &shape);
        let rstd = kept.rstds[0].take(&[num_tokens]);
        let span = shared.profile.span("forward", "norm");
        self.input_norm.forward(x, mid.map(|mid| (mid, &branch)), &normed, &rstd, shared);
        drop(span);
        let qkv = kept.qkv.take(&[num_tokens, self.qkv.outputs]);
        let span = shared.profile.span("forward", "queries, keys, values");
        self.qkv.forward(&normed, &qkv, batch.masks, shared);
        drop(span);
        pass.rotate(&qkv, batch, false, shared);
        let span = shared.profile.span("forward", "attention");
        pass.attention.forward(&qkv, batch, &mut kept.attended, &shared.ops);
        drop(span);
        let span = shared.profile.span("forward", "output");
        self.output.forward(&kept.attended.rows(&shape), &branch, batch.masks, shared);
        drop(span);

        let normed = self::normed(kept, pass, 1, &shape);
        let (mid, rstd) = (kept.mid.take(&shape), kept.rstds[1].take(&[num_tokens]));
        let span = shared.profile.span("forward", "norm");
        self.post_attention_norm.forward(&mid, Some((x, &branch)), &normed, &rstd, shared);
        drop(span);
        let gate_up = kept.gate_up.take(&[num_tokens, self.gate_up.outputs]);
        let span = shared.profile.span("forward", "gate and up");
        self.gate_up.forward(&normed, &gate_up, batch.masks, shared);
        drop(span);
        let product = product(kept, pass, &[num_tokens, self.down.inputs]);
        let span = shared.profile.span("forward", "swiglu");
        shared.ops.swiglu(&gate_up, &product);
        drop(span);
        let span = shared.profile.span("forward", "down");
        self.down.forward(&product, &branch, batch.masks, shared);
        drop(span);
        mid
    }

    /// Takes the stream's gradient from behind the layer to before it, and adds the gradients of the parameters. What
    /// was kept is used up.
    pub fn backward(&self, x: &Tensor, kept: &mut Kept, stream: &GradientStream, context: Context<'_>) {
        let Context { batch, pass, shared } = context;
        let shape = x.size();
        let num_tokens = shape[0];
        let dnormed = pass.dnormed.take(&shape);

        let gate_up = kept.gate_up.take(&[num_tokens, self.gate_up.outputs]);
        let product = product(kept, pass, &[num_tokens, self.down.inputs]);
        if pass.recompute != Recompute::None {
            let _span = shared.profile.span("backward", "swiglu again");
            shared.ops.swiglu(&gate_up, &product);
        }
        let dproduct = pass.dproduct.take(&product.size());
        let span = shared.profile.span("backward", "down");
        self.down.backward(&product, stream.products(), &dproduct, batch.masks, shared);
        drop(span);
        let span = shared.profile.span("backward", "swiglu");
        shared.ops.swiglu_backward(&dproduct, &gate_up);
        drop(span);
        let (mid, rstd) = (kept.mid.take(&shape), kept.rstds[1].take(&[num_tokens]));
        let normed = normed(kept, pass, 1, &shape);
        if pass.recompute != Recompute::None {
            let _span = shared.profile.span("backward", "norm again");
            self.post_attention_norm.forward(&mid, None, &normed, &rstd, shared);
        }
        let span = shared.profile.span("backward", "gate and up");
        self.gate_up.backward(&normed, &gate_up, &dnormed, batch.masks, shared);
        drop(span);
        let span = shared.profile.span("backward", "norm");
        self.post_attention_norm.backward(&dnormed, &mid, &rstd, stream, shared);
        drop(span);

        let dattended = pass.dattended.take(&shape);
        let span = shared.profile.span("backward", "output");
        self.output.backward(&kept.attended.rows(&shape), stream.products(), &dattended, batch.masks, shared);
        drop(span);
        let qkv = kept.qkv.take(&[num_tokens, self.qkv.outputs]);
        let dqkv = pass.dqkv.take(&qkv.size());
        let span = shared.profile.span("backward", "attention");
        pass.attention.backward(&qkv, batch, &mut kept.attended, (&dattended, &dqkv), &shared.ops);
        drop(span);
        pass.rotate(&dqkv, batch, true, shared);
        let rstd = kept.rstds[0].take(&[num_tokens]);
        let normed = self::normed(kept, pass, 0, &shape);
        if pass.recompute != Recompute::None {
            let _span = shared.profile.span("backward", "norm again");
            self.input_norm.forward(x, None, &normed, &rstd, shared);
        }
        let span = shared.profile.span("backward", "queries, keys, values");
        self.qkv.backward(&normed, &dqkv, &dnormed, batch.masks, shared);
        drop(span);
        let span = shared.profile.span("backward", "norm");
        self.input_norm.backward(&dnormed, x, &rstd, stream, shared);
        drop(span);
    }
}

impl Pass {
    /// Turns queries and keys, or their gradients back.
    fn rotate(&self, qkv: &Tensor, batch: &Batch, is_backwards: bool, shared: &Shared) {
        let _span = shared.profile.span(if is_backwards { "backward" } else { "forward" }, "rotary");
        let (cos, sin) = &self.rotary;
        shared.ops.rotate(qkv, self.attention.num_turned_heads(), (cos, sin), batch.sequence_length, is_backwards);
    }
}

/// Where the output of one of the two norms goes.
fn normed(kept: &mut Kept, pass: &mut Pass, which: usize, shape: &[i64]) -> Tensor {
    match pass.recompute {
        Recompute::None => kept.normed[which].take(shape),
        _ => pass.normed.take(shape),
    }
}

fn product(kept: &mut Kept, pass: &mut Pass, shape: &[i64]) -> Tensor {
    match pass.recompute {
        Recompute::None => kept.product.take(shape),
        _ => pass.product.take(shape),
    }
}
