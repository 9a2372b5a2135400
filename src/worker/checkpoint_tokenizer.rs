//! The tokenizer of a checkpoint, put to use on text: as it is, but for what would change the length of a text.

use std::{fs, path::Path};

use anyhow::{Context, Result, anyhow, bail, ensure};
use serde_json::{Value, json};
use tokenizers::Tokenizer;

use crate::domain::{
    checkpoint::{EndOfText, TOKENIZER_FILES, end_of_text},
    data::{TOKENIZER_CONFIG_FILE, TOKENIZER_FILE},
};

/// Reads the tokenizer from a checkpoint's folder and copies its files to `out`. Returns it with the token that ends a
/// text.
pub fn take(folder: &Path, vocab_size: i64, out: &Path) -> Result<(Tokenizer, u32)> {
    let mut tokenizer = Tokenizer::from_file(folder.join(TOKENIZER_FILE))
        .map_err(|error| anyhow!(error))
        .context("read the checkpoint's tokenizer.json")?;
    let last_id = tokenizer.get_vocab(true).into_values().max().unwrap_or_default();
    ensure!(
        i64::from(last_id) < vocab_size,
        "the checkpoint's tokenizer has tokens up to the id {last_id}, its model a vocabulary of {vocab_size}"
    );
    let eos_token_id = end_of_text_id(folder, &tokenizer)?;
    for name in TOKENIZER_FILES {
        let file = folder.join(name);
        if file.exists() {
            fs::copy(&file, out.join(name)).with_context(|| format!("copy {}", file.display()))?;
        }
    }
    if !folder.join(TOKENIZER_CONFIG_FILE).exists() {
        let config = json!({
            "tokenizer_class": "PreTrainedTokenizerFast", "eos_token": tokenizer.id_to_token(eos_token_id),
        });
        fs::write(out.join(TOKENIZER_CONFIG_FILE), serde_json::to_vec_pretty(&config)?)?;
    }
    // They are for single inputs to a model: documents are cut to sequences later, and never filled up.
    tokenizer.with_truncation(None).map_err(|error| anyhow!(error))?.with_padding(None);
    Ok((tokenizer, eos_token_id))
}

fn end_of_text_id(folder: &Path, tokenizer: &Tokenizer) -> Result<u32> {
    let read = |name: &str| serde_json::from_slice::<Value>(&fs::read(folder.join(name)).ok()?).ok();
    let id = match end_of_text(read) {
        None => bail!("the checkpoint does not say which token ends a text"),
        Some(EndOfText::Id(id)) => u32::try_from(id).ok().filter(|&id| tokenizer.id_to_token(id).is_some()),
        Some(EndOfText::Token(ref token)) => tokenizer.token_to_id(token),
    };
    id.context("the checkpoint names a token as the end of a text that its tokenizer does not have")
}
