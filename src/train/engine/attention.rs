//! Causal self-attention over the queries, keys and values of a micro-batch, forward and backward.
//!
//! In shapes: b sequences, t positions, n query heads, g key and value heads, d elements of a head. Queries, keys and
//! values of a token lie side by side: (b·t, (n + 2g)·d).

use tch::{Kind, Tensor};

/// How the heads of a model are cut.
#[derive(Debug, Clone, Copy)]
pub struct Heads {
    pub num_query: i64,
    pub num_key_value: i64,
    pub dim: i64,
}

/// Which operations compute it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kernel {
    /// libtorch's flash attention for the CPU.
    FlashCpu,
    /// Products and a softmax over all pairs of positions, on any device.
    Products,
}

/// What the backward pass needs beside the queries, keys and values.
pub struct Attended {
    /// (b, n, t, d); for one token the heads lie side by side.
    out: Tensor,
    /// Of flash attention the logarithms of the softmax sums, else the probabilities (b, n, t, t).
    kept: Tensor,
}

impl Attended {
    /// The mixed values of every token (b·t, n·d).
    pub fn rows(&self) -> Tensor {
        let (b, n, t, d) = self.out.size4().expect("four dimensions");
        self.out.transpose(1, 2).reshape([b * t, n * d])
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

    /// Every key or value head as often as queries share it.
    fn spread(self, heads: &Tensor) -> Tensor {
        match self.num_query / self.num_key_value {
            1 => heads.shallow_clone(),
            share => heads.repeat_interleave_self_int(share, 1, None),
        }
    }

    /// The sum of what the queries that share a head give to it.
    fn gather(self, heads: Tensor) -> Tensor {
        match self.num_query / self.num_key_value {
            1 => heads,
            share => {
                let (b, _, t, d) = heads.size4().expect("four dimensions");
                heads.reshape([b, self.num_key_value, share, t, d]).sum_dim_intlist([2i64].as_slice(), false, heads.kind())
            }
        }
    }

    pub fn forward(self, kernel: Kernel, qkv: &Tensor, num_seqs: i64) -> Attended {
        let [q, k, v] = self.split(qkv, num_seqs);
        let (k, v) = (self.spread(&k), self.spread(&v));
        match kernel {
            Kernel::FlashCpu => {
                let (out, kept) = Tensor::internal_scaled_dot_product_flash_attention_for_cpu(
                    &q, &k, &v, 0.0, true, None::<Tensor>, None,
                );
                Attended { out, kept }
            }
            Kernel::Products => {
                let sum_kind = super::sum_kind(q.kind());
                let scores = q.matmul(&k.transpose(2, 3)).to_kind(sum_kind) / (self.dim as f64).sqrt();
                let t = q.size()[2];
                let later = Tensor::ones([t, t], (Kind::Bool, q.device())).triu(1);
                let kept = scores.masked_fill(&later, f64::NEG_INFINITY).softmax(-1, sum_kind).to_kind(q.kind());
                let out = kept.matmul(&v).transpose(1, 2).contiguous().transpose(1, 2);
                Attended { out, kept }
            }
        }
    }

    /// Writes the gradients of queries, keys and values over dqkv, from those of the mixed values (b·t, n·d).
    pub fn backward(self, kernel: Kernel, qkv: &Tensor, attended: &Attended, dout: &Tensor, dqkv: &Tensor, num_seqs: i64) {
        let [q, k, v] = self.split(qkv, num_seqs);
        let (k, v) = (self.spread(&k), self.spread(&v));
        let dout = dout.view([num_seqs, -1, self.num_query, self.dim]).transpose(1, 2);
        let Attended { out, kept } = attended;
        let (dq, dk, dv) = match kernel {
            Kernel::FlashCpu => Tensor::internal_scaled_dot_product_flash_attention_for_cpu_backward(
                &dout, &q, &k, &v, out, kept, 0.0, true, None::<Tensor>, None,
            ),
            Kernel::Products => {
                let sum_kind = super::sum_kind(q.kind());
                let probabilities = kept.to_kind(sum_kind);
                let dprobabilities = dout.matmul(&v.transpose(2, 3)).to_kind(sum_kind);
                let dot = (&dprobabilities * &probabilities).sum_dim_intlist([-1i64].as_slice(), true, sum_kind);
                let dscores = (probabilities * (dprobabilities - dot) / (self.dim as f64).sqrt()).to_kind(q.kind());
                (dscores.matmul(&k), dscores.transpose(2, 3).matmul(&q), kept.transpose(2, 3).matmul(&dout))
            }
        };
        let [mut to_q, mut to_k, mut to_v] = self.split(dqkv, num_seqs);
        to_q.copy_(&dq);
        to_k.copy_(&self.gather(dk));
        to_v.copy_(&self.gather(dv));
    }
}
