//! Continuous batching: sequences enter and leave a batch between its steps.
//!
//! A step of [`BatchEngine`] reads a part of the prompts that wait, up to a number of tokens, and then adds one token to
//! every sequence of the batch. The prompt of a sequence is cut where its position is a multiple of that number, whatever
//! else the engine does, so that the load does not change what is computed for it. Caches of finished texts are stored for
//! prompts that begin with the same tokens, as the next turn of a chat does.

mod prefix;
mod sources;

use std::collections::VecDeque;

use candle_core::{Device, Tensor};
use gd_kernels::{Mask, on_pool};
use gd_layer::{LayerCache, Pass, Probe};

pub use self::sources::Source;

use self::prefix::PrefixStore;
use self::sources::SourceProbe;
use crate::error::{Error, Result};
use crate::infer::generate::{check_prompt, last_logits, logits_of};
use crate::infer::logprobs::TokenLogprobs;
use crate::infer::sampler::Sampler;
use crate::model::Transformer;

/// Tokens of a prompt that are read at a time by default: more are hardly faster, and their hidden states take more memory.
const TOKENS_PER_STEP: usize = 512;

/// New tokens for which the cache of a prompt has memory from the start. It grows for longer answers, which are not known
/// beforehand.
const RESERVED_TOKENS: usize = 1024;

/// How much a [`BatchEngine`] does at a time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct EngineLimits {
    /// The maximal number of sequences in the batch, at least 1; others wait.
    pub sequences: usize,
    /// The maximal number of tokens of prompts that a step reads, at least 1. Each sequence of the batch adds one token.
    pub tokens_per_step: usize,
    /// The maximal number of tokens whose caches are stored for later prompts.
    pub stored_tokens: usize,
}

impl Default for EngineLimits {
    /// One sequence at a time, 512 tokens of a prompt at a time, nothing stored.
    fn default() -> Self {
        Self { sequences: 1, tokens_per_step: TOKENS_PER_STEP, stored_tokens: 0 }
    }
}

/// Samples a token from logits `[V]`, given all tokens before it.
pub type Sample<'a> = Box<dyn FnMut(&[f32], &[u32]) -> Result<u32> + 'a>;

/// A prompt to continue.
pub struct Request<'a> {
    /// The prompt.
    pub prompt: Vec<u32>,
    /// The maximal number of new tokens.
    pub max_tokens: usize,
    /// Samples the new tokens.
    pub sample: Sample<'a>,
    /// How many of the most probable tokens are reported with each token; `None` for no log-probabilities.
    pub logprobs: Option<usize>,
    /// Whether log-probabilities of the prompt are reported, too. The prompt is then read from its first token on.
    pub prompt_logprobs: bool,
    /// Whether the sources of each token are reported.
    pub sources: bool,
}

impl<'a> Request<'a> {
    /// A request for tokens alone.
    pub fn new(prompt: Vec<u32>, max_tokens: usize, mut sampler: Sampler) -> Self {
        Self::sampled_by(prompt, max_tokens, Box::new(move |logits, tokens| sampler.next(logits, tokens)))
    }

    /// A request for tokens alone, which `sample` samples.
    pub fn sampled_by(prompt: Vec<u32>, max_tokens: usize, sample: Sample<'a>) -> Self {
        Self { prompt, max_tokens, sample, logprobs: None, prompt_logprobs: false, sources: false }
    }
}

/// A new token of a sequence.
#[derive(Debug, Clone, PartialEq)]
pub struct Generated {
    /// The token.
    pub token: u32,
    /// Its log-probability, if it was asked for.
    pub logprobs: Option<TokenLogprobs>,
    /// What the heads of the selecting layers read when they predicted it, if it was asked for.
    pub sources: Vec<Source>,
    /// Whether no token follows, because of the maximal number of tokens or the last position of the model.
    pub last: bool,
}

/// What happened to a prompt.
#[derive(Debug, Clone, PartialEq)]
pub struct PromptRead {
    /// The number of its tokens whose cache was stored.
    pub reused: usize,
    /// The log-probabilities of its tokens but the first, if they were asked for.
    pub logprobs: Vec<TokenLogprobs>,
    /// Whether no token follows, because none was asked for.
    pub last: bool,
}

/// What a step reports about a sequence.
#[derive(Debug)]
pub enum Event {
    /// The prompt is read.
    Prompt(PromptRead),
    /// A new token.
    Token(Generated),
    /// The sequence ends, because its next token cannot be sampled. Other sequences are not affected.
    Failed(Error),
}

/// Counts of what an engine has done.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct EngineCounts {
    /// Tokens of prompts that were read.
    pub prompt_tokens: u64,
    /// Tokens of prompts whose cache was stored.
    pub reused_tokens: u64,
    /// New tokens.
    pub generated_tokens: u64,
    /// Steps.
    pub steps: u64,
}

