//! The table of kernels for a GPU: every entry launches kernels of kernels.cu. `K` is the kind of products, as in
//! `kernels`: 0 fp32, 1 fp64, 2 bf16.

use std::{
    collections::HashMap,
    ffi::{CStr, c_void},
    sync::{Mutex, OnceLock, PoisonError},
};

use tch::{Device, Kind, Tensor};

#[cfg(test)]
use super::emulated_gpu::Module;
#[cfg(not(test))]
use super::module::Module;
use super::{
    NoCuda,
    table::{AdamwSettings, In, NUM_PARTIALS, Out, Table},
};

/// Threads of a block. The emulation gets along with few.
const THREADS: i64 = if cfg!(test) { 8 } else { 256 };
/// Chunks that a sum over rows is taken in, side by side.
const NUM_ROW_CHUNKS: i64 = 64;

static GPUS: [OnceLock<Gpu>; 3] = [OnceLock::new(), OnceLock::new(), OnceLock::new()];

pub static TABLES: [Table; 3] = [table::<0>(), table::<1>(), table::<2>()];

/// What launches kernels, and where what they compute with lies.
struct Gpu {
    module: Module,
    device: Device,
    sum_kind: Kind,
    /// For partial sums, by the number of columns: a recorded launch finds them where they were.
    partials: Mutex<HashMap<i64, Tensor>>,
}

impl Gpu {
    fn of<const K: usize>() -> &'static Self {
        GPUS[K].get().expect("the kernels were made ready")
    }

    /// Has kernels launched that leave partial sums of so many columns, and read them. Whoever is next writes over them on
    /// the same stream.
    fn with_partials(&self, width: i64, launch: impl FnOnce(Out)) {
        let mut partials = self.partials.lock().unwrap_or_else(PoisonError::into_inner);
        let options = (self.sum_kind, self.device);
        launch(partials.entry(width).or_insert_with(|| Tensor::empty([NUM_ROW_CHUNKS, width], options)).data_ptr());
    }
}

/// Compiles the kernels for products of the kind with this number, if that was not done yet.
pub fn make_ready(kind: usize, device: Device, sum_kind: Kind) -> Result<(), NoCuda> {
    if GPUS[kind].get().is_none() {
        let index = if let Device::Cuda(index) = device { index as i32 } else { 0 };
        let sum_type = if sum_kind == Kind::Double { "double" } else { "float" };
        let threads = THREADS.to_string();
        let macros = [
            ("PRODUCT_TYPE", ["float", "double", "bf16"][kind]),
            ("SUM_TYPE", sum_type),
            ("THREADS", threads.as_str()),
        ];
        let module = Module::compile(index, include_str!("kernels.cu"), &macros, THREADS as u32)?;
        let _ = GPUS[kind].set(Gpu { module, device, sum_kind, partials: Mutex::default() });
    }
    Ok(())
}

/// The addresses of a kernel's arguments.
macro_rules! arguments {
    ($($argument:expr),+) => { &mut [$((&raw const $argument).cast_mut().cast::<c_void>()),+] };
}

/// A block to each of so many rows, or chunks.
///
/// # Safety
/// As for `Module::launch`.
#[expect(unsafe_code, reason = "launches a kernel")]
unsafe fn over_rows<const K: usize>(kernel: &CStr, num_rows: i64, arguments: &mut [*mut c_void]) {
    if num_rows > 0 {
        let num_blocks = u32::try_from(num_rows).expect("fewer rows than a launch may have blocks");
        // SAFETY: the caller's.
        unsafe { Gpu::of::<K>().module.launch(kernel, num_blocks, arguments) }
    }
}

/// A thread to each of so many elements.
///
/// # Safety
/// As for `Module::launch`.
#[expect(unsafe_code, reason = "launches a kernel")]
unsafe fn over_elements<const K: usize>(kernel: &CStr, len: i64, arguments: &mut [*mut c_void]) {
    // SAFETY: the caller's.
    unsafe { over_rows::<K>(kernel, divided(len, THREADS), arguments) }
}

