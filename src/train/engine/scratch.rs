//! Memory that is taken once and used again: a flat buffer that grows to the largest tensor that was asked of it.

use std::cell::Cell;

use tch::{Device, Kind, Tensor};

thread_local! {
    static NUM_MOVES: Cell<u64> = const { Cell::new(0) };
}

/// How often a buffer of this thread has grown, and lies elsewhere since.
pub fn num_moves() -> u64 {
    NUM_MOVES.get()
}

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
            NUM_MOVES.set(NUM_MOVES.get() + 1);
        }
        self.flat.narrow(0, 0, len).view(shape)
    }
}