/// A sequence that is being continued.
struct Sequence<'a> {
    id: u64,
    /// The prompt and its continuation.
    tokens: Vec<u32>,
    /// The number of tokens that may still be added.
    remaining: usize,
    sample: Sample<'a>,
    logprobs: Option<usize>,
    sources: bool,
}

impl Sequence<'_> {
    /// Samples the next token from its logits, and reports it. Returns whether the sequence goes on.
    fn advance(
        &mut self,
        logits: &[f32],
        sources: Vec<Source>,
        emit: &mut impl FnMut(u64, Event) -> bool,
    ) -> bool {
        let token = match (self.sample)(logits, &self.tokens) {
            Ok(token) => token,
            Err(error) => {
                emit(self.id, Event::Failed(error));
                return false;
            }
        };
        self.tokens.push(token);
        self.remaining -= 1;
        let logprobs = self.logprobs.map(|count| TokenLogprobs::new(logits, token, count));
        let last = self.remaining == 0;
        emit(self.id, Event::Token(Generated { token, logprobs, sources, last })) && !last
    }
}

/// A sequence whose prompt is not read to its end.
struct Waiting<'a> {
    sequence: Sequence<'a>,
    prompt_logprobs: bool,
    /// Empty before the first part of the prompt is read.
    cache: Vec<LayerCache>,
    /// The number of tokens that are read.
    read: usize,
    reused: usize,
    /// The logits after the last token that is read.
    logits: Option<Vec<f32>>,
    sources: Vec<Source>,
    logprobs: Vec<TokenLogprobs>,
}

/// Continues prompts together. At temperature 0, every prompt gets the tokens that it gets alone, but for ties within the
/// rounding errors of matrix products of different sizes.
///
/// ```
/// use candle_core::{DType, Device};
/// use gd_model::config::Recipe;
/// use gd_model::infer::engine::{BatchEngine, EngineLimits, Event, Request};
/// use gd_model::infer::sampler::{Sampler, Sampling};
/// use gd_model::model::Transformer;
/// use gd_model::model::params::Params;
///
/// let params = Params::new(0, DType::F32, &Device::Cpu);
/// let model = Transformer::new(&Recipe::load("tiny")?.model, params.frozen())?;
/// let limits = EngineLimits { sequences: 4, tokens_per_step: 64, stored_tokens: 1024 };
/// let mut engine = BatchEngine::new(&model, &Device::Cpu, limits)?;
/// for prompt in ["Call me", "It was"] {
///     let ids = prompt.bytes().map(u32::from).collect();
///     engine.submit(Request::new(ids, 3, Sampler::new(Sampling::default(), 7)?))?;
/// }
/// let mut counts = [0, 0];
/// while !engine.is_idle() {
///     engine.step(|id, event| {
///         counts[id as usize] += usize::from(matches!(event, Event::Token(_)));
///         true
///     })?;
/// }
/// assert_eq!(counts, [3, 3]);
/// # Ok::<(), gd_model::Error>(())
/// ```
pub struct BatchEngine<'a> {
    model: &'a Transformer,
    device: &'a Device,
    limits: EngineLimits,
    waiting: VecDeque<Waiting<'a>>,
    running: Vec<Sequence<'a>>,
    /// The caches of the running sequences, one per layer.
    cache: Vec<LayerCache>,
    stored: PrefixStore,
    next_id: u64,
    counts: EngineCounts,
}

impl<'a> BatchEngine<'a> {
    /// An engine without sequences.
    ///
    /// # Errors
    /// [`Error::OutOfRange`] for a limit of 0 sequences or tokens per step.
    pub fn new(model: &'a Transformer, device: &'a Device, limits: EngineLimits) -> Result<Self> {
        for (name, value) in [("sequences", limits.sequences), ("tokens_per_step", limits.tokens_per_step)] {
            if value == 0 {
                return Err(Error::out_of_range(name, value, "at least 1"));
            }
        }
        Ok(Self {
            model,
            device,
            limits,
            waiting: VecDeque::new(),
            running: Vec::new(),
            cache: model.new_cache(),
            stored: PrefixStore::new(limits.stored_tokens),
            next_id: 0,
            counts: EngineCounts::default(),
        })
    }

    /// Adds a prompt to those that wait, and returns the number by which steps report it: 0 for the first one, then 1, …
    ///
    /// # Errors
    /// As [`check_prompt`].
    pub fn submit(&mut self, request: Request<'a>) -> Result<u64> {
        check_prompt(self.model, &request.prompt)?;
        let id = self.next_id;
        self.next_id += 1;
        // The last sampled token is not an input, so the sequence may be one token longer than the context.
        let context = self.model.config().max_position_embeddings;
        let remaining = request.max_tokens.min(context + 1 - request.prompt.len());
        let sequence = Sequence {
            id,
            tokens: request.prompt,
            remaining,
            sample: request.sample,
            logprobs: request.logprobs,
            sources: request.sources,
        };
        self.waiting.push_back(Waiting {
            sequence,
            prompt_logprobs: request.prompt_logprobs,
            cache: Vec::new(),
            read: 0,
            reused: 0,
            logits: None,
            sources: Vec::new(),
            logprobs: Vec::new(),
        });
        Ok(id)
    }

