//! Token by token: prompt in, continuation out, with a cache of what was read.

use candle_core::{DType, Device, Tensor};
use gd_kernels::Mask;
use gd_layer::Pass;

use crate::error::{Error, Result};
use crate::sampler::{Sampler, Sampling};
use crate::tokenizer::Tokenizer;
use crate::transformer::Transformer;

/// Tokens of a [`sample`].
const SAMPLE: usize = 200;

/// Whether the model can continue `prompt`.
///
/// # Errors
/// An empty prompt, or one longer than the model's context.
pub fn check_prompt(model: &Transformer, prompt: &[u32]) -> Result<()> {
    let limit = model.config().max_position_embeddings;
    if prompt.is_empty() {
        return Err(Error::Invalid("the prompt has no tokens".into()));
    }
    if prompt.len() > limit {
        return Err(Error::Invalid(format!(
            "a prompt of {} tokens exceeds the context of {limit}",
            prompt.len()
        )));
    }
    Ok(())
}

/// Continues `prompt` by up to `max_tokens` tokens, as many as the model has positions for. Each
/// new token goes to `emit`, which returns whether to go on. Returns the new tokens.
///
/// # Errors
/// An empty prompt, or one longer than the model's context.
pub fn generate(
    model: &Transformer,
    prompt: &[u32],
    max_tokens: usize,
    sampler: &mut Sampler,
    device: &Device,
    mut emit: impl FnMut(u32) -> Result<bool>,
) -> Result<Vec<u32>> {
    check_prompt(model, prompt)?;
    let mut cache = model.new_cache();
    let mut all = prompt.to_vec();
    let mut next = prompt.to_vec();
    // The last token drawn is not read, so the text may be one longer than the context.
    let count = max_tokens.min(model.config().max_position_embeddings + 1 - prompt.len());
    for _ in 0..count {
        let offset = all.len() - next.len();
        let mask = Mask::causal(offset as i64);
        let ids = Tensor::new(next.as_slice(), device)?.unsqueeze(0)?;
        let hidden = model.hidden(&ids, &Pass::new(&mask), Some(&mut cache))?;
        let last = hidden.narrow(1, next.len() - 1, 1)?;
        let logits = model.logits(&last)?.detach().to_dtype(DType::F32)?.flatten_all()?.to_vec1::<f32>()?;
        let token = sampler.next(&logits, &all)?;
        all.push(token);
        next = vec![token];
        if !emit(token)? {
            break;
        }
    }
    Ok(all.split_off(prompt.len()))
}

/// A look at what a model writes: the continuation of `prompt`, as the same model, prompt and seed give it.
///
/// # Errors
/// An empty prompt, or one longer than the model's context.
pub fn sample(
    model: &Transformer,
    tokenizer: &Tokenizer,
    prompt: &str,
    seed: u64,
    device: &Device,
) -> Result<String> {
    let (prompt, end) = (tokenizer.encode(prompt)?, tokenizer.end_of_text());
    let sampling = Sampling { temperature: 0.7, top_p: Some(0.95), ..Sampling::default() };
    let mut sampler = Sampler::new(sampling, seed)?;
    let mut new = generate(model, &prompt, SAMPLE, &mut sampler, device, |token| Ok(Some(token) != end))?;
    new.pop_if(|token| Some(*token) == end);
    tokenizer.decode(&new)
}
