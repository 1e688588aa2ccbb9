//! Recording a run of the model over a text, and replaying it.

use candle_core::{Device, Tensor};
use gd_kernels::Mask;
use gd_layer::{LayerCache, Pass};

use super::ending::Ending;
use super::header::Header;
use super::record::Record;
use super::recorder::{Reads, Recorder};
use super::replay::{Outcome, Replay};
use crate::error::{Error, Result};
use crate::infer::generate::{check_prompt, last_logits};
use crate::infer::sampler::Sampler;
use crate::model::Transformer;
use crate::model::pretrained::Loaded;

/// Processes a sequence chunk by chunk with a cache.
#[derive(Clone)]
pub(super) struct SequenceReader<'a> {
    model: &'a Transformer,
    device: &'a Device,
    cache: Vec<LayerCache>,
    /// The number of processed tokens.
    position: usize,
}

impl<'a> SequenceReader<'a> {
    pub(super) fn new(model: &'a Transformer, device: &'a Device) -> Self {
        Self { model, device, cache: model.new_cache(), position: 0 }
    }

    /// Processes the next tokens. Returns the logits `[V]` after the last one, and what the heads read at
    /// every position.
    pub(super) fn read(&mut self, tokens: &[u32], recorder: &Recorder) -> Result<(Vec<f32>, Vec<Reads>)> {
        let mask = Mask::causal(self.position as i64);
        let ids = Tensor::new(tokens, self.device)?.unsqueeze(0)?;
        let pass = Pass { probe: Some(recorder), ..Pass::new(&mask) };
        let logits = last_logits(self.model, &ids, &pass, &mut self.cache)?.swap_remove(0);
        self.position += tokens.len();
        Ok((logits, recorder.take(tokens.len())?))
    }
}

/// Processes `prompt`, generates tokens as [`generate`](crate::infer::generate::generate) does if the header describes a
/// generation, and calls `take` with the record of every position, including the last new token. Returns the new tokens
/// and why they end.
///
/// # Errors
/// [`Error::PromptLength`]; an intervention on a layer, head or position that does not exist; sampling parameters that are
/// out of range; the error of `take`.
pub fn record(
    loaded: &Loaded,
    header: &Header,
    prompt: &[u32],
    device: &Device,
    mut take: impl FnMut(Record) -> Result<()>,
) -> Result<(Vec<u32>, Ending)> {
    check_prompt(&loaded.model, prompt)?;
    super::intervention::check(&header.interventions, &header.layers, prompt.len())?;
    let generation = header.generation();
    let mut sampler = generation.as_ref().map(|g| Sampler::new(g.sampling, g.seed)).transpose()?;
    let recorder = Recorder::new(header);
    let mut reader = SequenceReader::new(&loaded.model, device);
    let mut texts = loaded.tokenizer.stream();
    let (mut all, mut next) = (prompt.to_vec(), prompt.to_vec());
    let mut last = None;
    let ending = loop {
        let first = reader.position;
        let (logits, reads) = reader.read(&next, &recorder)?;
        for (i, (&token, Reads { rows, blends })) in next.iter().zip(reads).enumerate() {
            let position = (first + i) as u32;
            let text = texts.push(token)?.unwrap_or_default();
            let record = Record { position, token, generated: first + i >= prompt.len(), text, rows, blends };
            if let Some(complete) = last.replace(record) {
                take(complete)?;
            }
        }
        let Some((generation, sampler)) = generation.as_ref().zip(sampler.as_mut()) else {
            break Ending::Read;
        };
        if all.len() - prompt.len() == generation.max_tokens {
            break Ending::MaxTokens;
        }
        if all.len() == loaded.model.config().max_position_embeddings {
            break Ending::Context;
        }
        let token = sampler.next(&logits, &all)?;
        if generation.end_tokens.contains(&token) {
            break Ending::EndToken { token };
        }
        all.push(token);
        next = vec![token];
    };
    if let Some(mut record) = last {
        // The text that was held back belongs to the last token.
        record.text.extend(texts.finish()?);
        take(record)?;
    }
    Ok((all.split_off(prompt.len()), ending))
}

