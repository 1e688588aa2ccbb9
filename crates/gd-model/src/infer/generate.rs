//! Token by token: prompts in, continuations out, with a cache of what was read.

use candle_core::{DType, Device, Tensor};
use gd_kernels::Mask;
use gd_layer::{LayerCache, Pass};

use crate::error::{Error, Result};
use crate::infer::sampler::{Sampler, Sampling};
use crate::io::tokenizer::Tokenizer;
use crate::model::Transformer;

/// Tokens of a [`sample`].
const SAMPLE: usize = 200;

/// Whether the model can continue `prompt`.
///
/// # Errors
/// An empty prompt, or one longer than the model's context.
pub fn check_prompt(model: &Transformer, prompt: &[u32]) -> Result<()> {
    let limit = model.config().max_position_embeddings;
    match (1..=limit).contains(&prompt.len()) {
        true => Ok(()),
        false => Err(Error::PromptLength { tokens: prompt.len(), limit }),
    }
}

/// Continues `prompt` by up to `max_tokens` tokens, as many as the model has positions for. Each
/// new token goes to `emit`, which returns whether to go on. Returns the new tokens.
///
/// ```
/// use candle_core::{DType, Device};
/// use gd_model::config::Recipe;
/// use gd_model::infer::generate::generate;
/// use gd_model::infer::sampler::{Sampler, Sampling};
/// use gd_model::io::tokenizer::Tokenizer;
/// use gd_model::model::Transformer;
/// use gd_model::model::params::Params;
///
/// // An untrained model; `gd_model::model::pretrained::load` loads one from a folder.
/// let params = Params::new(0, DType::F32, &Device::Cpu);
/// let model = Transformer::new(&Recipe::load("tiny")?.model, params.frozen())?;
///
/// let prompt = Tokenizer::bytes()?.encode("Call me")?;
/// let mut sampler = Sampler::new(Sampling::default(), 7)?;
/// let new = generate(&model, &prompt, 5, &mut sampler, &Device::Cpu, |_token| Ok(true))?;
/// assert_eq!(new.len(), 5);
/// # Ok::<(), gd_model::Error>(())
/// ```
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
    let samplers = std::slice::from_mut(sampler);
    let new = generate_batch(model, &[prompt], max_tokens, samplers, device, |_, token| emit(token))?;
    Ok(new.into_iter().flatten().collect())
}

/// A text that is being continued.
struct Row {
    /// Its place among the prompts.
    place: usize,
    /// Prompt and continuation.
    all: Vec<u32>,
    /// The most tokens to add.
    left: usize,
}

/// Continues several prompts together, each with its sampler as [`generate`] does it alone. `emit` gets the
/// place of the prompt and the new token, and returns whether that text goes on.
///
/// Prompts are read one by one; from then on all that go on are one batch, in which each has its own
/// position and sees its own past alone.
///
/// # Errors
/// As [`generate`], or another number of samplers.
pub fn generate_batch(
    model: &Transformer,
    prompts: &[impl AsRef<[u32]>],
    max_tokens: usize,
    samplers: &mut [Sampler],
    device: &Device,
    mut emit: impl FnMut(usize, u32) -> Result<bool>,
) -> Result<Vec<Vec<u32>>> {
    if prompts.len() != samplers.len() {
        return Err(Error::Invalid(format!("{} samplers for {} prompts", samplers.len(), prompts.len())));
    }
    for prompt in prompts {
        check_prompt(model, prompt.as_ref())?;
    }
    let mut new = vec![Vec::new(); prompts.len()];
    // Takes the next token of a row from its logits; whether it goes on.
    let mut next = |row: &mut Row, logits: &[f32]| -> Result<bool> {
        let token = samplers[row.place].next(logits, &row.all)?;
        row.all.push(token);
        row.left -= 1;
        new[row.place].push(token);
        Ok(emit(row.place, token)? && row.left > 0)
    };
    let (mut rows, mut caches) = (Vec::new(), Vec::new());
    for (place, prompt) in prompts.iter().enumerate() {
        let all = prompt.as_ref().to_vec();
        // The last token drawn is not read, so the text may be one longer than the context.
        let left = max_tokens.min(model.config().max_position_embeddings + 1 - all.len());
        if left == 0 {
            continue;
        }
        let mut cache = model.new_cache();
        let ids = Tensor::new(all.as_slice(), device)?.unsqueeze(0)?;
        let logits = last_logits(model, &ids, &Pass::new(&Mask::causal(0)), &mut cache)?;
        let mut row = Row { place, all, left };
        if next(&mut row, &logits[0])? {
            rows.push(row);
            caches.push(cache);
        }
    }
    let layers = 0..model.config().num_hidden_layers;
    let stack = |layer| LayerCache::stack(&caches.iter().map(|cache| &cache[layer]).collect::<Vec<_>>());
    let mut cache = layers.map(stack).collect::<candle_core::Result<Vec<_>>>()?;
    drop(caches);
    while !rows.is_empty() {
        let ids: Vec<u32> = rows.iter().filter_map(|row| row.all.last().copied()).collect();
        let ids = Tensor::new(ids, device)?.unsqueeze(1)?;
        let mask = Mask::causal(0).with_offsets(rows.iter().map(|row| row.all.len() as i64 - 1).collect());
        let logits = last_logits(model, &ids, &Pass::new(&mask), &mut cache)?;
        let (mut places, mut left) = (Vec::new(), Vec::new());
        for (at, (mut row, logits)) in rows.drain(..).zip(&logits).enumerate() {
            if next(&mut row, logits)? {
                places.push(at);
                left.push(row);
            }
        }
        rows = left;
        if rows.len() < logits.len() {
            for layer in &mut cache {
                *layer = layer.select(&places)?;
            }
        }
    }
    Ok(new)
}

/// The logits `[B, V]` after the last of `ids` `[B, N]`, which continue what the cache holds.
pub(crate) fn last_logits(
    model: &Transformer,
    ids: &Tensor,
    pass: &Pass,
    cache: &mut [LayerCache],
) -> candle_core::Result<Vec<Vec<f32>>> {
    let hidden = model.hidden(ids, pass, Some(cache))?;
    let last = hidden.narrow(1, ids.dim(1)? - 1, 1)?;
    let logits = model.logits(&last)?.detach().to_dtype(DType::F32)?.squeeze(1)?;
    let values = logits.to_vec2()?;
    // Metal reports commands that failed before the last ones only when it is waited for as a whole.
    logits.device().synchronize()?;
    Ok(values)
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
