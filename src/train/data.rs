//! The tokens that a job trains on, memory-mapped, and the order in which they are read.
//!
//! Row i of a split is tokens i·S to (i+1)·S. Which row is the n-th of the run is a pure function of (seed, n): ranks,
//! micro-batches and restarts of the process have no part in it.

use std::{
    fs,
    path::{Path, PathBuf},
};

use memmap2::{Advice, Mmap};
use tch::{Device, Tensor};

use super::{
    error::TrainError,
    host_copy::copy_to_device,
    native,
    random::{Draws, Permutation, Purpose},
};
use crate::domain::{
    data::{TOKENIZATION_FILE, TRAIN_TOKENS_FILE, TokenDtype, TokenizationMeta, VALID_TOKENS_FILE},
    job::FailureKind,
    spec::TrainSpec,
};

/// One split: its rows of `sequence_length` tokens. A last, shorter row is left out.
pub struct Split {
    bytes: Mmap,
    dtype: TokenDtype,
    sequence_length: i64,
    pub num_rows: i64,
}

pub struct Dataset {
    pub dir: PathBuf,
    pub tokenization: TokenizationMeta,
    pub train: Split,
    pub valid: Split,
    seed: i64,
}

impl Dataset {
    pub fn open(dir: &Path, spec: &TrainSpec) -> Result<Self, TrainError> {
        let path = dir.join(TOKENIZATION_FILE);
        let json = fs::read(&path).map_err(|error| TrainError::data(&path, error))?;
        let tokenization: TokenizationMeta =
            serde_json::from_slice(&json).map_err(|error| TrainError::data(&path, error))?;
        if tokenization.format_version != 1 {
            let version = tokenization.format_version;
            return Err(TrainError::data(
                &path,
                format!("format_version {version} is not known to this trainer, 1 is"),
            ));
        }
        if tokenization.vocab_size > spec.model.vocab_size {
            let (has, needs) = (spec.model.vocab_size, tokenization.vocab_size);
            let message = format!("/model/vocab_size is {has}, the data needs {needs}");
            return Err(TrainError::new(FailureKind::UserConfig, message));
        }
        let split =
            |name, num_tokens| Split::open(dir.join(name), &tokenization, num_tokens, spec.batch.sequence_length);
        Ok(Self {
            dir: dir.to_owned(),
            train: split(TRAIN_TOKENS_FILE, tokenization.train_tokens)?,
            valid: split(VALID_TOKENS_FILE, tokenization.valid_tokens)?,
            seed: spec.seed,
            tokenization,
        })
    }

    /// Training rows from the `first_seq`-th of the run on, (num_seqs, S). Every pass over the data has an order of its
    /// own.
    pub fn training_rows(&self, first_seq: i64, num_seqs: i64, device: Device) -> Tensor {
        self.train.rows(self.row_numbers(first_seq, num_seqs), device)
    }

    /// Has the rows read from the disk that `training_rows` will be asked for, while something else is computed.
    pub fn prefetch(&self, first_seq: i64, num_seqs: i64) {
        self.row_numbers(first_seq, num_seqs).for_each(|row| self.train.prefetch(row));
    }

    fn row_numbers(&self, first_seq: i64, num_seqs: i64) -> impl Iterator<Item = i64> {
        let num_rows = self.train.num_rows;
        (first_seq..first_seq + num_seqs).map(move |seq| {
            let order = Permutation::new(num_rows, Draws::new(self.seed, Purpose::RowOrder, [seq / num_rows, 0]));
            order.get(seq % num_rows)
        })
    }
}

impl Split {
    fn open(
        path: PathBuf,
        facts: &TokenizationMeta,
        num_tokens: i64,
        sequence_length: i64,
    ) -> Result<Self, TrainError> {
        let num_rows = num_tokens / sequence_length;
        if num_rows < 1 {
            let reason = format!("its {num_tokens} tokens are fewer than one sequence of {sequence_length}");
            return Err(TrainError::data(&path, reason));
        }
        let bytes = native::map_file(&path).map_err(|error| TrainError::data(&path, error))?;
        let (has, wants) = (bytes.len(), num_tokens as usize * facts.dtype.bytes());
        if has != wants {
            return Err(TrainError::data(&path, format!("it has {has} bytes, tokenization.json says {wants}")));
        }
        // An index outside the embedding would end the process on a GPU, without a word.
        if let Some((place, token)) = first_outside(&bytes, facts.dtype, facts.vocab_size) {
            let vocab_size = facts.vocab_size;
            let reason = format!("its token number {place} is {token}, the vocabulary has {vocab_size}");
            return Err(TrainError::data(&path, reason));
        }
        Ok(Self { bytes, dtype: facts.dtype, sequence_length, num_rows })
    }

    fn prefetch(&self, row: i64) {
        let row_bytes = self.sequence_length as usize * self.dtype.bytes();
        // Advice: without it the row is read when it is asked for.
        if let Err(error) = self.bytes.advise_range(Advice::WillNeed, row as usize * row_bytes, row_bytes) {
            tracing::debug!(%error, "no prefetch");
        }
    }

    /// These rows, (len, S), on the device.
    pub fn rows(&self, rows: impl Iterator<Item = i64>, device: Device) -> Tensor {
        let row_bytes = self.sequence_length as usize * self.dtype.bytes();
        let mut tokens = Vec::new();
        for row in rows {
            let bytes = &self.bytes[row as usize * row_bytes..][..row_bytes];
            match self.dtype {
                TokenDtype::U16 => {
                    tokens.extend(bytes.as_chunks().0.iter().map(|&two| i64::from(u16::from_le_bytes(two))));
                }
                TokenDtype::U32 => {
                    tokens.extend(bytes.as_chunks().0.iter().map(|&four| i64::from(u32::from_le_bytes(four))));
                }
            }
        }
        let num_rows = tokens.len() as i64 / self.sequence_length;
        copy_to_device(&tokens, &[num_rows, self.sequence_length], device)
    }
}

/// The first token outside the vocabulary, and its place. Blocks are judged by their largest token, which is quick.
fn first_outside(bytes: &[u8], dtype: TokenDtype, vocab_size: i64) -> Option<(usize, i64)> {
    const BLOCK_BYTES: usize = 1 << 16;
    let token_at = |block: &[u8], index: usize| match dtype {
        TokenDtype::U16 => i64::from(u16::from_le_bytes(block.as_chunks().0[index])),
        TokenDtype::U32 => i64::from(u32::from_le_bytes(block.as_chunks().0[index])),
    };
    let largest = |block: &[u8]| match dtype {
        TokenDtype::U16 => block.as_chunks().0.iter().map(|&two| i64::from(u16::from_le_bytes(two))).max(),
        TokenDtype::U32 => block.as_chunks().0.iter().map(|&four| i64::from(u32::from_le_bytes(four))).max(),
    };
    let (number, block) = bytes
        .chunks(BLOCK_BYTES)
        .enumerate()
        .find(|(_, block)| largest(block).is_some_and(|token| token >= vocab_size))?;
    let in_block = (0..block.len() / dtype.bytes()).find(|&index| token_at(block, index) >= vocab_size)?;
    Some((number * BLOCK_BYTES / dtype.bytes() + in_block, token_at(block, in_block)))
}
