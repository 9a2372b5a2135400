//! Parameters that are trained together, in flat fp32 buffers: values, gradients and Adam's moments.
//!
//! Every parameter is a view into its group's buffer, so one operation on the buffer acts on all of them. Buffers are
//! edited in place and never replaced: views, and the model that holds them, stay valid.

use tch::{Device, Kind, Tensor};

use super::{
    ops::Ops,
    relora::{Frozen, Wrapped},
};

/// Parameters begin at multiples of this many elements (64 bytes): kernels choose their path by alignment, and the
/// choice must not depend on what lies before a parameter.
const ALIGNMENT: i64 = 16;
/// Buffers have a multiple of this many elements, so that norms can be taken row by row.
const ROW: i64 = 1_024;

#[derive(Debug, Clone, PartialEq)]
pub struct Parameter {
    pub name: String,
    pub shape: Vec<i64>,
    /// Whether weight decay acts on it: not on norms and embeddings.
    pub decays: bool,
}

/// The parameters of a model, and which of them are trained.
pub struct Weights {
    /// Everything in a full-rank phase; what is neither wrapped nor frozen in a low-rank phase.
    pub full_rank: Group,
    pub low_rank: Option<LowRankWeights>,
}

pub struct LowRankWeights {
    /// A and B of every wrapped matrix, in pairs.
    pub factors: Group,
    pub wrapped: Vec<Wrapped>,
    /// First the matrices that the factors update, in the order of `wrapped`, or none of them where the factors stand in
    /// their place; then what else is not trained.
    pub frozen: Vec<Frozen>,
    /// The s of W + sBA.
    pub scale: f64,
}

impl Weights {
    /// The groups that are trained.
    pub fn groups(&self) -> impl Iterator<Item = &Group> {
        [Some(&self.full_rank), self.low_rank.as_ref().map(|low_rank| &low_rank.factors)].into_iter().flatten()
    }

    /// The trained tensor of this name.
    pub fn place(&self, name: &str) -> Option<Place> {
        self.groups().find_map(|group| group.place(name))
    }

    /// The tensor of this name that is not trained.
    pub fn master(&self, name: &str) -> Option<Tensor> {
        let frozen = self.low_rank.iter().flat_map(|low_rank| &low_rank.frozen);
        frozen.into_iter().find(|frozen| frozen.name == name).map(|frozen| frozen.master.shallow_clone())
    }

    /// The matrix `{path}.weight` of this shape, (rows, columns).
    pub fn matrix(&self, path: &str, (rows, columns): (i64, i64)) -> Matrix {
        let name = format!("{path}.weight");
        let factors = self.low_rank.as_ref().and_then(|low_rank| {
            let factor = |name: &str| low_rank.factors.place(&format!("{path}.{name}.weight"));
            Some(Factors { a: factor("lora_A")?, b: factor("lora_B")?, scale: low_rank.scale })
        });
        Matrix { rows, columns, place: self.place(&name), master: self.master(&name), factors }
    }

    pub fn groups_mut(&mut self) -> impl Iterator<Item = &mut Group> {
        [Some(&mut self.full_rank), self.low_rank.as_mut().map(|low_rank| &mut low_rank.factors)].into_iter().flatten()
    }
}

/// A trained tensor: its value, and where its gradient is summed.
pub struct Place {
    pub value: Tensor,
    pub gradient: Tensor,
}

/// The low-rank factors of a matrix: A (r, in) and B (out, r), scaled by s.
pub struct Factors {
    pub a: Place,
    pub b: Place,
    pub scale: f64,
}

/// A matrix of the model, whichever way it is held: trained, or frozen, or neither where its factors stand in its place.
pub struct Matrix {
    pub rows: i64,
    pub columns: i64,
    pub place: Option<Place>,
    pub master: Option<Tensor>,
    pub factors: Option<Factors>,
}

