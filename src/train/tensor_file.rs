//! Named fp32 tensors in safetensors files. Equal tensors give equal files: names are sorted, nothing else is stored.

use std::{borrow::Cow, cell::RefCell, collections::HashMap, fs, os::unix::fs::PermissionsExt, path::Path};

use safetensors::{Dtype, SafeTensors, View};
use tch::{Kind, Tensor};

use super::{error::TrainError, native};
use crate::domain::checkpoint::TensorShape;

/// A tensor in host memory, as the safetensors crate wants to see it.
struct HostTensor<'a> {
    tensor: &'a Tensor,
    shape: Vec<usize>,
}

impl View for HostTensor<'_> {
    fn dtype(&self) -> Dtype {
        Dtype::F32
    }

    fn shape(&self) -> &[usize] {
        &self.shape
    }

    fn data(&self) -> Cow<'_, [u8]> {
        Cow::Borrowed(native::host_bytes(self.tensor))
    }

    fn data_len(&self) -> usize {
        self.tensor.numel() * size_of::<f32>()
    }
}

/// A tensor that is computed when its turn to be written comes, and is gone after it.
struct LateTensor<'a> {
    name: &'a str,
    shape: Vec<usize>,
    compute: &'a dyn Fn(&str) -> Result<Tensor, TrainError>,
    /// Why one could not be computed: whoever asks for bytes takes no error.
    failure: &'a RefCell<Option<TrainError>>,
}

impl View for LateTensor<'_> {
    fn dtype(&self) -> Dtype {
        Dtype::F32
    }

    fn shape(&self) -> &[usize] {
        &self.shape
    }

    fn data(&self) -> Cow<'_, [u8]> {
        match (self.compute)(self.name) {
            Ok(tensor) => Cow::Owned(native::host_bytes(&tensor).to_vec()),
            Err(error) => {
                self.failure.borrow_mut().get_or_insert(error);
                Cow::Owned(vec![0; self.data_len()])
            }
        }
    }

    fn data_len(&self) -> usize {
        self.shape.iter().product::<usize>() * size_of::<f32>()
    }
}

/// Writes contiguous fp32 tensors in host memory.
pub fn write(path: &Path, tensors: &[(String, Tensor)]) -> Result<(), TrainError> {
    write_views(
        path,
        tensors.iter().map(|(name, tensor)| (name.as_str(), HostTensor { tensor, shape: sizes(&tensor.size()) })),
    )
}

/// Writes tensors of these shapes one by one as they are computed, so that one is in memory at a time. If one cannot be
/// computed, there is no file.
pub fn write_late(
    path: &Path,
    tensors: &[TensorShape],
    compute: &dyn Fn(&str) -> Result<Tensor, TrainError>,
) -> Result<(), TrainError> {
    let failure = RefCell::new(None);
    let views = tensors.iter().map(|tensor| {
        let name = tensor.name.as_str();
        (name, LateTensor { name, shape: sizes(&tensor.shape), compute, failure: &failure })
    });
    write_views(path, views)?;
    match failure.take() {
        None => Ok(()),
        Some(error) => {
            fs::remove_file(path).map_err(|error| TrainError::storage("remove", path, error))?;
            Err(error)
        }
    }
}

fn sizes(shape: &[i64]) -> Vec<usize> {
    shape.iter().map(|&n| n as usize).collect()
}

fn write_views<'a>(path: &Path, views: impl Iterator<Item = (&'a str, impl View)>) -> Result<(), TrainError> {
    // `transformers` reads only files that say which framework's names they use.
    let metadata = HashMap::from([("format".to_owned(), "pt".to_owned())]);
    safetensors::serialize_to_file(views, Some(metadata), path)
        .map_err(|error| TrainError::storage("write", path, error))?;
    // The crate makes the file for its owner alone; it should look like every other file of the node.
    fs::set_permissions(path, fs::Permissions::from_mode(0o644)).map_err(|e| TrainError::storage("write", path, e))
}

/// Reads a file into tensors that are there already. Every name must be expected, every expected name must be there,
/// with its shape.
pub fn read_into(path: &Path, mut targets: Vec<(String, Tensor)>) -> Result<(), TrainError> {
    let fail = |reason: String| TrainError::state(path, reason);
    let bytes = native::map_file(path).map_err(|error| fail(error.to_string()))?;
    let file = SafeTensors::deserialize(&bytes).map_err(|error| fail(format!("it is damaged: {error}")))?;
    if let Some(name) = file.names().iter().find(|&&name| !targets.iter().any(|(known, _)| known == name)) {
        return Err(fail(format!("the tensor {name} does not belong to this job")));
    }
    let _guard = tch::no_grad_guard();
    for (name, target) in &mut targets {
        let view = file.tensor(name).map_err(|_| fail(format!("the tensor {name} is missing")))?;
        let shape: Vec<_> = view.shape().iter().map(|&n| n as i64).collect();
        if view.dtype() != Dtype::F32 || shape != target.size() {
            let want = target.size();
            return Err(fail(format!("the tensor {name} is {:?} {shape:?}, wanted F32 {want:?}", view.dtype())));
        }
        target.copy_(&Tensor::from_data_size(view.data(), &shape, Kind::Float));
    }
    Ok(())
}
