//! What all projections of a model have in common.

use tch::{Device, Kind, Tensor};

use super::{Settings, scratch::Scratch};
use crate::{
    domain::spec::{FrozenWeights, MergedPlan},
    train::{native, ops::Ops, profile::Profile},
};

/// The operations, the settings, and memory for what does not outlive a product.
pub struct Shared {
    pub ops: Ops,
    pub product_kind: Kind,
    pub dropout: f64,
    pub profile: Profile,
    pub device: Device,
    pub plan: MergedPlan,
    pub frozen_weights: FrozenWeights,
    padding: i64,
    pub weight: Scratch,
    pub delta: Scratch,
    gradient: Scratch,
    pub masked: Scratch,
    pub low: Scratch,
    pub dlow: Scratch,
}

impl Shared {
    pub fn new(settings: Settings, device: Device) -> Self {
        let scratch = || Scratch::new((settings.product_kind, device));
        Self {
            ops: Ops::new(settings.ops, settings.product_kind, device),
            product_kind: settings.product_kind,
            dropout: settings.dropout,
            profile: Profile::default(),
            device,
            plan: settings.plan,
            frozen_weights: settings.frozen_weights,
            padding: settings.padding,
            weight: scratch(),
            delta: scratch(),
            gradient: scratch(),
            masked: scratch(),
            low: scratch(),
            dlow: scratch(),
        }
    }

    pub fn products(&self) -> (Kind, Device) {
        (self.product_kind, self.device)
    }

    /// The size of a matrix with padding.
    pub fn padded(&self, len: i64) -> i64 {
        (len + self.padding - 1) / self.padding * self.padding
    }

    /// sum += left · right, in the kind of the sum.
    pub fn add_product(&mut self, left: &Tensor, right: &Tensor, sum: &Tensor) {
        if sum.kind() == self.product_kind {
            add_product(left, right, sum);
        } else {
            let product = self.gradient.take(&sum.size());
            multiply(left, right, &product);
            self.ops.accumulate(&product, sum);
        }
    }
}

/// out = left · right.
pub fn multiply(left: &Tensor, right: &Tensor, out: &Tensor) {
    if !native::onednn_multiply(left, right, out, false) {
        let _ = left.mm_out(out, right);
    }
}

/// sum += left · right, all of one kind.
pub fn add_product(left: &Tensor, right: &Tensor, sum: &Tensor) {
    if !native::onednn_multiply(left, right, sum, true) {
        let _ = sum.shallow_clone().addmm_(left, right);
    }
}

/// to = from, in the kind of `to`.
pub fn copy(from: &Tensor, to: &Tensor) {
    to.shallow_clone().copy_(from);
}