    /// Ends these sequences. Numbers of sequences that have ended are ignored.
    ///
    /// # Errors
    /// An error of the device.
    pub fn cancel(&mut self, ids: &[u64]) -> Result<()> {
        self.waiting.retain(|waiting| !ids.contains(&waiting.sequence.id));
        let stays: Vec<bool> = self.running.iter().map(|sequence| !ids.contains(&sequence.id)).collect();
        self.retire(&stays)
    }

    /// Whether there is nothing to do.
    pub fn is_idle(&self) -> bool {
        self.waiting.is_empty() && self.running.is_empty()
    }

    /// The number of sequences in the batch.
    pub fn running(&self) -> usize {
        self.running.len()
    }

    /// The number of sequences whose prompts are not read.
    pub fn waiting(&self) -> usize {
        self.waiting.len()
    }

    /// What the engine has done.
    pub fn counts(&self) -> EngineCounts {
        self.counts
    }

    /// Reads prompts, and then adds a token to every sequence. Calls `emit` with what happened to which sequence; it returns
    /// whether the sequence goes on.
    ///
    /// # Errors
    /// An error of the device. Its sequences are lost then.
    pub fn step(&mut self, mut emit: impl FnMut(u64, Event) -> bool) -> Result<()> {
        self.counts.steps += 1;
        let result = self.read_prompts(&mut emit).and_then(|()| self.decode(&mut emit));
        if result.is_err() {
            self.waiting.clear();
            self.running.clear();
            self.cache = self.model.new_cache();
        }
        result
    }

    /// Reads prompts up to the limit of tokens. Those that are read to their end enter the batch.
    fn read_prompts(&mut self, emit: &mut impl FnMut(u64, Event) -> bool) -> Result<()> {
        let (mut used, mut entering, mut caches) = (0, Vec::new(), Vec::new());
        while self.running.len() + entering.len() < self.limits.sequences {
            let Some(mut next) = self.waiting.pop_front() else { break };
            if next.cache.is_empty() {
                self.begin(&mut next)?;
            }
            let tokens = self.chunk(&next);
            if used > 0 && used + tokens > self.limits.tokens_per_step {
                self.waiting.push_front(next);
                break;
            }
            used += tokens;
            self.read(&mut next, tokens)?;
            if next.read < next.sequence.tokens.len() {
                self.waiting.push_front(next);
                continue;
            }
            if let Some((sequence, cache)) = self.enter(next, emit) {
                entering.push(sequence);
                caches.push(cache);
            }
        }
        if entering.is_empty() {
            return Ok(());
        }
        let batch = (!self.running.is_empty()).then_some(&self.cache);
        let layer = |at: usize| {
            let parts = batch.into_iter().chain(&caches).map(|cache| &cache[at]);
            LayerCache::stack(&parts.collect::<Vec<_>>())
        };
        self.cache = (0..self.cache.len()).map(layer).collect::<candle_core::Result<_>>()?;
        self.running.extend(entering);
        Ok(())
    }

    /// Gives a sequence the longest stored beginning of its prompt, or an empty cache.
    fn begin(&mut self, next: &mut Waiting) -> Result<()> {
        // Log-probabilities and sources are not stored.
        let stored = match next.prompt_logprobs {
            true => None,
            false => self.stored.longest(&next.sequence.tokens, !next.sequence.sources)?,
        };
        match stored {
            Some(prefix) => {
                (next.cache, next.read, next.logits) = (prefix.cache, prefix.tokens, prefix.logits);
                next.reused = next.read;
            }
            None => {
                // The last token of a sequence is not an input.
                let new = next.sequence.remaining.min(RESERVED_TOKENS).saturating_sub(1);
                let positions = next.sequence.tokens.len() + new;
                let caches = self.model.new_cache().into_iter();
                next.cache = caches.map(|cache| cache.with_capacity(positions)).collect();
            }
        }
        self.counts.reused_tokens += next.reused as u64;
        Ok(())
    }

    /// The number of tokens of the next part of a prompt, which ends at a multiple of the limit.
    fn chunk(&self, next: &Waiting) -> usize {
        let limit = self.limits.tokens_per_step;
        let boundary = (next.read / limit + 1).saturating_mul(limit);
        boundary.min(next.sequence.tokens.len()) - next.read
    }

