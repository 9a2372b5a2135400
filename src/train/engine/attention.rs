//! Causal self-attention over the queries, keys and values of a micro-batch, forward and backward: one kernel on the CPU,
//! and products with a softmax between elsewhere.
//!
//! In shapes: b sequences, t positions, n query heads, g key and value heads, d elements of a head. Queries, keys and
//! values of a token lie side by side: (b·t, (n + 2g)·d).

use tch::{Device, Kind, Tensor};

use super::{Batch, attention_products::Products, scratch::Scratch};
use crate::train::{
    native::kernels::{BatchHeads, Heads},
    ops::Ops,
};

pub struct Attention {
    heads: Heads,
    /// What the kernel works in.
    memory: Scratch,
    products: Products,
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
        let memory = Scratch::new((Kind::Uint8, products.1));
        Self { heads, memory, products: Products::new(heads, products) }
    }

    /// The number of heads that are turned: those of queries and keys.
    pub fn num_turned_heads(&self) -> i64 {
        self.heads.num_query + self.heads.num_key_value
    }

    fn of(&self, batch: &Batch) -> BatchHeads {
        BatchHeads { num_seqs: batch.num_seqs, length: batch.sequence_length, heads: self.heads }
    }

    /// Mixes the values, into the rows of `kept`.
    pub fn forward(&mut self, qkv: &Tensor, batch: &Batch, kept: &mut Attended, ops: &Ops) {
        let mixed = kept.rows.take(&[qkv.size()[0], self.heads.num_query * self.heads.dim]);
        match ops.attention_kernels() {
            Some(kernels) => {
                let (heads, scale) = (self.of(batch), self.heads.scale());
                let log_sums = kept.log_sums.take(&[qkv.size()[0] * self.heads.num_query]);
                let memory = self.memory.take(&[kernels.attention_bytes(&heads)]);
                kernels.attention(qkv, &heads, scale, (&mixed, &log_sums), &memory);
            }
            None => self.products.forward(qkv, batch, (&mixed, &mut kept.probabilities), ops),
        }
    }

    /// Writes the gradients of queries, keys and values over dqkv, from those of the mixed values (b·t, n·d).
    pub fn backward(
        &mut self,
        qkv: &Tensor,
        batch: &Batch,
        kept: &mut Attended,
        (dout, dqkv): (&Tensor, &Tensor),
        ops: &Ops,
    ) {
        match ops.attention_kernels() {
            Some(kernels) => {
                let (heads, scale) = (self.of(batch), self.heads.scale());
                let log_sums = kept.log_sums.take(&[qkv.size()[0] * self.heads.num_query]);
                let memory = self.memory.take(&[kernels.attention_bytes(&heads)]);
                kernels.attention_backward((qkv, dout, &log_sums), &heads, scale, dqkv, &memory);
            }
            None => self.products.backward((qkv, dout, &mut kept.probabilities), batch, dqkv, ops),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::train::{
        native::kernels::Kernels,
        ops::{OpsChoice, sum_kind},
        test_support::{noise, relative_error},
    };

    const CPU: Device = Device::Cpu;

    fn batch(num_seqs: i64, sequence_length: i64) -> Batch {
        let tokens = || Tensor::zeros([num_seqs * sequence_length], (Kind::Int64, CPU));
        Batch { num_seqs, sequence_length, tokens: tokens(), targets: tokens(), masks: None }
    }

    /// What attention mixes, and the gradients of queries, keys and values.
    fn computed(heads: Heads, batch: &Batch, ops: &Ops, kind: Kind) -> [Tensor; 2] {
        let (num_tokens, num_heads) = (batch.tokens.numel() as i64, heads.num_query + 2 * heads.num_key_value);
        // Of a kind that both have, so that they compute with the same.
        let of = |width| (noise(&[num_tokens, width], width) * 2.0).to_kind(Kind::BFloat16).to_kind(kind);
        let (qkv, dout) = (of(num_heads * heads.dim), of(heads.num_query * heads.dim));
        let mut attention = Attention::new(heads, (kind, CPU));
        let mut kept = Attended::new((kind, CPU), (sum_kind(kind), CPU));
        if let Some(kernels) = ops.attention_kernels() {
            // Nothing may come of what was in memory before: of NaN, in every kind.
            let _ = attention.memory.take(&[kernels.attention_bytes(&attention.of(batch))]).fill_(255);
        }
        attention.forward(&qkv, batch, &mut kept, ops);
        let dqkv = qkv.full_like(f64::NAN);
        attention.backward(&qkv, batch, &mut kept, (&dout, &dqkv), ops);
        [kept.rows(&dout.size()).copy(), dqkv]
    }

    #[test]
    fn the_kernel_of_every_instruction_set_gives_what_products_give() {
        let of = |num_query, num_key_value, dim| Heads { num_query, num_key_value, dim };
        for (heads, length) in [(of(4, 2, 6), 1), (of(2, 2, 16), 64), (of(4, 1, 24), 131), (of(1, 1, 80), 200)] {
            let batch = batch(2, length);
            let want = computed(heads, &batch, &Ops::new(OpsChoice::Libtorch, Kind::Double, CPU), Kind::Double);
            for (kind, tolerance) in [(Kind::Double, 1e-13), (Kind::Float, 1e-5), (Kind::BFloat16, 1e-2)] {
                for kernels in Kernels::of_every_set(kind, 2) {
                    let got = computed(heads, &batch, &Ops::Kernels(kernels), kind);
                    for (want, got) in want.iter().zip(got) {
                        let error = relative_error(&got, want);
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
