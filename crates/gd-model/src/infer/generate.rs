//! Text generation: continues prompts token by token with a cache of keys and values.

use candle_core::{DType, Device, Tensor};
use gd_kernels::Mask;
use gd_layer::{LayerCache, Pass};

use crate::error::{Error, Result};
use crate::infer::sampler::{Sampler, Sampling};
use crate::io::tokenizer::Tokenizer;
use crate::model::Transformer;

/// The maximal number of new tokens of a [`sample`].
const SAMPLE_TOKENS: usize = 200;

/// Checks that the model can continue `prompt`.
///
/// # Errors
/// [`Error::PromptLength`] for an empty prompt, or one longer than `max_position_embeddings`; [`Error::UnknownToken`] for a
/// token that the model lacks.
pub fn check_prompt(model: &Transformer, prompt: &[u32]) -> Result<()> {
    let limit = model.config().max_position_embeddings;
    if !(1..=limit).contains(&prompt.len()) {
        return Err(Error::PromptLength { tokens: prompt.len(), limit });
    }
    model.config().check_ids(prompt)
}

/// Continues `prompt` by up to `max_tokens` tokens and returns the new tokens. Generation also ends where the positions of
/// the model end, and when `emit`, which is called with every new token, returns `false`; that token is the last one
/// returned. The end tokens of the model do not end a text by themselves: `emit` compares them (see
/// [`Loaded::end_tokens`](crate::model::pretrained::Loaded::end_tokens)).
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
/// // An untrained model; `gd_model::load` loads a trained one.
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
/// As [`check_prompt`]; the error of `emit`; logits that are not finite.
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

/// A sequence that is being continued.
struct Sequence {
    /// The index of its prompt.
    prompt: usize,
    /// The prompt and its continuation.
    tokens: Vec<u32>,
    /// The number of tokens that may still be added.
    remaining: usize,
}

/// Continues several prompts as one batch, each with its own sampler. Every prompt gets the tokens that [`generate`] gives
/// it alone. `emit` is called with the index of the prompt and the new token, and returns whether this sequence continues.
/// Returns the new tokens of every prompt.
///
/// The prompts are processed one after the other. Afterwards, all unfinished sequences form one batch, in which each has
/// its own position and its own cache.
///
/// # Errors
/// As [`generate`], or [`Error::Invalid`] if the numbers of prompts and samplers differ.
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
    // Samples the next token of a sequence from its logits and returns whether the sequence continues.
    let mut next = |sequence: &mut Sequence, logits: &[f32]| -> Result<bool> {
        let token = samplers[sequence.prompt].next(logits, &sequence.tokens)?;
        sequence.tokens.push(token);
        sequence.remaining -= 1;
        new[sequence.prompt].push(token);
        Ok(emit(sequence.prompt, token)? && sequence.remaining > 0)
    };
    let (mut sequences, mut caches) = (Vec::new(), Vec::new());
    for (prompt, tokens) in prompts.iter().enumerate() {
        let tokens = tokens.as_ref().to_vec();
        // The last sampled token is not an input, so the sequence may be one token longer than the context.
        let remaining = max_tokens.min(model.config().max_position_embeddings + 1 - tokens.len());
        if remaining == 0 {
            continue;
        }
        let mut cache = model.new_cache();
        let ids = Tensor::new(tokens.as_slice(), device)?.unsqueeze(0)?;
        let logits = last_logits(model, &ids, &Pass::new(&Mask::causal(0)), &mut cache)?;
        let mut sequence = Sequence { prompt, tokens, remaining };
        if next(&mut sequence, &logits[0])? {
            sequences.push(sequence);
            caches.push(cache);
        }
    }
    let layers = 0..model.config().num_hidden_layers;
    let stack = |layer| LayerCache::stack(&caches.iter().map(|cache| &cache[layer]).collect::<Vec<_>>());
    let mut cache = layers.map(stack).collect::<candle_core::Result<Vec<_>>>()?;
    drop(caches);
    while !sequences.is_empty() {
        let ids: Vec<u32> = sequences.iter().filter_map(|sequence| sequence.tokens.last().copied()).collect();
        let ids = Tensor::new(ids, device)?.unsqueeze(1)?;
        let positions = sequences.iter().map(|sequence| sequence.tokens.len() as i64 - 1);
        let mask = Mask::causal(0).with_offsets(positions.collect());
        let logits = last_logits(model, &ids, &Pass::new(&mask), &mut cache)?;
        let (mut indices, mut unfinished) = (Vec::new(), Vec::new());
        for (index, (mut sequence, logits)) in sequences.drain(..).zip(&logits).enumerate() {
            if next(&mut sequence, logits)? {
                indices.push(index);
                unfinished.push(sequence);
            }
        }
        sequences = unfinished;
        if sequences.len() < logits.len() {
            for layer in &mut cache {
                *layer = layer.select(&indices)?;
            }
        }
    }
    Ok(new)
}

/// The logits `[B, V]` after the last of the tokens `ids` `[B, N]`, which follow the positions in `cache`.
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
    // On Metal, the failure of an earlier command is reported by `synchronize` only.
    logits.device().synchronize()?;
    Ok(values)
}

/// Continues `prompt` by up to 200 tokens with temperature 0.7 and top-p 0.95, up to the end-of-text token, and returns the
/// new text. The result depends on the model, the prompt and the seed only.
///
/// # Errors
/// As [`generate`].
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
    let (mut decoder, mut text) = (tokenizer.stream_after(&prompt)?, String::new());
    generate(model, &prompt, SAMPLE_TOKENS, &mut sampler, device, |token| {
        if Some(token) == end {
            return Ok(false);
        }
        text.extend(decoder.push(token)?);
        Ok(true)
    })?;
    text.extend(decoder.finish()?);
    Ok(text)
}