    /// Reads the next tokens of a prompt.
    fn read(&mut self, next: &mut Waiting, tokens: usize) -> Result<()> {
        if tokens == 0 {
            return Ok(());
        }
        let (first, all) = (next.read, &next.sequence.tokens);
        let ids = Tensor::new(&all[first..first + tokens], self.device)?.unsqueeze(0)?;
        let mask = Mask::causal(first as i64);
        let probe = (next.sequence.sources && first + tokens == all.len()).then(SourceProbe::default);
        let pass = Pass { probe: probe.as_ref().map(|probe| probe as &dyn Probe), ..Pass::new(&mask) };
        let count = next.sequence.logprobs.unwrap_or(0);
        let logits = match next.prompt_logprobs {
            true => {
                let rows = logits_of(self.model, &self.model.hidden(&ids, &pass, Some(&mut next.cache))?)?;
                let following = rows.iter().zip(&all[first + 1..]);
                next.logprobs.extend(following.map(|(row, token)| TokenLogprobs::new(row, *token, count)));
                rows
            }
            false => last_logits(self.model, &ids, &pass, &mut next.cache)?,
        };
        next.logits = logits.into_iter().next_back();
        next.sources = probe.map_or_else(Vec::new, |probe| probe.of(0));
        next.read += tokens;
        self.counts.prompt_tokens += tokens as u64;
        Ok(())
    }

    /// Stores the cache of a prompt and samples the first token. Returns the sequence and its cache if it goes on.
    fn enter(
        &mut self,
        next: Waiting<'a>,
        emit: &mut impl FnMut(u64, Event) -> bool,
    ) -> Option<(Sequence<'a>, Vec<LayerCache>)> {
        let Waiting { mut sequence, cache, reused, logits, sources, logprobs, .. } = next;
        if self.stored.holds(sequence.tokens.len()) {
            self.stored.insert(sequence.tokens.clone(), cache.clone(), logits.clone());
        }
        let last = sequence.remaining == 0;
        let goes_on = emit(sequence.id, Event::Prompt(PromptRead { reused, logprobs, last }));
        if !goes_on || last {
            return None;
        }
        self.counts.generated_tokens += 1;
        let logits = logits.unwrap_or_default();
        sequence.advance(&logits, sources, emit).then_some((sequence, cache))
    }

    /// Adds one token to every sequence of the batch.
    fn decode(&mut self, emit: &mut impl FnMut(u64, Event) -> bool) -> Result<()> {
        if self.running.is_empty() {
            return Ok(());
        }
        let ids: Vec<u32> = self.running.iter().filter_map(|one| one.tokens.last().copied()).collect();
        let ids = Tensor::new(ids, self.device)?.unsqueeze(1)?;
        let positions = self.running.iter().map(|sequence| sequence.tokens.len() as i64 - 1);
        let mask = Mask::causal(0).with_offsets(positions.collect());
        let probe = self.running.iter().any(|sequence| sequence.sources).then(SourceProbe::default);
        let (model, cache, observer) = (self.model, &mut self.cache, probe.as_ref());
        let logits = on_pool(self.device, || {
            let pass = Pass { probe: observer.map(|probe| probe as &dyn Probe), ..Pass::new(&mask) };
            last_logits(model, &ids, &pass, cache)
        })?;
        let mut stays = Vec::with_capacity(logits.len());
        for (at, (sequence, logits)) in self.running.iter_mut().zip(&logits).enumerate() {
            let probe = probe.as_ref().filter(|_| sequence.sources);
            let sources = probe.map_or_else(Vec::new, |probe| probe.of(at));
            stays.push(sequence.advance(logits, sources, emit));
        }
        self.counts.generated_tokens += logits.len() as u64;
        self.retire(&stays)
    }

    /// Removes the sequences that do not stay, and stores their caches.
    fn retire(&mut self, stays: &[bool]) -> Result<()> {
        if stays.iter().all(|stays| *stays) {
            return Ok(());
        }
        let mut unfinished = Vec::new();
        for (at, sequence) in std::mem::take(&mut self.running).into_iter().enumerate() {
            if stays[at] {
                unfinished.push(sequence);
                continue;
            }
            // Not all tokens were inputs: the last one that was sampled is not cached.
            let lengths = self.cache.first().map_or(&[][..], LayerCache::lengths);
            let cached = lengths.get(at).copied().unwrap_or(0);
            if self.stored.holds(cached) {
                let select = |layer: &LayerCache| layer.select(&[at]);
                let cache = self.cache.iter().map(select).collect::<candle_core::Result<_>>()?;
                self.stored.insert(sequence.tokens[..cached].to_vec(), cache, None);
            }
        }
        self.running = unfinished;
        let indices: Vec<usize> = (0..stays.len()).filter(|at| stays[*at]).collect();
        for layer in &mut self.cache {
            *layer = layer.select(&indices)?;
        }
        Ok(())
    }
}
