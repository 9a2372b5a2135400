//! Data on its way to the trainer: raw text, and the tokens made of it.

use serde::{Deserialize, Serialize};

/// Files of a tokenization, in the bucket and in the trainer's data directory.
pub const TRAIN_TOKENS_FILE: &str = "train.bin";
pub const VALID_TOKENS_FILE: &str = "valid.bin";
pub const TOKENIZATION_FILE: &str = "tokenization.json";
pub const TOKENIZER_FILE: &str = "tokenizer.json";
pub const TOKENIZER_CONFIG_FILE: &str = "tokenizer_config.json";

/// The token that ends every document, and begins generated text.
pub const END_OF_TEXT: &str = "<|endoftext|>";

/// `tokenization.json`: how to read the token files, which are plain little-endian integers.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TokenizationMeta {
    pub format_version: i64,
    pub dtype: TokenDtype,
    pub vocab_size: i64,
    pub train_tokens: i64,
    pub valid_tokens: i64,
    pub eos_token_id: i64,
}

/// The integers of the token files.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum TokenDtype {
    /// While the vocabulary allows it.
    U16,
    U32,
}

impl TokenDtype {
    pub fn of_vocab(vocab_size: i64) -> Self {
        if vocab_size > 1 << 16 { Self::U32 } else { Self::U16 }
    }

    pub fn bytes(self) -> usize {
        match self {
            Self::U16 => 2,
            Self::U32 => 4,
        }
    }
}
