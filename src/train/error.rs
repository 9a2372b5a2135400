//! How a run fails: the kind that the worker branches on, and a message for the person who has to act.

use std::{any::Any, fmt::Display, path::Path};

use tch::Device;

use super::device;
use crate::domain::{job::FailureKind, memory, spec::TrainSpec};

#[derive(Debug, thiserror::Error)]
#[error("{message}")]
pub struct TrainError {
    pub kind: FailureKind,
    pub message: String,
}

impl TrainError {
    pub fn new(kind: FailureKind, message: impl Into<String>) -> Self {
        Self { kind, message: message.into() }
    }

    /// The training data cannot be used.
    pub fn data(path: &Path, reason: impl Display) -> Self {
        Self::new(FailureKind::Data, format!("read {}: {reason}", path.display()))
    }

    /// The disk failed: `doing` says at what, `write` or `sync`.
    pub fn storage(doing: &str, path: &Path, reason: impl Display) -> Self {
        Self::new(FailureKind::Storage, format!("{doing} {}: {reason}", path.display()))
    }

    /// The state cannot be continued from.
    pub fn state(path: &Path, reason: impl Display) -> Self {
        Self::new(FailureKind::Internal, format!("read state {}: {reason}", path.display()))
    }

    /// What a panic carried. tch panics with libtorch's message where libtorch throws.
    pub fn from_panic(payload: &(dyn Any + Send)) -> Self {
        let message = payload
            .downcast_ref::<String>()
            .cloned()
            .or_else(|| payload.downcast_ref::<&str>().map(|text| (*text).to_owned()))
            .unwrap_or_else(|| "the trainer panicked".into());
        Self::new(kind_of(&message), message)
    }

    /// Of a run that memory was too small for: what it holds there, and which settings would fit.
    pub fn with_sizes(self, spec: &TrainSpec, device: Device) -> Self {
        if self.kind != FailureKind::OutOfMemory {
            return self;
        }
        // This process has given back by now what it had.
        let sizes = memory::too_large(spec, device::kind(device), device::available_bytes(device));
        let message = format!("out of memory: {sizes}. libtorch says: {}", self.message);
        Self { message, ..self }
    }
}

fn kind_of(message: &str) -> FailureKind {
    // libtorch's allocators, the driver, and cuBLAS each say it in their own way.
    const NO_MEMORY: [&str; 5] =
        ["out of memory", "can't allocate memory", "not enough memory", "ERROR_OUT_OF_MEMORY", "STATUS_ALLOC_FAILED"];
    let says = |text: &str| message.contains(text);
    if NO_MEMORY.into_iter().any(says) {
        FailureKind::OutOfMemory
    } else if says("CUDA error") || says("CUDA driver") || says("no NVIDIA driver") {
        FailureKind::Infrastructure
    } else {
        FailureKind::Internal
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_panic_of_libtorch_without_memory_is_out_of_memory() {
        let payload = std::panic::catch_unwind(|| {
            let _ = tch::Tensor::zeros([1 << 50], (tch::Kind::Float, tch::Device::Cpu));
        })
        .expect_err("an exbibyte is not there");
        let error = TrainError::from_panic(&*payload);
        assert_eq!(error.kind, FailureKind::OutOfMemory, "{error}");
    }

    #[test]
    fn a_gpu_without_memory_is_told_from_a_gpu_that_fails() {
        let kinds = [
            ("CUDA out of memory. Tried to allocate 2.00 GiB", FailureKind::OutOfMemory),
            ("cuLaunchKernel: CUDA_ERROR_OUT_OF_MEMORY", FailureKind::OutOfMemory),
            ("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`", FailureKind::OutOfMemory),
            ("CUDA error: an illegal memory access was encountered", FailureKind::Infrastructure),
            ("shape '[2]' is invalid", FailureKind::Internal),
        ];
        for (message, kind) in kinds {
            assert_eq!(kind_of(message), kind, "{message}");
        }
    }
}
