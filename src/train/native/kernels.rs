//! The fused kernels, of the CPU (kernels.cpp) and of a GPU (kernels.cu), each behind a function that checks what it is
//! given.
//!
//! In shapes: n rows (the tokens of a micro-batch), w elements of a row. "Sum kind" is fp32, or fp64 where products are
//! in fp64; "product kind" is what matrix products read and write.

use tch::{Device, Kind, Tensor};

use super::{
    NoCuda, gpu_table,
    table::{self, In, NUM_PARTIALS, Out, Table},
};
use crate::train::random::Purpose;

pub use super::table::{AdamwSettings, BatchHeads, Heads};

/// Where the rows of a micro-batch stand in the run, which is what their dropout masks depend on.
#[derive(Debug, Clone, Copy)]
pub struct MaskPlace {
    pub seed: i64,
    pub first_seq: i64,
    /// Of the matrix whose input is masked, among all of the model.
    pub matrix: i64,
    pub sequence_length: i64,
}

/// The kernels for one kind of element, over tensors that lie on one device.
pub struct Kernels {
    pub(super) table: &'static Table,
    /// Of the CPU.
    pub(super) threads: i32,
    device: Device,
    product_kind: Kind,
    sum_kind: Kind,
}

#[expect(unsafe_code, reason = "calls kernels.cpp")]
impl Kernels {
    /// Those of the CPU, on this many threads.
    ///
    /// # Panics
    /// If products of this kind are not known: they are fp32, fp64 or bf16.
    pub fn new(product_kind: Kind, threads: i32) -> Self {
        let best = table::of_every_set().pop().expect("an instruction set");
        Self::of(best, product_kind, threads)
    }

    /// Those of every instruction set that there is here.
    #[cfg(test)]
    pub fn of_every_set(product_kind: Kind, threads: i32) -> Vec<Self> {
        table::of_every_set().into_iter().map(|tables| Self::of(tables, product_kind, threads)).collect()
    }

    fn of(tables: &'static [Table; 3], product_kind: Kind, threads: i32) -> Self {
        let (index, sum_kind) = kinds(product_kind);
        Self { table: &tables[index], threads, device: Device::Cpu, product_kind, sum_kind }
    }

    /// Those of a GPU, which are compiled for it now. In tests the device is the CPU, and the kernels are emulated.
    ///
    /// # Panics
    /// As `new`.
    pub fn on_gpu(product_kind: Kind, device: Device) -> Result<Self, NoCuda> {
        let (index, sum_kind) = kinds(product_kind);
        gpu_table::make_ready(index, device, sum_kind)?;
        Ok(Self { table: &gpu_table::TABLES[index], threads: 0, device, product_kind, sum_kind })
    }

    /// y = x / rms(x) · weight and rstd = 1 / rms(x), after sum = x + branch where there is a branch.
    ///
    /// x, sum (n, w), weight (w) and rstd (n) in the sum kind; branch, y (n, w) in the product kind.
    pub fn rms_norm(
        &self,
        x: &Tensor,
        branch: Option<(&Tensor, &Tensor)>,
        weight: &Tensor,
        eps: f64,
        out: (&Tensor, &Tensor),
    ) {
        let (rows, width) = self.rows(x, self.sum_kind);
        let (y, rstd) = out;
        let (branch, sum) = match branch {
            Some((branch, sum)) => (self.product(branch, rows * width), self.sum(sum, rows * width)),
            None => (std::ptr::null_mut(), std::ptr::null_mut()),
        };
        let (weight, y, rstd) = (self.sum(weight, width), self.product(y, rows * width), self.sum(rstd, rows));
        // SAFETY: every tensor was checked to be contiguous, on the device, of its kind and of its length.
        unsafe { (self.table.rms_norm)(self.threads, rows, width, x.data_ptr(), branch, weight, eps, sum, y, rstd) }
    }

    /// dx += the gradient through the norm, dweight += the weight's; `cast` receives dx in the product kind.
    pub fn rms_norm_backward(
        &self,
        dy: &Tensor,
        norm: (&Tensor, &Tensor, &Tensor),
        dx: &Tensor,
        cast: Option<&Tensor>,
        dweight: Option<&Tensor>,
    ) {
        let (x, rstd, weight) = norm;
        let (rows, width) = self.rows(x, self.sum_kind);
        let dy = self.product(dy, rows * width);
        let (rstd, weight, dx) = (self.sum(rstd, rows), self.sum(weight, width), self.sum(dx, rows * width));
        let cast = cast.map_or(std::ptr::null_mut(), |cast| self.product(cast, rows * width));
        let dweight = dweight.map_or(std::ptr::null_mut(), |dweight| self.sum(dweight, width));
        // SAFETY: as in `rms_norm`.
        unsafe {
            (self.table.rms_norm_backward)(
                self.threads,
                rows,
                width,
                dy,
                x.data_ptr(),
                rstd,
                weight,
                dx,
                cast,
                dweight,
            );
        }
    }