pub struct Group {
    /// In the order of the buffers: first those that decay.
    pub parameters: Vec<Parameter>,
    /// Views of `values`.
    pub leaves: Vec<Tensor>,
    pub values: Tensor,
    pub gradients: Tensor,
    pub exp_avg: Tensor,
    pub exp_avg_sq: Tensor,
    /// Updates that Adam's moments have seen.
    pub num_updates: i64,
    /// How far from the start weight decay reaches.
    pub decayed_len: i64,
    gradient_views: Vec<Tensor>,
}

impl Group {
    /// All zeros.
    pub fn new(parameters: Vec<Parameter>, device: Device) -> Self {
        Self::of_kind(parameters, (Kind::Float, device))
    }

    fn of_kind(parameters: Vec<Parameter>, options: (Kind, Device)) -> Self {
        let (mut parameters, others): (Vec<_>, Vec<_>) = parameters.into_iter().partition(|p| p.decays);
        let decayed_len = parameters.iter().map(padded_len).sum();
        parameters.extend(others);
        let len = buffer_len(&parameters).max(1);
        let zeros = || Tensor::zeros([(len + ROW - 1) / ROW * ROW], options);
        let (values, gradients) = (zeros(), zeros());
        let leaves = views(&parameters, &values);
        let gradient_views = views(&parameters, &gradients);
        Self {
            leaves,
            values,
            exp_avg: zeros(),
            exp_avg_sq: zeros(),
            num_updates: 0,
            decayed_len,
            gradient_views,
            gradients,
            parameters,
        }
    }

    /// One view per parameter of a buffer that is laid out as this group's are.
    pub fn views(&self, buffer: &Tensor) -> Vec<Tensor> {
        views(&self.parameters, buffer)
    }

    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.parameters.iter().map(|parameter| parameter.name.as_str())
    }

    pub fn place(&self, name: &str) -> Option<Place> {
        let index = self.names().position(|known| known == name)?;
        let [value, gradient] = [&self.leaves[index], &self.gradient_views[index]].map(Tensor::shallow_clone);
        Some(Place { value, gradient })
    }

    /// Sets one parameter.
    pub fn set(&mut self, index: usize, value: &Tensor) {
        let _guard = tch::no_grad_guard();
        self.leaves[index].copy_(value);
    }

    /// Sets the parameter of this name, if there is one.
    pub fn set_by_name(&mut self, name: &str, value: &Tensor) {
        let index = self.names().position(|known| known == name);
        index.into_iter().for_each(|index| self.set(index, value));
    }

    /// Gives back the memory of everything but the values: the group is about to be replaced.
    pub fn free_training_buffers(&mut self) {
        self.gradient_views.clear();
        for buffer in [&mut self.gradients, &mut self.exp_avg, &mut self.exp_avg_sq] {
            *buffer = Tensor::zeros([0], (Kind::Float, Device::Cpu));
        }
    }

    /// The sum of the squares of all gradients, in fp64 on the device.
    pub fn gradient_square_sum(&self, ops: &Ops) -> Tensor {
        ops.square_sum(&self.gradients)
    }

    /// The same parameters in fp64: what the gradients of hand-written code are checked in.
    #[cfg(test)]
    pub fn in_double(&self) -> Self {
        let double = Self::of_kind(self.parameters.clone(), (Kind::Double, self.values.device()));
        double.values.shallow_clone().copy_(&self.values);
        double
    }
}

/// The length of a buffer that holds these parameters.
pub fn buffer_len(parameters: &[Parameter]) -> i64 {
    parameters.iter().map(padded_len).sum()
}

fn padded_len(parameter: &Parameter) -> i64 {
    (parameter.shape.iter().product::<i64>() + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT
}

/// Tensors of these shapes, one behind the other in one buffer.
pub fn views(parameters: &[Parameter], buffer: &Tensor) -> Vec<Tensor> {
    let mut start = 0;
    parameters
        .iter()
        .map(|parameter| {
            let view = buffer.narrow(0, start, parameter.shape.iter().product()).view(parameter.shape.as_slice());
            start += padded_len(parameter);
            view
        })
        .collect()
}
