//! Random numbers as pure functions of what they are for: Philox4x32-10 keyed by (seed, purpose) and counted by
//! (element, two indices such as restart and matrix).
//!
//! Nothing here has a position that could be lost, so a resumed run, another rank or another micro-batch draws the same.

use std::{f32::consts::TAU, thread};

/// What the numbers are drawn for. The values are part of the state format: they never change.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Purpose {
    /// Initial weights: (0, index of the parameter).
    Weights = 1,
    /// LoRA factor A: (restart, index of the matrix); the B of a factorized model: (0, number of matrices + index).
    Factors = 2,
    /// Order of the training rows: (pass over the data, 0).
    RowOrder = 3,
    /// Dropout on the input of the LoRA branch: (sequence, layer).
    Dropout = 4,
    /// Sampling of generated text: (prompt, position).
    Sampling = 5,
    /// Which moments a random reset clears: (number of the reset, twice the index of the factor, plus one for the second
    /// moment where it has a mask of its own).
    OptimizerReset = 6,
}

/// One endless sequence of random numbers.
#[derive(Debug, Clone, Copy)]
pub struct Draws {
    key: [u32; 2],
    indices: [u32; 2],
}

impl Draws {
    pub fn new(seed: i64, purpose: Purpose, indices: [i64; 2]) -> Self {
        // Both are below 2^32: the spec bounds the seed, and no run has 2^32 sequences, restarts or matrices.
        Self { key: [seed as u32, purpose as u32], indices: indices.map(|index| index as u32) }
    }

    /// Four random words.
    pub fn block(&self, index: u64) -> [u32; 4] {
        philox([index as u32, (index >> 32) as u32, self.indices[0], self.indices[1]], self.key)
    }

    /// Uniform in [-bound, bound).
    pub fn uniform(&self, len: usize, bound: f32) -> Vec<f32> {
        self.fill(len, |words| words.map(|word| unit(word) * (2.0 * bound) - bound))
    }

    /// Normal around zero (Box-Muller).
    pub fn normal(&self, len: usize, std: f32) -> Vec<f32> {
        self.fill(len, |[a, b, c, d]| {
            let (x, y) = normal_pair(a, b);
            let (z, w) = normal_pair(c, d);
            [x * std, y * std, z * std, w * std]
        })
    }

    /// Gumbel noise: the largest of `logit + noise` is a sample of the softmax.
    pub fn gumbel(&self, len: usize) -> Vec<f32> {
        self.fill(len, |words| words.map(|word| -(-(unit_above_zero(word)).ln()).max(f32::MIN_POSITIVE).ln()))
    }

    fn fill(&self, len: usize, values: impl Fn([u32; 4]) -> [f32; 4] + Sync) -> Vec<f32> {
        const CHUNK: usize = 1 << 20;
        let mut out = vec![0.0; len];
        let num_threads = thread::available_parallelism().map_or(1, usize::from);
        let chunk_len = len.div_ceil(num_threads).next_multiple_of(4).max(CHUNK);
        thread::scope(|scope| {
            for (chunk_index, chunk) in out.chunks_mut(chunk_len).enumerate() {
                let values = &values;
                scope.spawn(move || {
                    let first_block = chunk_index * chunk_len / 4;
                    for (block, four) in chunk.chunks_mut(4).enumerate() {
                        let drawn = values(self.block((first_block + block) as u64));
                        four.copy_from_slice(&drawn[..four.len()]);
                    }
                });
            }
        });
        out
    }
}

/// A permutation of `0..len` in constant memory: a Feistel network over the next power of four, walked until it falls
/// inside.
#[derive(Debug, Clone, Copy)]
pub struct Permutation {
    len: u64,
    half_bits: u32,
    draws: Draws,
}

impl Permutation {
    pub fn new(len: i64, draws: Draws) -> Self {
        let len = len as u64;
        let bits = u64::BITS - len.saturating_sub(1).leading_zeros();
        Self { len, half_bits: bits.div_ceil(2).max(1), draws }
    }

    pub fn get(&self, index: i64) -> i64 {
        let mut x = index as u64;
        loop {
            x = self.shuffle(x);
            if x < self.len {
                return x as i64;
            }
        }
    }

