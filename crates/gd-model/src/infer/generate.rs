//! Text generation: continues prompts token by token with a cache of keys and values.

use candle_core::{DType, Device, Tensor};
use gd_layer::{LayerCache, Pass};

use crate::error::{Error, Result};
use crate::infer::engine::{BatchEngine, EngineLimits, Event, Request};
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

/// Continues several prompts as one batch, each with its own sampler. Every prompt gets the tokens that [`generate`] gives
/// it alone. `emit` is called with the index of the prompt and the new token, and returns whether this sequence continues.
/// Returns the new tokens of every prompt.
///
/// The prompts are processed one after the other. Afterwards, all unfinished sequences form one batch, in which each has
/// its own position and its own cache ([`BatchEngine`]).
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
    let limits = EngineLimits { sequences: prompts.len().max(1), ..EngineLimits::default() };
    let mut engine = BatchEngine::new(model, device, limits)?;
    for (prompt, sampler) in prompts.iter().zip(samplers) {
        let sample = Box::new(|logits: &[f32], tokens: &[u32]| sampler.next(logits, tokens));
        engine.submit(Request::sampled_by(prompt.as_ref().to_vec(), max_tokens, sample))?;
    }
    let mut new = vec![Vec::new(); prompts.len()];
    let mut failure = None;
    while failure.is_none() && !engine.is_idle() {
        engine.step(|id, event| {
            let goes_on = match event {
                Event::Prompt(_) => return true,
                Event::Token(generated) => {
                    new[id as usize].push(generated.token);
                    emit(id as usize, generated.token)
                }
                Event::Failed(error) => Err(error),
            };
            goes_on.unwrap_or_else(|error| {
                failure.get_or_insert(error);
                false
            })
        })?;
    }
    match failure {
        Some(error) => Err(error),
        None => Ok(new),
    }
}

/// The logits `[B, V]` after the last of the tokens `ids` `[B, N]`, which follow the positions in `cache`.
pub(crate) fn last_logits(
    model: &Transformer,
    ids: &Tensor,
    pass: &Pass,
    cache: &mut [LayerCache],
) -> candle_core::Result<Vec<Vec<f32>>> {
    let hidden = model.hidden(ids, pass, Some(cache))?;
    logits_of(model, &hidden.narrow(1, ids.dim(1)? - 1, 1)?)
}

/// The logits `[B * N, V]` of hidden states `[B, N, C]`.
pub(crate) fn logits_of(model: &Transformer, hidden: &Tensor) -> candle_core::Result<Vec<Vec<f32>>> {
    let logits = model.logits(hidden)?.detach().to_dtype(DType::F32)?.flatten_to(1)?;
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
