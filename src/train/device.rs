//! The device of a run, and what its numerics depend on.

use tch::{Cuda, Device};

use super::{error::TrainError, native};
use crate::domain::{
    contract::Fingerprint,
    job::FailureKind,
    spec::{self, TrainSpec},
};

/// Sets libtorch up and picks the device. Must be called once, before anything else touches libtorch.
pub fn set_up(wanted: spec::Device, num_threads: Option<i32>) -> Result<Device, TrainError> {
    if wanted != spec::Device::Cpu {
        native::open_cuda();
    }
    tch::set_num_interop_threads(1);
    tch::set_num_threads(num_threads.unwrap_or_else(num_cores));
    match (wanted, wanted != spec::Device::Cpu && Cuda::is_available()) {
        (spec::Device::Cuda, false) => Err(TrainError::new(
            FailureKind::Infrastructure,
            "the job asks for a GPU, and libtorch finds none here; see the log for the reason",
        )),
        (_, true) => Ok(Device::Cuda(0)),
        (_, false) => Ok(Device::Cpu),
    }
}

/// The best device that libtorch finds, and the number of GPUs.
pub fn available() -> (spec::Device, i64) {
    native::open_cuda();
    match Cuda::is_available() {
        true => (spec::Device::Cuda, Cuda::device_count()),
        false => (spec::Device::Cpu, 0),
    }
}

fn num_cores() -> i32 {
    std::thread::available_parallelism().map_or(1, |cores| cores.get() as i32)
}

/// What must be equal for two runs to give the same bits.
///
/// On the CPU this is tested. On CUDA `deterministic` has not been measured: nothing here selects libtorch's
/// deterministic algorithms yet.
pub fn fingerprint(device: Device, spec: &TrainSpec) -> Fingerprint {
    let cpuinfo = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let field = |name: &str| {
        let line = cpuinfo.lines().find(|line| line.starts_with(name))?;
        line.split_once(':').map(|(_, value)| value.trim().to_owned())
    };
    // What libtorch and its BLAS choose kernels by.
    let flags = field("flags").unwrap_or_default();
    let used = ["avx2", "fma", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16"];
    let capability: Vec<_> = used.into_iter().filter(|used| flags.split(' ').any(|flag| flag == *used)).collect();
    Fingerprint {
        device: match device {
            Device::Cuda(index) => {
                format!("cuda ({})", native::gpu_name(index as i32).unwrap_or_else(|| "unnamed".into()))
            }
            _ => format!("cpu ({})", field("model name").unwrap_or_else(|| "unnamed".into())),
        },
        cpu_capability: capability.join(" "),
        num_threads: i64::from(tch::get_num_threads()),
        libtorch: env!("LIBTORCH_VERSION").into(),
        trainer: env!("CARGO_PKG_VERSION").into(),
        micro_batch_seqs: spec.batch.micro_batch_seqs,
    }
}
