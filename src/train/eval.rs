//! Looking at the model without changing it: the validation loss, and text continued from prompts.

use std::path::Path;

use tch::{Device, Kind, Tensor};
use tokenizers::Tokenizer;

use super::{
    data::{Dataset, Split},
    engine::Engine,
    error::TrainError,
    random::{Draws, Purpose},
};
use crate::domain::spec::TrainSpec;

const MAX_NEW_TOKENS: i64 = 64;
/// Low enough to stay on the subject, high enough to leave a loop.
const TEMPERATURE: f64 = 0.7;

/// Mean loss over the first rows of the validation split.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Evaluation {
    pub loss: f64,
    /// Tokens that were predicted: the mean's weight.
    pub num_tokens: i64,
}

/// The mean loss; `None` if it is interrupted, which is asked for between micro-batches.
pub fn evaluate(
    engine: &mut Engine,
    split: &Split,
    spec: &TrainSpec,
    device: Device,
    mut is_interrupted: impl FnMut() -> bool,
) -> Option<Evaluation> {
    let sequence_length = spec.batch.sequence_length;
    let num_rows = (spec.eval.max_tokens / sequence_length).clamp(1, split.num_rows);
    // Settled in the spec of every run.
    let micro_batch_seqs = spec.batch.micro_batch_seqs.seqs().unwrap_or(1);
    let mut summed_loss = 0.0;
    let mut first_row = 0;
    while first_row < num_rows {
        if is_interrupted() {
            return None;
        }
        let end = (first_row + micro_batch_seqs).min(num_rows);
        let rows = split.rows(first_row..end, device);
        summed_loss += engine.summed_loss(&rows).double_value(&[]); // device sync
        first_row = end;
    }
    let num_tokens = num_rows * (sequence_length - 1);
    Some(Evaluation { loss: summed_loss / num_tokens as f64, num_tokens })
}

/// Continues every prompt of the spec. The draws depend on the seed and the prompt's place alone. `alive` is called before
/// every token.
pub fn sample(
    engine: &mut Engine,
    dataset: &Dataset,
    spec: &TrainSpec,
    device: Device,
    alive: impl Fn(),
) -> Result<Vec<(String, String)>, TrainError> {
    if spec.eval.prompts.is_empty() {
        return Ok(Vec::new());
    }
    let _guard = tch::no_grad_guard();
    let path = dataset.dir.join("tokenizer.json");
    let mut tokenizer = Tokenizer::from_file(&path).map_err(|error| TrainError::data(&path, error))?;
    // A checkpoint's tokenizer may have been saved with lengths that its owner trained with.
    tokenizer.with_padding(None).with_truncation(None).map_err(|error| TrainError::data(&path, error))?;
    let prompts = spec.eval.prompts.iter().enumerate();
    prompts
        .map(|(index, prompt)| {
            let tokens = encode(&tokenizer, &path, prompt, dataset)?;
            let all = continue_tokens(
                engine,
                tokens,
                |position, len| {
                    alive();
                    let draws = Draws::new(spec.seed, Purpose::Sampling, [index as i64, position]);
                    Tensor::from_slice(&draws.gumbel(len)).to_device(device)
                },
                spec,
                dataset.tokenization.eos_token_id,
            );
            let ids: Vec<_> = all.into_iter().map(|token| token as u32).collect();
            let text = tokenizer.decode(&ids, true).map_err(|error| TrainError::data(&path, error))?;
            Ok((prompt.clone(), text))
        })
        .collect()
}

/// The prompt's tokens that a model of this vocabulary knows; an empty prompt begins like a document.
fn encode(tokenizer: &Tokenizer, path: &Path, prompt: &str, dataset: &Dataset) -> Result<Vec<i64>, TrainError> {
    let encoding = tokenizer.encode(prompt, false).map_err(|error| TrainError::data(path, error))?;
    let vocab_size = dataset.tokenization.vocab_size;
    let mut tokens: Vec<_> = encoding.get_ids().iter().map(|&id| i64::from(id)).filter(|&id| id < vocab_size).collect();
    if tokens.is_empty() {
        tokens.push(dataset.tokenization.eos_token_id);
    }
    Ok(tokens)
}

fn continue_tokens(
    engine: &mut Engine,
    mut tokens: Vec<i64>,
    noise: impl Fn(i64, usize) -> Tensor,
    spec: &TrainSpec,
    eos_token_id: i64,
) -> Vec<i64> {
    for position in 0..MAX_NEW_TOKENS {
        // The model has learned on rows of this length and no longer.
        let context = &tokens[tokens.len().saturating_sub(spec.batch.sequence_length as usize)..];
        let noise = noise(position, spec.model.vocab_size as usize);
        let context = Tensor::from_slice(context).view([1, -1]).to_device(noise.device());
        let logits = engine.logits(&context).select(0, -1); // (v)
        let next = (logits.to_kind(Kind::Float) / TEMPERATURE + noise).argmax(0, false).int64_value(&[]); // device sync
        if next == eos_token_id {
            break;
        }
        tokens.push(next);
    }
    tokens
}