    /// Turns the first `heads` heads of every row of x (n, w) in place, or back. cos and sin are (positions, dim / 2).
    pub fn rotate(
        &self,
        x: &Tensor,
        heads: i64,
        cos_sin: (&Tensor, &Tensor),
        sequence_length: i64,
        is_backwards: bool,
    ) {
        let (rows, width) = self.rows(x, self.product_kind);
        let (cos, sin) = cos_sin;
        let half = cos.size()[1];
        assert!(
            heads * 2 * half <= width && cos.size()[0] >= sequence_length.min(rows),
            "heads or positions do not fit"
        );
        let (cos, sin) = (self.sum(cos, cos.numel() as i64), self.sum(sin, cos.numel() as i64));
        // SAFETY: as in `rms_norm`; a row's position is below the sequence length.
        unsafe {
            (self.table.rotate)(
                self.threads,
                rows,
                width,
                sequence_length,
                heads,
                2 * half,
                x.data_ptr(),
                cos,
                sin,
                i32::from(is_backwards),
            );
        }
    }

    /// product (n, w) = silu(gate) · up, of rows that hold a gate and then an up (n, 2w).
    pub fn swiglu(&self, gate_up: &Tensor, product: &Tensor) {
        let (rows, width) = self.rows(product, self.product_kind);
        let gate_up = self.product(gate_up, 2 * rows * width);
        // SAFETY: as in `rms_norm`.
        unsafe { (self.table.swiglu)(self.threads, rows, width, gate_up, product.data_ptr()) }
    }

    /// Replaces gate and up (n, 2w) by their gradients.
    pub fn swiglu_backward(&self, dproduct: &Tensor, gate_up: &Tensor) {
        let (rows, width) = self.rows(dproduct, self.product_kind);
        let gate_up = self.product(gate_up, 2 * rows * width);
        // SAFETY: as in `rms_norm`.
        unsafe { (self.table.swiglu_backward)(self.threads, rows, width, dproduct.data_ptr(), gate_up) }
    }

    /// losses (n) = the cross-entropy of logits (n, w), of which the first `vocab` columns count. With a scale, the
    /// logits are replaced by their gradients times it.
    ///
    /// # Panics
    /// If a target is outside the vocabulary.
    pub fn cross_entropy(&self, logits: &Tensor, vocab: i64, targets: &Tensor, scale: Option<f64>, losses: &Tensor) {
        let (rows, width) = self.rows(logits, self.product_kind);
        assert!(vocab <= width, "{vocab} logits in rows of {width}");
        let targets = self.indices(targets, rows, vocab);
        let losses = self.sum(losses, rows);
        // SAFETY: as in `rms_norm`; targets are inside the vocabulary.
        unsafe {
            let scale = scale.unwrap_or(0.0);
            (self.table.cross_entropy)(self.threads, rows, vocab, width, logits.data_ptr(), targets, scale, losses);
        }
    }

    /// dweight[ids[i]] += dx[i], of dx (n, w) and dweight (v, w) in the sum kind.
    pub fn embedding_backward(&self, ids: &Tensor, dx: &Tensor, dweight: &Tensor) {
        let (rows, width) = self.rows(dx, self.sum_kind);
        let (vocab, _) = self.rows(dweight, self.sum_kind);
        let ids = self.indices(ids, rows, vocab);
        let dweight = self.sum(dweight, vocab * width);
        // SAFETY: as in `rms_norm`; ids are inside the vocabulary.
        unsafe { (self.table.embedding_backward)(self.threads, rows, width, ids, dx.data_ptr(), dweight) }
    }

    /// to = from + scale · delta: from in the sum kind, the others in the product kind.
    pub fn add_scaled(&self, from: &Tensor, delta: &Tensor, scale: f64, to: &Tensor) {
        let len = from.numel() as i64;
        let (from, delta, to) = (self.sum(from, len), self.product(delta, len), self.product(to, len));
        // SAFETY: as in `rms_norm`.
        unsafe { (self.table.add_scaled)(self.threads, len, from, delta, scale, to) }
    }

    /// to = codes · scales + scale · delta: codes (n, w) in int8, scales (n) in the sum kind.
    pub fn add_scaled_int8(&self, (codes, scales): (&Tensor, &Tensor), delta: &Tensor, scale: f64, to: &Tensor) {
        let (rows, width) = self.rows(codes, Kind::Int8);
        let (scales, len) = (self.sum(scales, rows), rows * width);
        let (delta, to) = (self.product(delta, len), self.product(to, len));
        // SAFETY: as in `rms_norm`.
        unsafe { (self.table.add_scaled_int8)(self.threads, rows, width, codes.data_ptr(), scales, delta, scale, to) }
    }

    /// to = levels[codes] · scales + scale · delta: two codes a byte, a scale for every 64 elements, 16 levels.
    pub fn add_scaled_nf4(
        &self,
        (codes, scales, levels): (&Tensor, &Tensor, &Tensor),
        delta: &Tensor,
        scale: f64,
        to: &Tensor,
    ) {
        let len = delta.numel() as i64;
        let codes = self.checked(codes, Kind::Uint8, (len + 1) / 2);
        let (scales, levels) = (self.sum(scales, (len + 63) / 64), self.sum(levels, 16));
        let (delta, to) = (self.product(delta, len), self.product(to, len));
        // SAFETY: as in `rms_norm`.
        unsafe { (self.table.add_scaled_nf4)(self.threads, len, codes, scales, levels, delta, scale, to) }
    }