/// Rounded up.
fn divided(len: i64, by: i64) -> i64 {
    (len + by - 1) / by
}

const fn table<const K: usize>() -> Table {
    Table {
        rms_norm: entries::rms_norm::<K>,
        rms_norm_backward: entries::rms_norm_backward::<K>,
        rotate: entries::rotate::<K>,
        swiglu: entries::swiglu::<K>,
        swiglu_backward: entries::swiglu_backward::<K>,
        cross_entropy: entries::cross_entropy::<K>,
        embedding_backward: entries::embedding_backward::<K>,
        add_scaled: entries::add_scaled::<K>,
        add_scaled_int8: entries::add_scaled_int8::<K>,
        add_scaled_nf4: entries::add_scaled_nf4::<K>,
        accumulate: entries::accumulate::<K>,
        dropout: entries::dropout::<K>,
        adamw: entries::adamw::<K>,
        square_sum: entries::square_sum::<K>,
        attention_bytes: None,
        attention: None,
        attention_backward: None,
        causal_softmax: Some(entries::causal_softmax::<K>),
        causal_softmax_backward: Some(entries::causal_softmax_backward::<K>),
    }
}

/// What each takes is in kernels.h; the number of threads means nothing here. Every one is a launch with what its kernel
/// takes in kernels.cu, of which whoever calls it has checked the sizes.
#[expect(unsafe_code, unsafe_op_in_unsafe_fn, reason = "launches kernels")]
mod entries {
    use super::*;

    pub unsafe extern "C-unwind" fn rms_norm<const K: usize>(
        _: i32,
        rows: i64,
        width: i64,
        x: In,
        branch: In,
        weight: In,
        eps: f64,
        sum: Out,
        y: Out,
        rstd: Out,
    ) {
        over_rows::<K>(c"rms_norm", rows, arguments![width, x, branch, weight, eps, sum, y, rstd]);
    }

    pub unsafe extern "C-unwind" fn rms_norm_backward<const K: usize>(
        _: i32,
        rows: i64,
        width: i64,
        dy: In,
        x: In,
        rstd: In,
        weight: In,
        dx: Out,
        cast: Out,
        dweight: Out,
    ) {
        if !dweight.is_null() {
            let chunk_rows = divided(rows, NUM_ROW_CHUNKS).max(1);
            let num_chunks = divided(rows, chunk_rows);
            Gpu::of::<K>().with_partials(width, |partials| {
                let of_chunks = arguments![rows, width, chunk_rows, dy, x, rstd, partials];
                over_elements::<K>(c"rms_norm_weight", num_chunks * width, of_chunks);
                over_elements::<K>(c"add_rows", width, arguments![num_chunks, width, partials, dweight]);
            });
        }
        over_rows::<K>(c"rms_norm_backward", rows, arguments![width, dy, x, rstd, weight, dx, cast]);
    }

    pub unsafe extern "C-unwind" fn rotate<const K: usize>(
        _: i32,
        rows: i64,
        row_width: i64,
        sequence_length: i64,
        heads: i64,
        dim: i64,
        x: Out,
        cos: In,
        sin: In,
        backwards: i32,
    ) {
        let half = dim / 2;
        let arguments = arguments![rows, row_width, sequence_length, heads, half, x, cos, sin, backwards];
        over_elements::<K>(c"rotate", rows * heads * half, arguments);
    }

    pub unsafe extern "C-unwind" fn causal_softmax<const K: usize>(
        _: i32,
        rows: i64,
        width: i64,
        scores: In,
        scale: f64,
        probabilities: Out,
    ) {
        over_rows::<K>(c"causal_softmax", rows, arguments![width, scores, scale, probabilities]);
    }

    pub unsafe extern "C-unwind" fn causal_softmax_backward<const K: usize>(
        _: i32,
        rows: i64,
        width: i64,
        probabilities: In,
        scale: f64,
        gradients: Out,
    ) {
        over_rows::<K>(c"causal_softmax_backward", rows, arguments![width, probabilities, scale, gradients]);
    }