/// Processes the recorded tokens again and compares every selection with its record, and every text with that of its token.
/// On the backend of the record, the generated tokens and the end token are compared, too. `tolerance` is the maximal
/// difference of energies on another backend, relative to the larger of the energy and 1. Differences are not errors; they
/// are counted in the returned [`Outcome`], which also says what could not be compared. `ending` is that of the trace.
///
/// # Errors
/// [`Error::TraceModel`] if the hashes of the model differ from those of the header; [`Error::Invalid`] if the header
/// contradicts the tokens or the model; [`Error::PromptLength`]; an error of the device.
pub fn replay(
    header: &Header,
    records: &[Record],
    ending: Option<Ending>,
    loaded: &Loaded,
    tolerance: f32,
    device: &Device,
) -> Result<Outcome> {
    let tokens: Vec<u32> = records.iter().map(|record| record.token).collect();
    let prompt = header.prompt_tokens.min(tokens.len());
    let interventions = header.interventions.as_slice();
    let now = match header.blending().next() {
        Some(_) => Header::with_blends(loaded, "", &tokens[..prompt], None, interventions, device)?,
        None => Header::new(loaded, "", &tokens[..prompt], None, interventions, device)?,
    };
    if let Some(part) = header.model.differs(&now.model) {
        return Err(Error::TraceModel { part });
    }
    if now.input != header.input || now.layers != header.layers {
        return Err(Error::Invalid("the trace's header contradicts its tokens or the model".into()));
    }
    check_prompt(&loaded.model, &tokens)?;
    super::intervention::check(&header.interventions, &header.layers, prompt)?;
    let sampler = header.sampling.map(|sampling| Sampler::new(sampling, header.seed)).transpose()?;
    let mut replay = Replay::new(header.selecting(), now.same_backend(header), tolerance);
    compare_texts(records, loaded, &mut replay.outcome)?;
    compare_limits(header, &tokens, ending, loaded, &mut replay.outcome)?;
    let end_token = match ending {
        Some(Ending::EndToken { token }) => Some(token),
        _ => None,
    };
    let recorder = Recorder::replaying(header, replay);
    let mut drawn = Draws { sampler, tokens: &tokens, end_token, prompt, agree: 0, differ: 0 };
    let mut reader = SequenceReader::new(&loaded.model, device);
    while reader.position < tokens.len() {
        let first = reader.position;
        let end = if first < prompt { prompt } else { first + 1 };
        recorder.expect(&records[first..end]);
        let (logits, reads) = reader.read(&tokens[first..end], &recorder)?;
        let mut replay = recorder.replay();
        let Some(replay) = replay.as_mut() else { break };
        for (record, reads) in records[first..end].iter().zip(&reads) {
            for (row, (now, recorded)) in reads.rows.iter().zip(&record.rows).enumerate() {
                let at = || format!("position {}, row {row}", record.position);
                replay.row(at, now, recorded);
            }
            for (head, (now, recorded)) in reads.blends.iter().zip(&record.blends).enumerate() {
                let at = || format!("position {}, softmax head {head}", record.position);
                replay.blend(at, now, recorded);
            }
        }
        drawn.compare(&logits, end, &mut replay.outcome)?;
    }
    let mut outcome = recorder.replay().take().map(|replay| replay.outcome).unwrap_or_default();
    drawn.finish(header, &now, ending, &mut outcome);
    Ok(outcome)
}

/// Compares the text of every record with that of its token.
fn compare_texts(records: &[Record], loaded: &Loaded, outcome: &mut Outcome) -> Result<()> {
    let mut texts = loaded.tokenizer.stream();
    for (i, record) in records.iter().enumerate() {
        let mut text = texts.push(record.token)?.unwrap_or_default();
        if i + 1 == records.len() {
            text.extend(texts.finish()?);
        }
        if text != record.text {
            outcome.contradiction(format!(
                "position {i}: text {:?}, but token {} gives {text:?}",
                record.text, record.token
            ));
        }
    }
    Ok(())
}

/// Compares the end tokens and the length with those of the model.
fn compare_limits(
    header: &Header,
    tokens: &[u32],
    ending: Option<Ending>,
    loaded: &Loaded,
    outcome: &mut Outcome,
) -> Result<()> {
    let Some(recorded) = &header.end_tokens else { return Ok(()) };
    let (end_tokens, context) = (loaded.end_tokens()?, loaded.model.config().max_position_embeddings);
    if *recorded != end_tokens {
        outcome.contradiction(format!("the end tokens are {recorded:?}, those of the model {end_tokens:?}"));
    }
    let new = &tokens[header.prompt_tokens.min(tokens.len())..];
    if let Some(token) = new.iter().find(|token| end_tokens.contains(token)) {
        outcome.contradiction(format!("the text continues after the end token {token}"));
    }
    let full = tokens.len() == context;
    match ending {
        Some(Ending::Context) if !full => outcome.contradiction(format!(
            "the text ends after {} positions, those of the model are {context}",
            tokens.len()
        )),
        Some(Ending::EndToken { .. }) if full => {
            outcome.contradiction(format!("no token can be drawn after all {context} positions"));
        }
        _ => {}
    }
    Ok(())
}

/// The comparison of the drawn tokens with those of the record.
struct Draws<'a> {
    sampler: Option<Sampler>,
    tokens: &'a [u32],
    /// The end token that was drawn after the last token.
    end_token: Option<u32>,
    prompt: usize,
    agree: usize,
    differ: usize,
}

impl Draws<'_> {
    /// Draws the token at `end` from `logits` and compares it with the recorded one. On another backend a token may differ.
    fn compare(&mut self, logits: &[f32], end: usize, outcome: &mut Outcome) -> Result<()> {
        let recorded = self.tokens.get(end).copied().or(self.end_token);
        let (Some(sampler), Some(token)) = (&mut self.sampler, recorded) else { return Ok(()) };
        let sampled = sampler.next(logits, &self.tokens[..end])?;
        if sampled == token {
            self.agree += 1;
        } else if outcome.exact {
            outcome.contradiction(format!("position {end}: token {token}, but {sampled} is sampled"));
        } else {
            self.differ += 1;
        }
        Ok(())
    }

    /// Notes what could not be compared.
    fn finish(&self, header: &Header, now: &Header, ending: Option<Ending>, outcome: &mut Outcome) {
        let new = self.tokens.len() - self.prompt;
        if self.sampler.is_none() && new > 0 {
            outcome.contradiction(format!("{new} tokens are generated, but the trace has no sampling"));
        }
        let drawn = self.agree + self.differ;
        if !outcome.exact {
            outcome.unchecked.push(format!(
                "bits: recorded on {}, replayed on {}; energies were compared within the tolerance",
                header.backend(),
                now.backend()
            ));
        }
        if !outcome.exact && drawn > 0 {
            outcome.unchecked.push(format!(
                "drawn tokens: another backend may draw others; {} of {drawn} would be drawn here",
                self.agree
            ));
        }
        if ending.is_none() && new > 0 {
            outcome.unchecked.push("the end: version 1 of the format does not say why the text ends".into());
        }
    }
}
