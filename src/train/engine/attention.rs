//! Causal self-attention over the queries, keys and values of a micro-batch, forward and backward: one kernel on the CPU,
//! and products with a softmax between elsewhere.
//!
//! In shapes: b sequences, t positions, n query heads, g key and value heads, d elements of a head. Queries, keys and
//! values of a token lie side by side: (b·t, (n + 2g)·d).

use tch::{Device, Kind, Tensor};

use super::{Batch, scratch::Scratch, shared::copy};
use crate::train::{
    native::kernels::{BatchHeads, Heads},
    ops::{Ops, sum_kind},
};

pub struct Attention {
    heads: Heads,
    /// What the kernel works in.
    memory: Scratch,
    /// Of products. Scores are in the sum kind: rounded to bf16, they would put an error of some per cent on
    /// probabilities.
    scores: Scratch,
    exact: [Scratch; 2],
    /// Queries, keys, values and the gradient of what they are mixed to, each head's apart (b·n, t, d).
    apart: [Scratch; 4],
    dprobabilities: Scratch,
    mixed: Scratch,
}

/// What the backward pass needs beside the queries, keys and values.
pub struct Attended {
    /// The mixed values of every token (b·t, n·d).
    rows: Scratch,
    /// Of the kernel: the logarithms of the softmax sums (b·n·t).
    log_sums: Scratch,
    /// Of products (b·n, t, t).
    probabilities: Scratch,
}

impl Attended {
    pub fn new(products: (Kind, Device), sums: (Kind, Device)) -> Self {
        Self { rows: Scratch::new(products), log_sums: Scratch::new(sums), probabilities: Scratch::new(products) }
    }

    pub fn rows(&mut self, shape: &[i64]) -> Tensor {
        self.rows.take(shape)
    }
}

impl Attention {
    pub fn new(heads: Heads, products: (Kind, Device)) -> Self {
        let scratch = || Scratch::new(products);
        let sums = (sum_kind(products.0), products.1);
        Self {
            heads,
            memory: Scratch::new((Kind::Uint8, products.1)),
            scores: Scratch::new(sums),
            exact: [Scratch::new(sums), Scratch::new(sums)],
            apart: [scratch(), scratch(), scratch(), scratch()],
            dprobabilities: scratch(),
            mixed: scratch(),
        }
    }

    /// The number of heads that are turned: those of queries and keys.
    pub fn num_turned_heads(&self) -> i64 {
        self.heads.num_query + self.heads.num_key_value
    }

    fn scale(&self) -> f64 {
        1.0 / (self.heads.dim as f64).sqrt()
    }

    fn of(&self, batch: &Batch) -> BatchHeads {
        BatchHeads { num_seqs: batch.num_seqs, length: batch.sequence_length, heads: self.heads }
    }

    /// Mixes the values, into the rows of `kept`.
    pub fn forward(&mut self, qkv: &Tensor, batch: &Batch, kept: &mut Attended, ops: &Ops) {
        match ops.attention_kernels() {
            Some(kernels) => {
                let (heads, scale) = (self.of(batch), self.scale());
                let mixed = kept.rows.take(&[qkv.size()[0], self.heads.num_query * self.heads.dim]);
                let log_sums = kept.log_sums.take(&[qkv.size()[0] * self.heads.num_query]);
                let memory = self.memory.take(&[kernels.attention_bytes(&heads)]);
                kernels.attention(qkv, &heads, scale, (&mixed, &log_sums), &memory);
            }
            None => self.products_forward(qkv, batch, kept, ops),
        }
    }

    /// Writes the gradients of queries, keys and values over dqkv, from those of the mixed values (b·t, n·d).
    pub fn backward(
        &mut self,
        qkv: &Tensor,
        batch: &Batch,
        kept: &mut Attended,
        dout: &Tensor,
        dqkv: &Tensor,
        ops: &Ops,
    ) {
        match ops.attention_kernels() {
            Some(kernels) => {
                let (heads, scale) = (self.of(batch), self.scale());
                let log_sums = kept.log_sums.take(&[qkv.size()[0] * self.heads.num_query]);
                let memory = self.memory.take(&[kernels.attention_bytes(&heads)]);
                kernels.attention_backward((qkv, dout, &log_sums), &heads, scale, dqkv, &memory);
            }
            None => self.products_backward(qkv, batch, kept, dout, dqkv, ops),
        }
    }

