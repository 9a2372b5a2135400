//! Whether a `tokenizer.json` is one that texts can be tokenized with for the model.

use std::panic::catch_unwind;

use tokenizers::Tokenizer;

/// What keeps the tokenizer from being the model's. Takes seconds for a large vocabulary.
pub fn check_tokenizer(content: &[u8], vocab_size: Option<i64>) -> Option<String> {
    // The library panics at some files.
    let tokenizer = match catch_unwind(|| Tokenizer::from_bytes(content)) {
        Ok(Ok(tokenizer)) => tokenizer,
        Ok(Err(error)) => return Some(format!("cannot be read by the tokenizers library: {error}")),
        Err(_) => return Some("cannot be read by the tokenizers library".into()),
    };
    let last_id = tokenizer.get_vocab(true).values().copied().max().map(i64::from);
    match (last_id, vocab_size) {
        (None, _) => Some("has no tokens".into()),
        (Some(last_id), Some(vocab_size)) if last_id >= vocab_size => {
            Some(format!("has tokens up to the id {last_id}; the vocab_size in config.json is {vocab_size}"))
        }
        _ => None,
    }
}
