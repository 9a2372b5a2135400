//! Memory that is taken once and used again: a flat buffer that grows to the largest tensor that was asked of it.

use tch::{Device, Kind, Tensor};

pub struct Scratch {
    flat: Tensor,
    options: (Kind, Device),
}

impl Scratch {
    pub fn new(options: (Kind, Device)) -> Self {
        Self { flat: Tensor::empty([0], options), options }
    }

    /// A tensor of this shape with whatever was there before. It shares the memory of every other one from here.
    pub fn take(&mut self, shape: &[i64]) -> Tensor {
        let len = shape.iter().product();
        if (self.flat.numel() as i64) < len {
            // The old one goes first: both together may not fit.
            self.flat = Tensor::empty([0], self.options);
            self.flat = Tensor::empty([len], self.options);
        }
        self.flat.narrow(0, 0, len).view(shape)
    }
}