    fn products_forward(&mut self, qkv: &Tensor, batch: &Batch, kept: &mut Attended, ops: &Ops) {
        let Heads { num_query, dim, .. } = self.heads;
        let (b, t) = (batch.num_seqs, batch.sequence_length);
        let rows = kept.rows.take(&[b * t, num_query * dim]).view([b, t, num_query, dim]);
        let [q, k, v] = self.heads.split(qkv, b);
        let [exact_q, exact_k] = &mut self.exact;
        let (q, k) = (self.heads.apart(&q, exact_q), self.heads.apart(&k, exact_k));
        let v = self.heads.apart(&v, &mut self.apart[2]);
        let scores = self.scores.take(&[b * num_query, t, t]);
        let _ = q.bmm_out(&scores, &k.transpose(1, 2));
        let probabilities = kept.probabilities.take(&[b * num_query, t, t]);
        ops.causal_softmax(&scores, self.scale(), &probabilities);
        let mixed = self.mixed.take(&[b * num_query, t, dim]);
        let _ = probabilities.bmm_out(&mixed, &v);
        copy(&mixed.view([b, num_query, t, dim]).transpose(1, 2), &rows);
    }

    fn products_backward(
        &mut self,
        qkv: &Tensor,
        batch: &Batch,
        kept: &mut Attended,
        dout: &Tensor,
        dqkv: &Tensor,
        ops: &Ops,
    ) {
        let Heads { num_query, dim, .. } = self.heads;
        let (b, t) = (batch.num_seqs, batch.sequence_length);
        let [q, k, v] = self.heads.split(qkv, b);
        let dout = dout.view([b, t, num_query, dim]).transpose(1, 2);
        let [to_q, to_k, to_v] = self.heads.split(dqkv, b);
        let scale = self.scale();
        let [apart_q, apart_k, apart_v, apart_dout] = &mut self.apart;
        let [q, k, v, dout] = [(q, apart_q), (k, apart_k), (v, apart_v), (dout, apart_dout)]
            .map(|(heads, scratch)| self.heads.apart(&heads, scratch));
        let probabilities = kept.probabilities.take(&[b * num_query, t, t]);
        let dscores = self.dprobabilities.take(&[b * num_query, t, t]);
        let _ = dout.bmm_out(&dscores, &v.transpose(1, 2));
        ops.causal_softmax_backward(&probabilities, scale, &dscores);
        let mixed = self.mixed.take(&[b * num_query, t, dim]);
        let by_head = mixed.view([b, num_query, t, dim]);
        let _ = probabilities.transpose(1, 2).bmm_out(&mixed, &dout);
        self.heads.gather(&by_head, &to_v);
        let _ = dscores.transpose(1, 2).bmm_out(&mixed, &q);
        self.heads.gather(&by_head, &to_k);
        let _ = dscores.bmm_out(&mixed, &k);
        copy(&by_head, &to_q);
    }
}

impl Heads {
    /// Queries, keys and values (b, n or g, t, d), as views.
    fn split(self, qkv: &Tensor, num_seqs: i64) -> [Tensor; 3] {
        let Self { num_query, num_key_value, dim } = self;
        let heads = qkv.view([num_seqs, -1, num_query + 2 * num_key_value, dim]).transpose(1, 2);
        [(0, num_query), (num_query, num_key_value), (num_query + num_key_value, num_key_value)]
            .map(|(start, len)| heads.narrow(1, start, len))
    }

    /// Every head as often as queries share it (b, heads, share, t, d), as a view.
    fn spread(self, heads: &Tensor) -> Tensor {
        let (b, num_heads, t, d) = heads.size4().expect("four dimensions");
        heads.unsqueeze(2).expand([b, num_heads, self.num_query / num_heads, t, d], false)
    }

