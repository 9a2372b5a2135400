//! Copies between the memory of the host and that of the device. A GPU makes them by itself where its driver has locked
//! the host's side in place; else they go through memory of the driver's.

use std::sync::Once;

use tch::{Device, Kind, Tensor};

use super::native;

/// A copy of an fp32 tensor in host memory. Waits for the device.
pub fn copy_to_host(tensor: &Tensor) -> Tensor {
    let _guard = tch::no_grad_guard();
    match host_side(&tensor.size(), Kind::Float, tensor.device()) {
        Some(mut copy) => {
            copy.copy_(tensor);
            copy
        }
        None => tensor.detach().to_device_(Device::Cpu, Kind::Float, false, true),
    }
}

/// The fp32 tensor itself where it lies in host memory, else a copy there.
pub fn into_host(tensor: Tensor) -> Tensor {
    if tensor.device() == Device::Cpu { tensor } else { copy_to_host(&tensor) }
}

/// Numbers on the device, in this shape. Waits for nothing that a GPU is still busy with.
pub fn copy_to_device(numbers: &[i64], shape: &[i64], device: Device) -> Tensor {
    let numbers = Tensor::from_slice(numbers).view(shape);
    match host_side(shape, Kind::Int64, device) {
        // libtorch keeps the memory as it is until the copy is made.
        Some(mut staged) => {
            staged.copy_(&numbers);
            staged.to_device_(device, Kind::Int64, true, false)
        }
        None => numbers.to_device(device),
    }
}

/// Page-locked memory for the host's side of a copy. None where an ordinary copy must do, for the CPU above all.
fn host_side(shape: &[i64], kind: Kind, device: Device) -> Option<Tensor> {
    static SAID: Once = Once::new();
    if device == Device::Cpu {
        return None;
    }
    let flat = native::page_locked(shape.iter().product(), kind);
    if flat.is_none() {
        SAID.call_once(|| tracing::warn!("the driver locks no more host memory; copies from and to the GPU are slow"));
    }
    Some(flat?.view(shape))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn without_a_gpu_no_memory_is_locked_and_copies_are_made_all_the_same() {
        assert!(native::page_locked(8, Kind::Float).is_none());
        assert!(host_side(&[2, 3], Kind::Float, Device::Cuda(0)).is_none());
        let tensor = Tensor::arange(6, (Kind::Float, Device::Cpu)).view([2, 3]);
        let copy = copy_to_host(&tensor.tr());
        assert!(copy.equal(&tensor.tr()) && copy.data_ptr() != tensor.data_ptr());
        assert_eq!(into_host(tensor.shallow_clone()).data_ptr(), tensor.data_ptr());
        let numbers = copy_to_device(&[1, 2, 3, 4], &[2, 2], Device::Cpu);
        assert_eq!(Vec::<i64>::try_from(numbers.flatten(0, -1)).unwrap(), [1, 2, 3, 4]);
    }
}
