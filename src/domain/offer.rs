//! What workers have for jobs, and what of a job that tells before it runs.

use serde::{Deserialize, Serialize};

use super::{
    memory::{Shortage, gib, shortage},
    problem::Problem,
    spec::{Device, Precision, TrainSpec},
};

/// What a worker has for jobs, as its trainer found it.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Offer {
    /// The best device there.
    pub device: Device,
    pub num_gpus: i64,
    /// The memory of that device, where it is known.
    pub memory_bytes: Option<i64>,
    /// The rate of matrix products in bf16 on that device, as a multiple of that in fp32.
    pub bf16_speedup: Option<f64>,
}

impl Offer {
    /// The device that a job gets here.
    pub fn device_for(&self, spec: &TrainSpec) -> Device {
        match spec.resources.device {
            Device::Cpu => Device::Cpu,
            Device::Auto | Device::Cuda => self.device,
        }
    }

    /// Of the memory that a job gets here. Nothing is known of the CPU beside a GPU.
    pub fn memory_for(&self, spec: &TrainSpec) -> Option<i64> {
        self.memory_bytes.filter(|_| self.device_for(spec) == self.device)
    }

    fn bf16_speedup_for(&self, spec: &TrainSpec) -> Option<f64> {
        self.bf16_speedup.filter(|_| self.device_for(spec) == self.device)
    }
}

/// What is wrong with a job that, with the settings it has, needs more memory than each of these workers has. Nothing,
/// where there is none of them, or one whose memory is not known.
pub fn memory_problem(spec: &TrainSpec, offers: &[Offer]) -> Option<Problem> {
    let mut shortages = Vec::new();
    for offer in offers {
        let memory = offer.memory_for(spec)?;
        shortages.push((memory, shortage(spec, offer.device_for(spec), memory)?));
    }
    let (memory, Shortage { pointer, message }) = shortages.into_iter().max_by_key(|(memory, _)| *memory)?;
    Some(Problem::new(pointer, format!("no worker has more than {} of memory: {message}", gib(memory))))
}

/// What to know of a job in bf16 that is slower than fp32 on each of these workers.
pub fn bf16_warning(spec: &TrainSpec, offers: &[Offer]) -> Option<String> {
    if spec.precision != Precision::Bf16 {
        return None;
    }
    let speedups: Option<Vec<_>> = offers.iter().map(|offer| offer.bf16_speedup_for(spec)).collect();
    let best = speedups?.into_iter().max_by(f64::total_cmp).filter(|best| *best < 1.0)?;
    Some(format!(
        "bf16 is slower than fp32 where this job runs: matrix products were measured at {best:.2} times the rate; \
         fp32 would be faster"
    ))
}
