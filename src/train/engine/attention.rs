//! Causal self-attention over the queries, keys and values of a micro-batch, forward and backward.
//!
//! In shapes: b sequences, t positions, n query heads, g key and value heads, d elements of a head. Queries, keys and
//! values of a token lie side by side: (b·t, (n + 2g)·d).

use tch::{Device, Kind, Tensor};

use super::{Batch, scratch::Scratch, shared::copy};
use crate::train::ops::{Ops, sum_kind};

/// How the heads of a model are cut.
#[derive(Debug, Clone, Copy)]
pub struct Heads {
    pub num_query: i64,
    pub num_key_value: i64,
    pub dim: i64,
}

pub struct Attention {
    heads: Heads,
    /// Sequences longer than this go through libtorch's flash attention.
    max_products_length: i64,
    /// In the sum kind: rounded to bf16, scores would put an error of some per cent on probabilities.
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
    probabilities: Scratch,
    /// Of flash attention: what it mixed (b, n, t, d), and the logarithms of the softmax sums.
    flash: Option<(Tensor, Tensor)>,
}

impl Attended {
    pub fn new(products: (Kind, Device)) -> Self {
        Self { rows: Scratch::new(products), probabilities: Scratch::new(products), flash: None }
    }

    pub fn rows(&mut self, shape: &[i64]) -> Tensor {
        self.rows.take(shape)
    }
}

impl Attention {
    pub fn new(heads: Heads, max_products_length: i64, products: (Kind, Device)) -> Self {
        let scratch = || Scratch::new(products);
        let sums = (sum_kind(products.0), products.1);
        Self {
            heads,
            // Flash attention as it is called here is that of the CPU.
            max_products_length: if products.1 == Device::Cpu { max_products_length } else { i64::MAX },
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

    fn is_flash(&self, batch: &Batch) -> bool {
        batch.sequence_length > self.max_products_length
    }

    fn scale(&self) -> f64 {
        1.0 / (self.heads.dim as f64).sqrt()
    }

    /// Mixes the values, into the rows of `kept`.
    pub fn forward(&mut self, qkv: &Tensor, batch: &Batch, kept: &mut Attended, ops: &Ops) {
        let Heads { num_query, dim, .. } = self.heads;
        let (b, t) = (batch.num_seqs, batch.sequence_length);
        let rows = kept.rows.take(&[b * t, num_query * dim]).view([b, t, num_query, dim]);
        let [q, k, v] = self.heads.split(qkv, b);
        if self.is_flash(batch) {
            kept.flash = None;
            let (k, v) = (self.heads.spread(&k).flatten(1, 2), self.heads.spread(&v).flatten(1, 2));
            let (out, log_sums) = Tensor::internal_scaled_dot_product_flash_attention_for_cpu(
                &q,
                &k,
                &v,
                0.0,
                true,
                None::<Tensor>,
                None,
            );
            copy(&out.transpose(1, 2), &rows);
            kept.flash = Some((out, log_sums));
            return;
        }
        let [exact_q, exact_k] = &mut self.exact;
        let (q, k) = (self.heads.apart(&q, exact_q), self.heads.apart(&k, exact_k));
        let v = self.heads.apart(&v, &mut self.apart[2]);
        let scores = self.scores.take(&[b * num_query, t, t]);
        let _ = q.bmm_out(&scores, &k.transpose(1, 2));
        let probabilities = kept.probabilities.take(&[b * num_query, t, t]);
        let scale = self.scale();
        ops.causal_softmax(&scores, scale, &probabilities);
        let mixed = self.mixed.take(&[b * num_query, t, dim]);
        let _ = probabilities.bmm_out(&mixed, &v);
        copy(&mixed.view([b, num_query, t, dim]).transpose(1, 2), &rows);
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
        let Heads { num_query, dim, .. } = self.heads;
        let (b, t) = (batch.num_seqs, batch.sequence_length);
        let [q, k, v] = self.heads.split(qkv, b);
        let dout = dout.view([b, t, num_query, dim]).transpose(1, 2);
        let [to_q, to_k, to_v] = self.heads.split(dqkv, b);
        if let Some((out, log_sums)) = kept.flash.take() {
            let (k, v) = (self.heads.spread(&k).flatten(1, 2), self.heads.spread(&v).flatten(1, 2));
            let (dq, dk, dv) = Tensor::internal_scaled_dot_product_flash_attention_for_cpu_backward(
                &dout,
                &q,
                &k,
                &v,
                &out,
                &log_sums,
                0.0,
                true,
                None::<Tensor>,
                None,
            );
            copy(&dq, &to_q);
            self.heads.gather(&dk, &to_k);
            self.heads.gather(&dv, &to_v);
            return;
        }
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
