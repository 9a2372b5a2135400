//! A frozen matrix in few bits. It is made from the master, which stays as it is: nothing is lost at a merge.

use tch::{Device, Kind, Tensor};

use crate::{domain::spec::FrozenWeights, train::ops::Ops};

/// Elements that share a scale in NF4 (Dettmers et al. 2023, QLoRA, section 3).
const BLOCK: i64 = 64;

/// NF4: the values that 16 equally likely parts of a normal distribution, scaled to [-1, 1], are represented by.
const LEVELS: [f32; 16] = [
    -1.0,
    -0.696_192_8,
    -0.525_073_05,
    -0.394_917_5,
    -0.284_441_38,
    -0.184_773_43,
    -0.091_050_036,
    0.0,
    0.079_580_3,
    0.160_930_2,
    0.246_112_3,
    0.337_915_24,
    0.440_709_83,
    0.562_617,
    0.722_956_84,
    1.0,
];

pub enum Quantised {
    /// Codes (o, i), a scale for every row.
    Int8 { codes: Tensor, scales: Tensor },
    /// Two codes a byte, a scale for every block of the rows one after the other.
    Nf4 { codes: Tensor, scales: Tensor, levels: Tensor },
}

impl Quantised {
    /// Of a master (o, i), wherever that lies, on this device; None in full precision.
    pub fn of(master: &Tensor, format: FrozenWeights, device: Device) -> Option<Self> {
        match format {
            FrozenWeights::Full => None,
            FrozenWeights::Int8 => Some(Self::int8(&master.to_device(device))),
            FrozenWeights::Nf4 => Some(Self::nf4(&master.to_device(device))),
        }
    }

    fn int8(master: &Tensor) -> Self {
        let scales = (master.abs().amax([1i64].as_slice(), false) / 127.0).clamp_min(f64::from(f32::MIN_POSITIVE));
        let codes = (master / scales.unsqueeze(1)).round().to_kind(Kind::Int8);
        Self::Int8 { codes, scales }
    }

    fn nf4(master: &Tensor) -> Self {
        let len = master.numel() as i64;
        let blocks = master.flatten(0, -1).constant_pad_nd([0, (BLOCK - len % BLOCK) % BLOCK]).view([-1, BLOCK]);
        let scales = blocks.abs().amax([1i64].as_slice(), false).clamp_min(f64::from(f32::MIN_POSITIVE));
        let levels = Tensor::from_slice(&LEVELS).to_kind(master.kind()).to_device(master.device());
        let middles = (levels.narrow(0, 0, 15) + levels.narrow(0, 1, 15)) / 2.0;
        let nearest = (blocks / scales.unsqueeze(1)).bucketize(&middles, true, false).view([-1, 2]);
        let codes = (nearest.select(1, 0) + nearest.select(1, 1) * 16).to_kind(Kind::Uint8);
        let codes = codes.narrow(0, 0, (len + 1) / 2).contiguous();
        Self::Nf4 { codes, scales, levels }
    }

    /// to = W + scale · delta, of this W.
    pub fn add_scaled(&self, ops: &Ops, delta: &Tensor, scale: f64, to: &Tensor) {
        match self {
            Self::Int8 { codes, scales } => ops.add_scaled_int8((codes, scales), delta, scale, to),
            Self::Nf4 { codes, scales, levels } => ops.add_scaled_nf4((codes, scales, levels), delta, scale, to),
        }
    }
}
