//! The device of a run, and what its numerics depend on.

use std::{
    panic::{AssertUnwindSafe, catch_unwind},
    time::{Duration, Instant},
};

use tch::{Cuda, Device, Kind, Tensor};

use super::{
    error::TrainError,
    host_memory,
    native::{self, Driver, NoCuda},
    ops::OpsChoice,
};
use crate::domain::{
    contract::{Fingerprint, Numerics, Probe},
    job::FailureKind,
    offer::Offer,
    spec::{self, Choices},
};

/// How long products are timed in both precisions, but for the time of the first few.
const MEASURED_FOR: Duration = Duration::from_millis(30);
const LEAST_PRODUCTS: usize = 3;

/// Sets libtorch up and picks the device. Must be called once, before anything else touches libtorch.
pub fn set_up(wanted: spec::Device, num_threads: Option<i32>) -> Result<Device, TrainError> {
    let cuda = (wanted != spec::Device::Cpu).then(open_cuda);
    tch::set_num_interop_threads(1);
    tch::set_num_threads(num_threads.unwrap_or_else(num_cores));
    match (wanted, cuda) {
        (_, Some(Ok(()))) => Ok(Device::Cuda(0)),
        (spec::Device::Cuda, Some(Err(reason))) => {
            let message = format!("the job asks for a GPU, and this machine offers none: {reason}");
            Err(TrainError::new(FailureKind::Infrastructure, message))
        }
        (_, Some(Err(NoCuda::Broken(reason)))) => {
            tracing::warn!(reason, "no GPU can be used here; the CPU trains");
            Ok(Device::Cpu)
        }
        (_, Some(Err(NoCuda::NoDriver)) | None) => Ok(Device::Cpu),
    }
}

/// What a job finds here: the best device that libtorch can use, and how it does.
pub fn probe(ops: OpsChoice) -> Probe {
    let (device, num_gpus, gpu_problem) = match open_cuda() {
        Ok(()) => (Device::Cuda(0), Cuda::device_count(), None),
        Err(NoCuda::NoDriver) => (Device::Cpu, 0, None),
        Err(NoCuda::Broken(reason)) => (Device::Cpu, 0, Some(reason)),
    };
    // Threads that wait for each other on a busy machine would be what is measured.
    tch::set_num_threads(1);
    let offer =
        Offer { device: kind(device), num_gpus, memory_bytes: total_bytes(device), bf16_speedup: bf16_speedup(device) };
    Probe { offer, numerics: numerics(device, ops), gpu_problem }
}

/// Makes libtorch see the GPUs, or says why it does not.
fn open_cuda() -> Result<(), NoCuda> {
    native::open_cuda()?;
    match Cuda::is_available() {
        true => Ok(()),
        false => Err(NoCuda::Broken("the driver finds GPUs, and libtorch does not".into())),
    }
}

/// The device in the terms of a spec.
pub fn kind(device: Device) -> spec::Device {
    if device.is_cuda() { spec::Device::Cuda } else { spec::Device::Cpu }
}

/// The memory of the device, as far as this process may use it.
pub fn total_bytes(device: Device) -> Option<i64> {
    match device {
        Device::Cuda(index) => Driver::open().and_then(|driver| driver.gpu_memory_bytes(index as i32)).ok(),
        _ => host_memory::total_bytes(),
    }
}

/// What of it a run may take: of the host's what is free, of a GPU all, which jobs do not share.
pub fn available_bytes(device: Device) -> Option<i64> {
    if device.is_cuda() { total_bytes(device) } else { host_memory::available_bytes() }
}

/// How much faster a matrix product is in bf16 than in fp32; `None` where it cannot be measured.
fn bf16_speedup(device: Device) -> Option<f64> {
    // Large enough for the rate to be that of large products, small enough for many of them.
    let size = if device.is_cuda() { 4_096 } else { 256 };
    let measure = || {
        let operands = [Kind::Float, Kind::BFloat16].map(|kind| Tensor::ones([size, size], (kind, device)));
        let product_s = |operand: &Tensor| {
            let started = Instant::now();
            // Reading an element waits for the device.
            let _ = operand.mm(operand).get(0).get(0).double_value(&[]);
            started.elapsed().as_secs_f64()
        };
        // The first ones set libraries up.
        let _ = operands.each_ref().map(product_s);
        let started = Instant::now();
        let mut best_s = [f64::INFINITY; 2];
        // By turns, and the fastest of many counts: others use the machine too.
        for num_done in 0.. {
            if num_done >= LEAST_PRODUCTS && started.elapsed() > MEASURED_FOR {
                break;
            }
            for (best_s, operand) in best_s.iter_mut().zip(&operands) {
                *best_s = best_s.min(product_s(operand));
            }
        }
        best_s[0] / best_s[1]
    };
    // libtorch throws where a library of it does not know the device.
    let speedup = catch_unwind(AssertUnwindSafe(measure)).ok()?;
    speedup.is_finite().then_some(speedup)
}

fn num_cores() -> i32 {
    std::thread::available_parallelism().map_or(1, |cores| cores.get() as i32)
}

/// What must be equal for two runs to give the same bits.
///
/// On the CPU this is tested; on CUDA nothing has been.
pub fn fingerprint(device: Device, choices: &Choices, ops: OpsChoice) -> Fingerprint {
    Fingerprint { numerics: numerics(device, ops), micro_batch_seqs: choices.micro_batch_seqs }
}

/// What of that does not depend on the job.
fn numerics(device: Device, ops: OpsChoice) -> Numerics {
    let cpuinfo = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let field = |name: &str| {
        let line = cpuinfo.lines().find(|line| line.starts_with(name))?;
        line.split_once(':').map(|(_, value)| value.trim().to_owned())
    };
    // What libtorch and its BLAS choose kernels by.
    let flags = field("flags").unwrap_or_default();
    let used = ["avx2", "fma", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16"];
    let capability: Vec<_> = used.into_iter().filter(|used| flags.split(' ').any(|flag| flag == *used)).collect();
    Numerics {
        device: match device {
            Device::Cuda(index) => {
                let name = Driver::open().and_then(|driver| driver.gpu_name(index as i32));
                let with = match ops {
                    OpsChoice::GpuKernels => ", fused kernels",
                    OpsChoice::GpuGraphs => ", fused kernels in graphs",
                    _ => "",
                };
                format!("cuda ({}{with})", name.unwrap_or_else(|_| "unnamed".into()))
            }
            _ => format!("cpu ({})", field("model name").unwrap_or_else(|| "unnamed".into())),
        },
        cpu_capability: capability.join(" "),
        num_threads: i64::from(tch::get_num_threads()),
        libtorch: env!("LIBTORCH_VERSION").into(),
        trainer: env!("CARGO_PKG_VERSION").into(),
    }
}
