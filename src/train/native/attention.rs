//! Attention among the kernels: one kernel on the CPU, a softmax between products on a GPU.

use tch::{Kind, Tensor};

use super::{
    kernels::Kernels,
    table::{BatchHeads, Heads},
};

impl Heads {
    /// What scores are multiplied with.
    pub fn scale(&self) -> f64 {
        1.0 / (self.dim as f64).sqrt()
    }
}

impl BatchHeads {
    /// How many elements queries, keys and values have together.
    fn qkv_len(&self) -> i64 {
        self.num_seqs * self.length * (self.heads.num_query + 2 * self.heads.num_key_value) * self.heads.dim
    }

    /// # Panics
    /// If heads cannot be cut so: groups are whole, and elements come in pairs.
    fn check(&self) {
        let Heads { num_query, num_key_value, dim } = self.heads;
        let is_whole = self.num_seqs > 0 && self.length > 0 && num_key_value > 0 && num_query % num_key_value == 0;
        assert!(is_whole && dim > 0 && dim % 2 == 0, "no heads for attention: {self:?}");
    }

    /// How many softmax sums there are.
    fn num_rows(&self) -> i64 {
        self.num_seqs * self.length * self.heads.num_query
    }
}

#[expect(unsafe_code, reason = "calls kernels")]
impl Kernels {
    /// Whether attention is one kernel. Else it is products, with `causal_softmax` between them.
    pub fn has_attention(&self) -> bool {
        self.table.attention.is_some()
    }

    /// How many bytes of memory attention works in.
    pub fn attention_bytes(&self, heads: &BatchHeads) -> i64 {
        // SAFETY: it computes a number.
        i64::from(self.threads) * unsafe { entry(self.table.attention_bytes)(heads.length, heads.heads.dim) }
    }

    /// Causal attention of queries, keys and values that lie side by side in the row of a token (n, (q + 2g)·d): mixed
    /// (n, q·d), and the logarithms of the softmax sums (seqs·q·t) in the sum kind.
    pub fn attention(&self, qkv: &Tensor, heads: &BatchHeads, scale: f64, out: (&Tensor, &Tensor), memory: &Tensor) {
        heads.check();
        let (mixed, log_sums) = out;
        let qkv = self.product(qkv, heads.qkv_len());
        let mixed = self.product(mixed, heads.num_rows() * heads.heads.dim);
        let log_sums = self.sum(log_sums, heads.num_rows());
        let memory = self.checked(memory, Kind::Uint8, self.attention_bytes(heads));
        // SAFETY: every tensor was checked to be contiguous, on the device, of its kind and of its length.
        unsafe { entry(self.table.attention)(self.threads, heads, qkv, scale, mixed, log_sums, memory) }
    }

    /// Writes the gradients of queries, keys and values over dqkv, from those of the mixed values.
    pub fn attention_backward(
        &self,
        (qkv, dmixed, log_sums): (&Tensor, &Tensor, &Tensor),
        heads: &BatchHeads,
        scale: f64,
        dqkv: &Tensor,
        memory: &Tensor,
    ) {
        heads.check();
        let [qkv, dqkv] = [qkv, dqkv].map(|x| self.product(x, heads.qkv_len()));
        let dmixed = self.product(dmixed, heads.num_rows() * heads.heads.dim);
        let log_sums = self.sum(log_sums, heads.num_rows());
        let memory = self.checked(memory, Kind::Uint8, self.attention_bytes(heads));
        // SAFETY: every tensor was checked to be contiguous, on the device, of its kind and of its length.
        unsafe {
            let backward = entry(self.table.attention_backward);
            backward(self.threads, heads, qkv, dmixed, log_sums, scale, dqkv, memory);
        }
    }

    /// probabilities = softmax(scale · scores), both (m, t, t): row i of a matrix sees its columns up to i. Scores in
    /// the sum kind, probabilities in the product kind.
    pub fn causal_softmax(&self, scores: &Tensor, scale: f64, probabilities: &Tensor) {
        let (matrices, width, _) = scores.size3().expect("square matrices");
        let rows = matrices * width;
        let (scores, probabilities) = (self.sum(scores, rows * width), self.product(probabilities, rows * width));
        // SAFETY: every tensor was checked to be contiguous, on the device, of its kind and of its length.
        unsafe { entry(self.table.causal_softmax)(self.threads, rows, width, scores, scale, probabilities) }
    }

    /// Replaces the gradients of probabilities by those of their scores, all (m, t, t) in the product kind.
    pub fn causal_softmax_backward(&self, probabilities: &Tensor, scale: f64, gradients: &Tensor) {
        let (matrices, width, _) = probabilities.size3().expect("square matrices");
        let rows = matrices * width;
        let [probabilities, gradients] = [probabilities, gradients].map(|tensor| self.product(tensor, rows * width));
        // SAFETY: every tensor was checked to be contiguous, on the device, of its kind and of its length.
        unsafe { entry(self.table.causal_softmax_backward)(self.threads, rows, width, probabilities, scale, gradients) }
    }
}

/// What not every table has.
///
/// # Panics
/// If this one has it not.
fn entry<F>(entry: Option<F>) -> F {
    entry.expect("attention is one kernel or a softmax between products, as `has_attention` says")
}
