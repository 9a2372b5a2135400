//! The only unsafe code: what reaches below tch. Each function is safe to call.

pub mod kernels;

use std::{ffi::CStr, fs::File, io, path::Path, path::PathBuf, slice};

use memmap2::Mmap;
use tch::{Kind, Tensor};

/// The CUDA driver: without it no GPU can be used.
const DRIVER: &str = "libcuda.so.1";

/// Opens libtorch's CUDA half where it and a driver are, so that one executable serves both kinds of machine.
///
/// Must run before the first CUDA query: libtorch remembers the answer. The library is looked for beside the real
/// `libtorch_cpu.so` of this process; where it or one of its own libraries is missing, only the CPU can be used.
pub fn open_cuda() {
    let Some(path) = loaded_library("libtorch_cpu.so").map(|path| path.with_file_name("libtorch_cuda.so")) else {
        return;
    };
    let flags = libloading::os::unix::RTLD_NOW | libloading::os::unix::RTLD_GLOBAL;
    // SAFETY: the libraries' initialisers are the driver's, and libtorch's own of the same build as the loaded half.
    #[expect(unsafe_code, reason = "dlopen runs foreign initialisers")]
    let opened = unsafe {
        if !path.exists() || libloading::Library::new(DRIVER).is_err() {
            return;
        }
        libloading::os::unix::Library::open(Some(&path), flags)
    };
    match opened {
        // Never closed: libtorch keeps pointers into it.
        Ok(library) => std::mem::forget(library),
        Err(error) => tracing::warn!(library.path = %path.display(), %error, "libtorch_cuda cannot be opened"),
    }
}

/// Where a library that this process has loaded really lies, links resolved.
fn loaded_library(name: &str) -> Option<PathBuf> {
    let maps = std::fs::read_to_string("/proc/self/maps").ok()?;
    maps.lines()
        .filter_map(|line| line.find('/').map(|at| PathBuf::from(&line[at..])))
        .find(|path| path.ends_with(name))
}

/// The name of a GPU, as the driver gives it.
pub fn gpu_name(index: i32) -> Option<String> {
    type Status = i32;
    let mut device = 0i32;
    let mut name = [0u8; 128];
    // SAFETY: the signatures are the CUDA driver API's, stable since its first version; the buffer's length is passed.
    #[expect(unsafe_code, reason = "calls the CUDA driver")]
    unsafe {
        let driver = libloading::Library::new(DRIVER).ok()?;
        let init: libloading::Symbol<'_, unsafe extern "C" fn(u32) -> Status> = driver.get(b"cuInit\0").ok()?;
        let get: libloading::Symbol<'_, unsafe extern "C" fn(*mut i32, i32) -> Status> =
            driver.get(b"cuDeviceGet\0").ok()?;
        let get_name: libloading::Symbol<'_, unsafe extern "C" fn(*mut u8, i32, i32) -> Status> =
            driver.get(b"cuDeviceGetName\0").ok()?;
        if init(0) != 0 || get(&mut device, index) != 0 || get_name(name.as_mut_ptr(), name.len() as i32, device) != 0 {
            return None;
        }
    }
    CStr::from_bytes_until_nul(&name).ok().map(|name| name.to_string_lossy().into_owned())
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
