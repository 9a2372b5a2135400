//! The table of kernels, as kernels.h has it, and those of the CPU: kernels.cpp, compiled once per instruction set.

use std::ffi::c_void;

/// The settings of one AdamW update; corrections are 1 - beta^t.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct AdamwSettings {
    pub learning_rate: f64,
    pub beta1: f64,
    pub beta2: f64,
    pub eps: f64,
    pub weight_decay: f64,
    pub correction1: f64,
    pub correction2: f64,
    pub gradient_scale: f64,
}

/// How the heads of a model are cut: several of the queries may share one of keys and values.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct Heads {
    pub num_query: i64,
    pub num_key_value: i64,
    pub dim: i64,
}

/// `relora_heads` of kernels.h: those of a micro-batch.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct BatchHeads {
    pub num_seqs: i64,
    pub length: i64,
    pub heads: Heads,
}

/// How many partial sums a table may leave of a sum over elements.
pub const NUM_PARTIALS: i64 = 1_024;

pub(super) type In = *const c_void;
pub(super) type Out = *mut c_void;

/// `relora_kernels` of kernels.h.
#[repr(C)]
pub(super) struct Table {
    pub rms_norm: unsafe extern "C-unwind" fn(i32, i64, i64, In, In, In, f64, Out, Out, Out),
    pub rms_norm_backward: unsafe extern "C-unwind" fn(i32, i64, i64, In, In, In, In, Out, Out, Out),
    pub rotate: unsafe extern "C-unwind" fn(i32, i64, i64, i64, i64, i64, Out, In, In, i32),
    pub swiglu: unsafe extern "C-unwind" fn(i32, i64, i64, In, Out),
    pub swiglu_backward: unsafe extern "C-unwind" fn(i32, i64, i64, In, Out),
    pub cross_entropy: unsafe extern "C-unwind" fn(i32, i64, i64, i64, Out, In, f64, Out),
    pub embedding_backward: unsafe extern "C-unwind" fn(i32, i64, i64, In, In, Out),
    pub add_scaled: unsafe extern "C-unwind" fn(i32, i64, In, In, f64, Out),
    pub add_scaled_int8: unsafe extern "C-unwind" fn(i32, i64, i64, In, In, In, f64, Out),
    pub add_scaled_nf4: unsafe extern "C-unwind" fn(i32, i64, In, In, In, In, f64, Out),
    pub accumulate: unsafe extern "C-unwind" fn(i32, i64, In, Out),
    pub dropout: unsafe extern "C-unwind" fn(i32, i64, i64, i64, i64, In, f64, u64, u32, u32, i32, Out),
    pub adamw: unsafe extern "C-unwind" fn(i32, i64, i64, Out, In, Out, Out, *const AdamwSettings),
    pub square_sum: unsafe extern "C-unwind" fn(i32, i64, In, Out),
    /// Of the CPU: attention as a whole. Every thread has so many bytes of memory.
    pub attention_bytes: Option<unsafe extern "C-unwind" fn(i64, i64) -> i64>,
    pub attention: Option<unsafe extern "C-unwind" fn(i32, *const BatchHeads, In, f64, Out, Out, Out)>,
    pub attention_backward: Option<unsafe extern "C-unwind" fn(i32, *const BatchHeads, In, In, In, f64, Out, Out)>,
    /// Of a GPU, where attention is products: what lies between them.
    pub causal_softmax: Option<unsafe extern "C-unwind" fn(i32, i64, i64, In, f64, Out)>,
    pub causal_softmax_backward: Option<unsafe extern "C-unwind" fn(i32, i64, i64, In, f64, Out)>,
}

#[expect(unsafe_code, reason = "kernels.cpp, compiled once per instruction set")]
unsafe extern "C" {
    fn relora_kernels_baseline() -> *const [Table; 3];
    #[cfg(target_arch = "x86_64")]
    fn relora_kernels_avx2() -> *const [Table; 3];
    #[cfg(target_arch = "x86_64")]
    fn relora_kernels_avx512() -> *const [Table; 3];
    #[cfg(target_arch = "x86_64")]
    fn relora_kernels_avx512_bf16() -> *const [Table; 3];
}

/// The tables for float, double and bf16 of every instruction set that this processor has, the best at the end.
pub(super) fn of_every_set() -> Vec<&'static [Table; 3]> {
    // SAFETY: each function returns the address of a constant; a table's code runs only where its instructions exist.
    #[expect(unsafe_code, reason = "calls kernels.cpp")]
    unsafe {
        let mut tables = vec![&*relora_kernels_baseline()];
        #[cfg(target_arch = "x86_64")]
        {
            let has_v3 = is_x86_feature_detected!("avx2")
                && is_x86_feature_detected!("fma")
                && is_x86_feature_detected!("bmi2")
                && is_x86_feature_detected!("f16c");
            let has_v4 = has_v3
                && is_x86_feature_detected!("avx512f")
                && is_x86_feature_detected!("avx512bw")
                && is_x86_feature_detected!("avx512cd")
                && is_x86_feature_detected!("avx512dq")
                && is_x86_feature_detected!("avx512vl");
            if has_v3 {
                tables.push(&*relora_kernels_avx2());
            }
            if has_v4 {
                tables.push(&*relora_kernels_avx512());
            }
            if has_v4 && is_x86_feature_detected!("avx512bf16") {
                tables.push(&*relora_kernels_avx512_bf16());
            }
        }
        tables
    }
}
