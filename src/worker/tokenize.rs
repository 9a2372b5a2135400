//! Turns raw text into tokens: trains a byte-level BPE on the training side, or takes the tokenizer of a checkpoint,
//! and encodes both sides.
//! Synchronous and without a database: `relora train --text` uses it as it is.

use std::{
    fs::File,
    io::{BufWriter, Write},
    path::Path,
};

use anyhow::{Context, Result, anyhow, ensure};
use serde_json::json;
use tokenizers::{
    AddedToken, DecoderWrapper, ModelWrapper, PostProcessorWrapper, PreTokenizerWrapper, Tokenizer,
    decoders::byte_level::ByteLevel,
    models::{
        TrainerWrapper,
        bpe::{BPE, BpeTrainer},
    },
};

use super::{
    checkpoint_tokenizer,
    documents::{Chunk, Documents},
};
use crate::domain::data::{
    END_OF_TEXT, TOKENIZATION_FILE, TOKENIZER_CONFIG_FILE, TOKENIZER_FILE, TRAIN_TOKENS_FILE, TokenDtype,
    TokenizationMeta, VALID_TOKENS_FILE,
};

/// What to make of a raw file.
#[derive(Debug, Clone)]
pub struct TokenizeRequest<'a> {
    pub raw: &'a Path,
    pub is_jsonl: bool,
    pub tokenizer: TokenizerSource<'a>,
    pub validation_frac: f64,
}

/// Where the tokenizer comes from.
#[derive(Debug, Clone, Copy)]
pub enum TokenizerSource<'a> {
    /// It is learned from the text.
    Text { vocab_size: i64 },
    /// From a checkpoint, some of whose files lie in this folder; its model has this vocabulary.
    Checkpoint { folder: &'a Path, vocab_size: i64 },
}

/// What came of it.
#[derive(Debug, Clone, Copy)]
pub struct Tokenized {
    pub tokenizer_vocab_size: i64,
    pub train_tokens: i64,
    pub valid_tokens: i64,
    pub train_documents: i64,
    pub valid_documents: i64,
}

/// Text that the tokenizer is trained on, at most: more changes the vocabulary hardly at all.
const TOKENIZER_SAMPLE_BYTES: usize = 256 << 20;
/// Text that is encoded at once, over all cores.
const BATCH_BYTES: usize = 16 << 20;

/// Writes the token files, their description and the tokenizer into `out`.
pub fn tokenize(request: &TokenizeRequest<'_>, out: &Path) -> Result<Tokenized> {
    let documents = Documents::open(request.raw, request.is_jsonl, request.validation_frac)?;
    let (mut tokenizer, eos_token_id, vocab_size) = match request.tokenizer {
        TokenizerSource::Text { vocab_size } => {
            let (tokenizer, eos_token_id) = learn(&documents, vocab_size, out)?;
            (tokenizer, eos_token_id, vocab_size)
        }
        TokenizerSource::Checkpoint { folder, vocab_size } => {
            let (tokenizer, eos_token_id) = checkpoint_tokenizer::take(folder, vocab_size, out)?;
            (tokenizer, eos_token_id, vocab_size)
        }
    };
    // From here on the text of a document is only text, even where it spells a special token.
    tokenizer.set_encode_special_tokens(true);

    let dtype = TokenDtype::of_vocab(vocab_size);
    let mut train = TokenFile::create(&out.join(TRAIN_TOKENS_FILE), dtype)?;
    let mut valid = TokenFile::create(&out.join(VALID_TOKENS_FILE), dtype)?;
    let mut batch = Vec::new();
    let mut batch_bytes = 0;
    let mut encode = |batch: &mut Vec<Chunk>| -> Result<()> {
        for (chunk, ids) in encode_batch(&tokenizer, std::mem::take(batch))? {
            let file = if chunk.held_out { &mut valid } else { &mut train };
            file.write(&ids)?;
            if chunk.ends_document {
                file.write(&[eos_token_id])?;
            }
        }
        Ok(())
    };
    for chunk in documents.chunks()? {
        let chunk = chunk?;
        batch_bytes += chunk.text.len();
        batch.push(chunk);
        if batch_bytes >= BATCH_BYTES {
            encode(&mut batch)?;
            batch_bytes = 0;
        }
    }
    encode(&mut batch)?;

    let meta = TokenizationMeta {
        format_version: 1,
        dtype,
        vocab_size,
        train_tokens: train.finish()?,
        valid_tokens: valid.finish()?,
        eos_token_id: i64::from(eos_token_id),
    };
    ensure!(
        meta.train_tokens > 0 && meta.valid_tokens > 0,
        "the text gives {} training and {} validation tokens; both splits need some: upload more text",
        meta.train_tokens,
        meta.valid_tokens
    );
    std::fs::write(out.join(TOKENIZATION_FILE), serde_json::to_vec_pretty(&meta)?)?;
    Ok(Tokenized {
        tokenizer_vocab_size: tokenizer.get_vocab_size(true) as i64,
        train_tokens: meta.train_tokens,
        valid_tokens: meta.valid_tokens,
        train_documents: documents.num_train,
        valid_documents: documents.num_valid,
    })
}

/// A tokenizer for the training text, written to `out`, and the token that ends a text.
fn learn(documents: &Documents, vocab_size: i64, out: &Path) -> Result<(Tokenizer, u32)> {
    let tokenizer = train_bpe(documents, vocab_size)?;
    tokenizer.save(out.join(TOKENIZER_FILE), false).map_err(|error| anyhow!(error)).context("write tokenizer.json")?;
    std::fs::write(out.join(TOKENIZER_CONFIG_FILE), serde_json::to_vec_pretty(&tokenizer_config(END_OF_TEXT))?)?;
    let eos_token_id = tokenizer.token_to_id(END_OF_TEXT).context("find the end-of-text token")?;
    Ok((tokenizer, eos_token_id))
}

