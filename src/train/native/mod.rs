//! The only unsafe code: what reaches below tch. Each function is safe to call; who launches a `Graph` answers for the
//! memory that it was recorded over.

mod attention;
mod driver;
#[cfg(test)]
mod emulated_gpu;
mod gpu_table;
#[cfg(not(test))]
mod graph;
pub mod kernels;
#[cfg(not(test))]
mod module;
mod table;

use std::{
    ffi::c_void,
    fs::File,
    io,
    path::{Path, PathBuf},
    slice,
};

use memmap2::Mmap;
use tch::{Kind, Tensor};

pub use driver::Driver;
#[cfg(test)]
pub use emulated_gpu::Graph;
#[cfg(not(test))]
pub use graph::Graph;

/// Why no GPU can be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum NoCuda {
    /// As on any machine without a GPU.
    #[error("there is no NVIDIA driver")]
    NoDriver,
    /// There is a driver, and this keeps it from being used.
    #[error("{0}")]
    Broken(String),
}

/// Opens libtorch's CUDA half where it and a driver are, so that one executable serves both kinds of machine.
///
/// Must run before the first CUDA query: libtorch remembers the answer. The library is looked for beside the real
/// `libtorch_cpu.so` of this process; where it or one of its own libraries is missing, only the CPU can be used.
pub fn open_cuda() -> Result<(), NoCuda> {
    // Never closed: libtorch's libraries go on with what was begun in it.
    std::mem::forget(Driver::open()?);
    let Some(path) = loaded_library("libtorch_cpu.so").map(|path| path.with_file_name("libtorch_cuda.so")) else {
        return Err(NoCuda::Broken("libtorch_cpu.so is not among the libraries of this process".into()));
    };
    if !path.exists() {
        return Err(NoCuda::Broken(format!("there is a driver, and no {}: this libtorch has no CUDA", path.display())));
    }
    let flags = libloading::os::unix::RTLD_NOW | libloading::os::unix::RTLD_GLOBAL;
    // SAFETY: the library's initialisers are libtorch's own, of the same build as the loaded half.
    #[expect(unsafe_code, reason = "dlopen runs foreign initialisers")]
    let opened = unsafe { libloading::os::unix::Library::open(Some(&path), flags) };
    match opened {
        // Never closed: libtorch keeps pointers into it.
        Ok(library) => std::mem::forget(library),
        Err(error) => return Err(NoCuda::Broken(format!("{} cannot be opened: {error}", path.display()))),
    }
    Ok(())
}

/// Where a library that this process has loaded really lies, links resolved.
fn loaded_library(name: &str) -> Option<PathBuf> {
    let maps = std::fs::read_to_string("/proc/self/maps").ok()?;
    maps.lines()
        .filter_map(|line| line.find('/').map(|at| PathBuf::from(&line[at..])))
        .find(|path| path.ends_with(name))
}

#[expect(unsafe_code, reason = "context.cpp")]
unsafe extern "C" {
    fn relora_use_deterministic_algorithms();
    fn relora_page_locked(len: i64, scalar_type: i8) -> *mut c_void;
    fn relora_onednn_multiply(left: *const c_void, right: *const c_void, out: *const c_void, adds: i32) -> i32;
}

/// Lets libtorch's operations on a GPU take deterministic algorithms alone; one that has none panics. Must be called
/// before CUDA is used.
pub fn use_deterministic_algorithms() {
    // SAFETY: it sets flags, and a variable of the environment while this is the only thread.
    #[expect(unsafe_code, reason = "calls context.cpp")]
    unsafe {
        relora_use_deterministic_algorithms();
    }
}

/// Gives memory that was freed back to the system. The C library keeps it otherwise, in pieces that large tensors do not
/// fit in.
pub fn give_back_memory() {
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    {
        #[expect(unsafe_code, reason = "of the C library")]
        unsafe extern "C" {
            safe fn malloc_trim(pad: usize) -> i32;
        }
        malloc_trim(0);
    }
}

