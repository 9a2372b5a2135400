//! A checkpoint from outside, in the `transformers` layout: which files it has, which model its configuration
//! describes, which tensors that model has, and what is wrong with those that are there.
//!
//! Pure: whoever reads the files, the API through ranges of objects or the trainer through mapped files, asks here.

mod config;
mod excerpt;
mod files;
mod tensors;
mod tokenizer;
mod weights;

pub use config::{END_OF_TEXT_FILES, EndOfText, end_of_text, model_of_config, read_config};
pub use excerpt::{Excerpt, check_config};
pub use files::{
    CONFIG_FILE, GENERATION_CONFIG_FILE, INDEX_FILE, SPECIAL_TOKENS_FILE, TAKEN_FILES, TOKENIZER_FILES, check_set,
    is_staged, is_taken, is_weights, max_bytes, too_large,
};
pub use tensors::{EMBEDDING, HEAD, TensorShape, linear_path, tensors};
pub use weights::{Shard, WeightDtype, check_index, check_tensors, header_bytes, read_header};

/// Files of one checkpoint; the largest models come in fewer.
pub const MAX_FILES: usize = 256;
/// Problems that one refusal names; a file of noise could have millions.
pub const MAX_PROBLEMS: usize = 100;