fn train_bpe(documents: &Documents, vocab_size: i64) -> Result<Tokenizer> {
    let byte_level = ByteLevel::new(false, false, true);
    let mut tokenizer = Tokenizer::new(ModelWrapper::BPE(BPE::default()));
    tokenizer
        .with_pre_tokenizer(Some(PreTokenizerWrapper::ByteLevel(byte_level)))
        .with_decoder(Some(DecoderWrapper::ByteLevel(byte_level)))
        .with_post_processor(None::<PostProcessorWrapper>);
    let mut trainer = TrainerWrapper::BpeTrainer(
        BpeTrainer::builder()
            .vocab_size(usize::try_from(vocab_size)?)
            .show_progress(false)
            .special_tokens(vec![AddedToken::from(END_OF_TEXT, true)])
            .initial_alphabet(ByteLevel::alphabet().into_iter().collect())
            .build(),
    );
    // The trainer takes an iterator that cannot fail: the first failure ends it and is kept aside.
    let (mut failure, mut num_bytes) = (None, 0);
    let sample = documents.chunks()?.map_while(|chunk| match chunk {
        Ok(chunk) if num_bytes < TOKENIZER_SAMPLE_BYTES => {
            num_bytes += chunk.text.len();
            Some(if chunk.held_out { String::new() } else { chunk.text })
        }
        Ok(_) => None,
        Err(error) => {
            failure = Some(error);
            None
        }
    });
    tokenizer.train(&mut trainer, sample).map_err(|error| anyhow!(error)).context("train the tokenizer")?;
    match failure {
        Some(error) => Err(error),
        None => Ok(tokenizer),
    }
}

fn encode_batch(tokenizer: &Tokenizer, batch: Vec<Chunk>) -> Result<Vec<(Chunk, Vec<u32>)>> {
    let texts: Vec<&str> = batch.iter().map(|chunk| chunk.text.as_str()).collect();
    let encodings =
        tokenizer.encode_batch_fast(texts, false).map_err(|error| anyhow!(error)).context("encode the text")?;
    Ok(batch.into_iter().zip(encodings.iter().map(|encoding| encoding.get_ids().to_vec())).collect())
}

/// What `transformers.AutoTokenizer` wants to see beside `tokenizer.json`.
fn tokenizer_config(end_of_text: &str) -> serde_json::Value {
    json!({
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": end_of_text,
        "eos_token": end_of_text,
        "add_prefix_space": false,
        "clean_up_tokenization_spaces": false,
    })
}

/// A file of little-endian integers.
struct TokenFile {
    file: BufWriter<File>,
    dtype: TokenDtype,
    num_tokens: i64,
}

impl TokenFile {
    fn create(path: &Path, dtype: TokenDtype) -> Result<Self> {
        let file = File::create(path).with_context(|| format!("create {}", path.display()))?;
        Ok(Self { file: BufWriter::with_capacity(1 << 20, file), dtype, num_tokens: 0 })
    }

    fn write(&mut self, ids: &[u32]) -> Result<()> {
        for id in ids {
            self.file.write_all(&id.to_le_bytes()[..self.dtype.bytes()])?;
        }
        self.num_tokens += ids.len() as i64;
        Ok(())
    }

    fn finish(mut self) -> Result<i64> {
        self.file.flush()?;
        Ok(self.num_tokens)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tokens_decode_to_the_text_and_special_tokens_cannot_be_smuggled_in() {
        let folder = std::env::temp_dir().join(format!("relora-tokenize-{}", std::process::id()));
        std::fs::create_dir_all(&folder).unwrap();
        let raw = folder.join("raw");
        let text: String =
            (0..2_000).map(|i| format!("fn line_{i}() {{ höher({i}) }}\n\n    // {END_OF_TEXT}\n")).collect();
        std::fs::write(&raw, &text).unwrap();
        let tokenizer = TokenizerSource::Text { vocab_size: 400 };
        let request = TokenizeRequest { raw: &raw, is_jsonl: false, tokenizer, validation_frac: 0.1 };

        let tokenized = tokenize(&request, &folder).unwrap();

        let read = |name: &str| -> Vec<u32> {
            let bytes = std::fs::read(folder.join(name)).unwrap();
            bytes.chunks_exact(2).map(|b| u32::from(u16::from_le_bytes([b[0], b[1]]))).collect()
        };
        let (train, valid) = (read(TRAIN_TOKENS_FILE), read(VALID_TOKENS_FILE));
        assert_eq!((train.len() as i64, valid.len() as i64), (tokenized.train_tokens, tokenized.valid_tokens));
        assert_eq!(tokenized.tokenizer_vocab_size, 400);
        let tokenizer = Tokenizer::from_file(folder.join(TOKENIZER_FILE)).unwrap();
        let eos = tokenizer.token_to_id(END_OF_TEXT).unwrap();
        let all: Vec<u32> = train.into_iter().chain(valid).collect();
        assert_eq!(all.iter().filter(|&&id| id == eos).count(), 1);
        assert_eq!(all.last(), Some(&eos));
        assert_eq!(tokenizer.decode(&all[..all.len() - 1], false).unwrap(), text);
        std::fs::remove_dir_all(folder).unwrap();
    }
}