    /// sum += from.
    pub fn accumulate(&self, from: &Tensor, sum: &Tensor) {
        let len = from.numel() as i64;
        let (from, sum) = (self.product(from, len), self.sum(sum, len));
        // SAFETY: as in `rms_norm`.
        unsafe { (self.table.accumulate)(self.threads, len, from, sum) }
    }

    /// to = x · mask / keep, or with `adds` to += it; x and to (n, w) in the product kind, of which the first `width`
    /// columns count.
    pub fn dropout(&self, (x, width): (&Tensor, i64), keep: f64, place: MaskPlace, adds: bool, to: &Tensor) {
        let (rows, row_width) = self.rows(x, self.product_kind);
        assert!(width <= row_width, "{width} columns in rows of {row_width}");
        let to = self.product(to, rows * row_width);
        let MaskPlace { seed, first_seq, matrix, sequence_length } = place;
        // SAFETY: as in `rms_norm`.
        unsafe {
            (self.table.dropout)(
                self.threads,
                rows,
                width,
                row_width,
                sequence_length,
                x.data_ptr(),
                keep,
                (Purpose::Dropout as u64) << 32 | seed as u64 & 0xffff_ffff,
                first_seq as u32,
                matrix as u32,
                i32::from(adds),
                to,
            );
        }
    }

    /// One update of AdamW over flat buffers in the sum kind; weight decay ends at `decayed_len`.
    pub fn adamw(
        &self,
        [value, gradient, exp_avg, exp_avg_sq]: [&Tensor; 4],
        decayed_len: i64,
        settings: &AdamwSettings,
    ) {
        let len = value.numel() as i64;
        assert!(decayed_len <= len, "{decayed_len} of {len} elements decay");
        let [value, gradient, exp_avg, exp_avg_sq] = [value, gradient, exp_avg, exp_avg_sq].map(|t| self.sum(t, len));
        // SAFETY: as in `rms_norm`.
        unsafe { (self.table.adamw)(self.threads, len, decayed_len, value, gradient, exp_avg, exp_avg_sq, settings) }
    }

    /// The sum of squares of a buffer in the sum kind, in fp64 on the device.
    pub fn square_sum(&self, x: &Tensor) -> Tensor {
        let partials = Tensor::zeros([NUM_PARTIALS], (Kind::Double, self.device));
        let len = x.numel() as i64;
        // SAFETY: as in `rms_norm`; there is room for as many partial sums as any table writes.
        unsafe { (self.table.square_sum)(self.threads, len, self.sum(x, len), partials.data_ptr()) };
        partials.sum(Kind::Double)
    }

    /// Rows and width of a matrix of this kind.
    fn rows(&self, x: &Tensor, kind: Kind) -> (i64, i64) {
        let (rows, width) = x.size2().expect("a matrix");
        self.checked(x, kind, rows * width);
        (rows, width)
    }

    pub(super) fn sum(&self, x: &Tensor, len: i64) -> Out {
        self.checked(x, self.sum_kind, len)
    }

    pub(super) fn product(&self, x: &Tensor, len: i64) -> Out {
        self.checked(x, self.product_kind, len)
    }

    /// The address of a tensor that a kernel may read and write.
    ///
    /// # Panics
    /// If it is of another kind or length, not contiguous, or on another device.
    pub(super) fn checked(&self, x: &Tensor, kind: Kind, len: i64) -> Out {
        let is_usable = x.device() == self.device && x.kind() == kind && x.is_contiguous() && x.numel() as i64 == len;
        assert!(is_usable, "a kernel wants {len} contiguous elements of {kind:?} on {:?}, not {x:?}", self.device);
        x.data_ptr()
    }

    /// The address of this many indices, all of them below `bound`. Those on a GPU are not looked at, which would have to
    /// wait for it: what was read of a dataset is in range.
    fn indices(&self, x: &Tensor, len: i64, bound: i64) -> In {
        let address = self.checked(x, Kind::Int64, len).cast::<i64>();
        if self.device == Device::Cpu {
            // SAFETY: `checked` found so many integers there.
            let values = unsafe { std::slice::from_raw_parts(address, len as usize) };
            assert!(values.iter().all(|&value| (0..bound).contains(&value)), "an index is outside of 0..{bound}");
        }
        address.cast()
    }
}

/// The number of a kind of products among the tables, and the kind of its sums.
fn kinds(product_kind: Kind) -> (usize, Kind) {
    match product_kind {
        Kind::Float => (0, Kind::Float),
        Kind::Double => (1, Kind::Double),
        Kind::BFloat16 => (2, Kind::Float),
        other => panic!("there are no kernels for {other:?}"),
    }
}