    pub unsafe extern "C-unwind" fn swiglu<const K: usize>(_: i32, rows: i64, width: i64, gate_up: In, product: Out) {
        over_elements::<K>(c"swiglu", rows * width, arguments![rows, width, gate_up, product]);
    }

    pub unsafe extern "C-unwind" fn swiglu_backward<const K: usize>(
        _: i32,
        rows: i64,
        width: i64,
        dproduct: In,
        gate_up: Out,
    ) {
        over_elements::<K>(c"swiglu_backward", rows * width, arguments![rows, width, dproduct, gate_up]);
    }

    pub unsafe extern "C-unwind" fn cross_entropy<const K: usize>(
        _: i32,
        rows: i64,
        vocab: i64,
        row_width: i64,
        logits: Out,
        targets: In,
        scale: f64,
        losses: Out,
    ) {
        over_rows::<K>(c"cross_entropy", rows, arguments![vocab, row_width, logits, targets, scale, losses]);
    }

    pub unsafe extern "C-unwind" fn embedding_backward<const K: usize>(
        _: i32,
        rows: i64,
        width: i64,
        ids: In,
        dx: In,
        dweight: Out,
    ) {
        over_rows::<K>(c"embedding_backward", rows, arguments![rows, width, ids, dx, dweight]);
    }

    pub unsafe extern "C-unwind" fn add_scaled<const K: usize>(
        _: i32,
        len: i64,
        from: In,
        delta: In,
        scale: f64,
        to: Out,
    ) {
        over_elements::<K>(c"add_scaled", len, arguments![len, from, delta, scale, to]);
    }

    pub unsafe extern "C-unwind" fn add_scaled_int8<const K: usize>(
        _: i32,
        rows: i64,
        width: i64,
        codes: In,
        scales: In,
        delta: In,
        scale: f64,
        to: Out,
    ) {
        let len = rows * width;
        over_elements::<K>(c"add_scaled_int8", len, arguments![len, width, codes, scales, delta, scale, to]);
    }

    pub unsafe extern "C-unwind" fn add_scaled_nf4<const K: usize>(
        _: i32,
        len: i64,
        codes: In,
        scales: In,
        levels: In,
        delta: In,
        scale: f64,
        to: Out,
    ) {
        over_elements::<K>(c"add_scaled_nf4", len, arguments![len, codes, scales, levels, delta, scale, to]);
    }

    pub unsafe extern "C-unwind" fn accumulate<const K: usize>(_: i32, len: i64, from: In, sum: Out) {
        over_elements::<K>(c"accumulate", len, arguments![len, from, sum]);
    }

    pub unsafe extern "C-unwind" fn dropout<const K: usize>(
        _: i32,
        rows: i64,
        width: i64,
        row_width: i64,
        sequence_length: i64,
        x: In,
        keep: f64,
        seed: u64,
        first_seq: u32,
        place: u32,
        adds: i32,
        to: Out,
    ) {
        let arguments = arguments![rows, width, row_width, sequence_length, x, keep, seed, first_seq, place, adds, to];
        over_elements::<K>(c"dropout", rows * divided(width, 4), arguments);
    }

    pub unsafe extern "C-unwind" fn adamw<const K: usize>(
        _: i32,
        len: i64,
        decayed_len: i64,
        value: Out,
        gradient: In,
        exp_avg: Out,
        exp_avg_sq: Out,
        settings: *const AdamwSettings,
    ) {
        let settings = *settings;
        let arguments = arguments![len, decayed_len, value, gradient, exp_avg, exp_avg_sq, settings];
        over_elements::<K>(c"adamw", len, arguments);
    }

    pub unsafe extern "C-unwind" fn square_sum<const K: usize>(_: i32, len: i64, x: In, partials: Out) {
        let chunk_len = divided(len, NUM_PARTIALS).max(1);
        over_rows::<K>(c"square_sum", divided(len, chunk_len), arguments![len, chunk_len, x, partials]);
    }
}
