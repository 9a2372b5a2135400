//! Attention as products with a softmax between them: for a GPU, and what the tests run beside the kernel.
//!
//! Shapes are those of `attention`.

use tch::{Device, Kind, Tensor};

use super::{Batch, scratch::Scratch, shared::copy};
use crate::train::{
    native::kernels::Heads,
    ops::{Ops, sum_kind},
};

/// Memory for one layer at a time.
pub struct Products {
    heads: Heads,
    /// In the sum kind: rounded to bf16, scores would put an error of some per cent on probabilities.
    scores: Scratch,
    exact: [Scratch; 2],
    /// Queries, keys, values and the gradient of what they are mixed to, each head's apart (b·n, t, d).
    apart: [Scratch; 4],
    dprobabilities: Scratch,
    mixed: Scratch,
}

impl Products {
    pub fn new(heads: Heads, products: (Kind, Device)) -> Self {
        let scratch = || Scratch::new(products);
        let sums = (sum_kind(products.0), products.1);
        Self {
            heads,
            scores: Scratch::new(sums),
            exact: [Scratch::new(sums), Scratch::new(sums)],
            apart: [scratch(), scratch(), scratch(), scratch()],
            dprobabilities: scratch(),
            mixed: scratch(),
        }
    }

    /// Mixes the values, into the rows of `mixed`, and leaves the probabilities (b·n, t, t).
    pub fn forward(&mut self, qkv: &Tensor, batch: &Batch, (mixed, probabilities): (&Tensor, &mut Scratch), ops: &Ops) {
        let heads = self.heads;
        let Heads { num_query, dim, .. } = heads;
        let (b, t) = (batch.num_seqs, batch.sequence_length);
        let rows = mixed.view([b, t, num_query, dim]);
        let [q, k, v] = heads.split(qkv, b);
        let [exact_q, exact_k] = &mut self.exact;
        let (q, k) = (heads.apart(&q, exact_q), heads.apart(&k, exact_k));
        let v = heads.apart(&v, &mut self.apart[2]);
        let scores = self.scores.take(&[b * num_query, t, t]);
        let _ = q.bmm_out(&scores, &k.transpose(1, 2));
        let probabilities = probabilities.take(&[b * num_query, t, t]);
        ops.causal_softmax(&scores, heads.scale(), &probabilities);
        let mixed = self.mixed.take(&[b * num_query, t, dim]);
        let _ = probabilities.bmm_out(&mixed, &v);
        copy(&mixed.view([b, num_query, t, dim]).transpose(1, 2), &rows);
    }

    /// Writes the gradients of queries, keys and values over dqkv.
    pub fn backward(
        &mut self,
        (qkv, dout, probabilities): (&Tensor, &Tensor, &mut Scratch),
        batch: &Batch,
        dqkv: &Tensor,
        ops: &Ops,
    ) {
        let heads = self.heads;
        let Heads { num_query, dim, .. } = heads;
        let (b, t) = (batch.num_seqs, batch.sequence_length);
        let [q, k, v] = heads.split(qkv, b);
        let dout = dout.view([b, t, num_query, dim]).transpose(1, 2);
        let [to_q, to_k, to_v] = heads.split(dqkv, b);
        let [apart_q, apart_k, apart_v, apart_dout] = &mut self.apart;
        let [q, k, v, dout] = [(q, apart_q), (k, apart_k), (v, apart_v), (dout, apart_dout)]
            .map(|(of_all, scratch)| heads.apart(&of_all, scratch));
        let probabilities = probabilities.take(&[b * num_query, t, t]);
        let dscores = self.dprobabilities.take(&[b * num_query, t, t]);
        let _ = dout.bmm_out(&dscores, &v.transpose(1, 2));
        ops.causal_softmax_backward(&probabilities, heads.scale(), &dscores);
        let mixed = self.mixed.take(&[b * num_query, t, dim]);
        let by_head = mixed.view([b, num_query, t, dim]);
        let _ = probabilities.transpose(1, 2).bmm_out(&mixed, &dout);
        heads.gather(&by_head, &to_v);
        let _ = dscores.transpose(1, 2).bmm_out(&mixed, &q);
        heads.gather(&by_head, &to_k);
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