    /// A copy of every query head's part (b·n, t, d) of heads (b, n or g, t, d).
    fn apart(self, heads: &Tensor, scratch: &mut Scratch) -> Tensor {
        let spread = self.spread(heads);
        let (b, t, d) = (spread.size()[0], spread.size()[3], spread.size()[4]);
        let apart = scratch.take(&[b * self.num_query, t, d]);
        copy(&spread, &apart.view(spread.size().as_slice()));
        apart
    }

    /// Writes over `to` (b, g, t, d) the sum of what the queries that share a head give to it (b, n, t, d).
    fn gather(self, heads: &Tensor, to: &Tensor) {
        match self.num_query / self.num_key_value {
            1 => copy(heads, to),
            share => {
                let (b, _, t, d) = heads.size4().expect("four dimensions");
                let shared = heads.reshape([b, self.num_key_value, share, t, d]);
                let _ = shared.sum_intlist_out(to, [2i64].as_slice(), false, heads.kind());
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::train::{native::kernels::Kernels, ops::OpsChoice};

    const CPU: Device = Device::Cpu;

    fn batch(num_seqs: i64, sequence_length: i64) -> Batch {
        let tokens = || Tensor::zeros([num_seqs * sequence_length], (Kind::Int64, CPU));
        Batch { num_seqs, sequence_length, tokens: tokens(), targets: tokens(), masks: None }
    }

    fn noise(shape: [i64; 2], kind: Kind) -> Tensor {
        let len = shape[0] * shape[1];
        let waves = (Tensor::arange(len, (Kind::Double, CPU)) * 12.9898 + shape[1]).sin() * 43_758.545;
        ((&waves - waves.floor()) * 4.0 - 2.0).to_kind(kind).view(shape)
    }

    /// What attention mixes, and the gradients of queries, keys and values.
    fn computed(heads: Heads, batch: &Batch, ops: &Ops, kind: Kind) -> [Tensor; 2] {
        let (num_tokens, num_heads) = (batch.tokens.numel() as i64, heads.num_query + 2 * heads.num_key_value);
        // Of a kind that both have, so that they compute with the same.
        let of = |width| noise([num_tokens, width], Kind::BFloat16).to_kind(kind);
        let (qkv, dout) = (of(num_heads * heads.dim), of(heads.num_query * heads.dim));
        let mut attention = Attention::new(heads, (kind, CPU));
        let mut kept = Attended::new((kind, CPU), (sum_kind(kind), CPU));
        attention.forward(&qkv, batch, &mut kept, ops);
        let dqkv = qkv.full_like(f64::NAN);
        attention.backward(&qkv, batch, &mut kept, &dout, &dqkv, ops);
        [kept.rows(&dout.size()).copy(), dqkv]
    }

    #[test]
    fn the_kernel_of_every_instruction_set_gives_what_products_give() {
        let of = |num_query, num_key_value, dim| Heads { num_query, num_key_value, dim };
        for (heads, length) in [(of(4, 2, 6), 1), (of(2, 2, 16), 64), (of(4, 1, 24), 131), (of(1, 1, 64), 200)] {
            let batch = batch(2, length);
            let want = computed(heads, &batch, &Ops::new(OpsChoice::Libtorch, Kind::Double, CPU), Kind::Double);
            for (kind, tolerance) in [(Kind::Double, 1e-13), (Kind::Float, 1e-5), (Kind::BFloat16, 1e-2)] {
                for kernels in Kernels::of_every_set(kind, 2) {
                    let got = computed(heads, &batch, &Ops::Kernels(kernels), kind);
                    for (want, got) in want.iter().zip(got) {
                        let error = ((got - want).abs().max() / want.abs().max()).double_value(&[]);
                        assert!(error < tolerance, "{heads:?}, {length} positions, {kind:?}: off by {error:e}");
                    }
                }
            }
        }
    }

    #[test]
    fn the_number_of_threads_changes_no_bit() {
        let (heads, batch) = (Heads { num_query: 4, num_key_value: 2, dim: 32 }, batch(3, 100));
        for kind in [Kind::Float, Kind::BFloat16] {
            let [want, got] =
                [1, 4].map(|threads| computed(heads, &batch, &Ops::Kernels(Kernels::new(kind, threads)), kind));
            assert!(want.iter().zip(&got).all(|(want, got)| want.equal(got)), "{kind:?}");
        }
    }
}
