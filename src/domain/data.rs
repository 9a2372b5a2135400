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
    /// `u16` while the vocabulary allows it, else `u32`.
    pub dtype: String,
    pub vocab_size: i64,
    pub train_tokens: i64,
    pub valid_tokens: i64,
    pub eos_token_id: i64,
}