    fn shuffle(&self, x: u64) -> u64 {
        let mask = (1u64 << self.half_bits) - 1;
        let (mut left, mut right) = (x >> self.half_bits, x & mask);
        for round in 0..4 {
            let [word, ..] = self.draws.block((round << 32) | right);
            (left, right) = (right, left ^ (u64::from(word) & mask));
        }
        (left << self.half_bits) | right
    }
}

/// In [0, 1), with the 24 bits that a float holds.
fn unit(word: u32) -> f32 {
    (word >> 8) as f32 * (1.0 / 16_777_216.0)
}

/// In (0, 1].
fn unit_above_zero(word: u32) -> f32 {
    ((word >> 8) + 1) as f32 * (1.0 / 16_777_216.0)
}

fn normal_pair(a: u32, b: u32) -> (f32, f32) {
    let radius = (-2.0 * unit_above_zero(a).ln()).sqrt();
    let (sin, cos) = (TAU * unit(b)).sin_cos();
    (radius * cos, radius * sin)
}

/// Philox4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3").
fn philox(mut counter: [u32; 4], mut key: [u32; 2]) -> [u32; 4] {
    for round in 0..10 {
        if round > 0 {
            key = [key[0].wrapping_add(0x9E37_79B9), key[1].wrapping_add(0xBB67_AE85)];
        }
        let a = 0xD251_1F53_u64 * u64::from(counter[0]);
        let b = 0xCD9E_8D57_u64 * u64::from(counter[2]);
        counter = [(b >> 32) as u32 ^ counter[1] ^ key[0], b as u32, (a >> 32) as u32 ^ counter[3] ^ key[1], a as u32];
    }
    counter
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    #[test]
    fn philox_gives_the_published_answers() {
        // Random123's known-answer file, philox4x32 with 10 rounds.
        let cases = [
            ([0; 4], [0; 2], [0x6627_e8d5, 0xe169_c58d, 0xbc57_ac4c, 0x9b00_dbd8]),
            ([u32::MAX; 4], [u32::MAX; 2], [0x408f_276d, 0x41c8_3b0e, 0xa20b_c7c6, 0x6d54_51fd]),
            (
                [0x243f_6a88, 0x85a3_08d3, 0x1319_8a2e, 0x0370_7344],
                [0xa409_3822, 0x299f_31d0],
                [0xd16c_fe09, 0x94fd_cceb, 0x5001_e420, 0x2412_6ea1],
            ),
        ];
        for (counter, key, want) in cases {
            assert_eq!(philox(counter, key), want);
        }
    }

    #[test]
    fn a_permutation_visits_every_row_once_and_differs_between_passes() {
        for len in [1, 2, 3, 5, 64, 1_000, 4_097] {
            let order = |pass| {
                let permutation = Permutation::new(len, Draws::new(7, Purpose::RowOrder, [pass, 0]));
                (0..len).map(|index| permutation.get(index)).collect::<Vec<_>>()
            };
            assert_eq!(order(0).iter().copied().collect::<HashSet<_>>(), (0..len).collect(), "len {len}");
            assert!(len < 64 || order(0) != order(1));
            assert!(len < 64 || order(0) != (0..len).collect::<Vec<_>>());
        }
    }

    #[test]
    fn uniform_and_normal_draws_have_their_moments() {
        let draws = Draws::new(1, Purpose::Weights, [0, 0]);
        let moments = |values: &[f32]| {
            let mean = values.iter().map(|&x| f64::from(x)).sum::<f64>() / values.len() as f64;
            let variance = values.iter().map(|&x| (f64::from(x) - mean).powi(2)).sum::<f64>() / values.len() as f64;
            (mean, variance.sqrt())
        };
        let (mean, std) = moments(&draws.uniform(100_003, 0.5));
        assert!(mean.abs() < 5e-3 && (std - 0.5 / 3f64.sqrt()).abs() < 5e-3, "uniform: {mean} {std}");
        let (mean, std) = moments(&draws.normal(100_003, 2.0));
        assert!(mean.abs() < 3e-2 && (std - 2.0).abs() < 3e-2, "normal: {mean} {std}");
    }

    #[test]
    fn a_longer_draw_begins_with_the_shorter_one() {
        let draws = Draws::new(3, Purpose::Factors, [2, 5]);
        let long = draws.uniform((3 << 20) + 1, 1.0);
        assert_eq!(draws.uniform(1_001, 1.0), long[..1_001]);
    }
}