/// out = left · right, or with `adds` +=, by oneDNN, and whether it was done: on processors with AVX-512, of matrices in
/// fp32 in host memory, both of which lie there whole, as they are or transposed. libtorch multiplies them by MKL, which
/// is slower where it was measured (docs/performance.md); of parts of rows oneDNN makes copies, and then it is slower
/// itself. What oneDNN refuses is left as it was.
pub fn onednn_multiply(left: &Tensor, right: &Tensor, out: &Tensor, adds: bool) -> bool {
    let is_taken = |x: &Tensor| x.dim() == 2 && multiplies_by_onednn(x.kind(), x.device());
    let is_whole = |x: &Tensor| x.numel() > 0 && (x.is_contiguous() || x.tr().is_contiguous());
    if !([left, right, out].into_iter().all(is_taken) && is_whole(left) && is_whole(right)) {
        return false;
    }
    // SAFETY: tch's tensors are libtorch's, which checks their sizes.
    #[expect(unsafe_code, reason = "calls context.cpp")]
    unsafe {
        let [left, right, out] = [left, right, out].map(|x| x.as_ptr().cast::<c_void>());
        relora_onednn_multiply(left, right, out, i32::from(adds)) != 0
    }
}

/// Whether [`onednn_multiply`] takes matrices of this kind on this device, where they lie whole.
pub fn multiplies_by_onednn(kind: Kind, device: tch::Device) -> bool {
    kind == Kind::Float && device == tch::Device::Cpu && has_avx512()
}

/// What libtorch asks of a processor before it has oneDNN multiply.
fn has_avx512() -> bool {
    #[cfg(target_arch = "x86_64")]
    {
        is_x86_feature_detected!("avx512bw")
            && is_x86_feature_detected!("avx512vl")
            && is_x86_feature_detected!("avx512dq")
    }
    #[cfg(not(target_arch = "x86_64"))]
    false
}

/// A flat tensor of fp32 or Int64 in page-locked memory of the host, which a GPU reads and writes by itself. None where
/// there is no GPU, or no such memory left. What is in it is not defined.
///
/// # Panics
/// If it is asked for another kind.
pub fn page_locked(len: i64, kind: Kind) -> Option<Tensor> {
    let scalar_type = match kind {
        Kind::Int64 => 4,
        Kind::Float => 6,
        _ => panic!("page-locked memory is for fp32 and Int64, not {kind:?}"),
    };
    // SAFETY: the function throws nothing. What it returns is a tensor of libtorch's that nobody else owns.
    #[expect(unsafe_code, reason = "calls context.cpp")]
    unsafe {
        let tensor = relora_page_locked(len, scalar_type);
        (!tensor.is_null()).then(|| Tensor::from_ptr(tensor.cast()))
    }
}

/// Maps a file that nobody changes while it is mapped: token shards and state files are written once, under a
/// temporary name, and then renamed.
pub fn map_file(path: &Path) -> io::Result<Mmap> {
    let file = File::open(path)?;
    // SAFETY: see above; a file cut short from outside ends the process with SIGBUS, which fails the attempt.
    #[expect(unsafe_code, reason = "the kernel cannot promise that a file stays as it is")]
    unsafe {
        Mmap::map(&file)
    }
}

/// The bytes of a contiguous fp32 tensor in host memory.
///
/// # Panics
/// If the tensor is anything else.
pub fn host_bytes(tensor: &Tensor) -> &[u8] {
    assert!(
        tensor.device() == tch::Device::Cpu && tensor.kind() == Kind::Float && tensor.is_contiguous(),
        "only a contiguous fp32 tensor in host memory has bytes to write"
    );
    // SAFETY: the storage holds `numel` floats from `data_ptr` on and lives as long as the tensor that is borrowed.
    #[expect(unsafe_code, reason = "tch hands out no slices")]
    unsafe {
        slice::from_raw_parts(tensor.data_ptr().cast::<u8>(), tensor.numel() * size_of::<f32>())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn whole_matrices_in_fp32_are_multiplied_by_onednn_and_parts_of_rows_are_not() {
        let of = |rows, columns| Tensor::arange(rows * columns, (Kind::Float, tch::Device::Cpu)).view([rows, columns]);
        let (left, right) = (of(5, 3), of(4, 3));
        let rows = of(5, 6);
        for (out, adds) in
            [(of(5, 4), false), (of(5, 4), true), (rows.narrow(1, 1, 4), false), (rows.narrow(1, 1, 4), true)]
        {
            let want = left.mm(&right.tr()) + &out * f64::from(i32::from(adds));
            assert_eq!(onednn_multiply(&left, &right.tr(), &out, adds), has_avx512());
            assert!(out.equal(&want) || !has_avx512(), "{adds}");
        }
        let (first, double) = (rows.narrow(1, 0, 3), left.to_kind(Kind::Double));
        assert!(!onednn_multiply(&first, &right.tr(), &of(5, 4), false));
        assert!(!onednn_multiply(&double, &double.tr(), &of(5, 5), false));
        // Sizes that do not fit: for libtorch to refuse.
        assert!(!onednn_multiply(&left, &right, &of(5, 3), false));
    }
}
