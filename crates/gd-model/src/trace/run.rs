//! Recording a run of the model over a text, and replaying it.

use candle_core::{Device, Tensor};
use gd_kernels::Mask;
use gd_layer::{LayerCache, Pass};

use super::header::Header;
use super::record::{Record, Row};
use super::recorder::Recorder;
use super::replay::{Outcome, Replay};
use crate::error::{Error, Result};
use crate::infer::generate::{check_prompt, last_logits};
use crate::infer::sampler::Sampler;
use crate::model::Transformer;
use crate::model::pretrained::Loaded;

/// Processes a sequence chunk by chunk with a cache.
struct SequenceReader<'a> {
    model: &'a Transformer,
    device: &'a Device,
    cache: Vec<LayerCache>,
    /// The number of processed tokens.
    position: usize,
}

impl<'a> SequenceReader<'a> {
    fn new(model: &'a Transformer, device: &'a Device) -> Self {
        Self { model, device, cache: model.new_cache(), position: 0 }
    }

    /// Processes the next tokens. Returns the logits `[V]` after the last one, and the rows of every position.
    fn read(&mut self, tokens: &[u32], recorder: &Recorder) -> Result<(Vec<f32>, Vec<Vec<Row>>)> {
        let mask = Mask::causal(self.position as i64);
        let ids = Tensor::new(tokens, self.device)?.unsqueeze(0)?;
        let pass = Pass { probe: Some(recorder), ..Pass::new(&mask) };
        let logits = last_logits(self.model, &ids, &pass, &mut self.cache)?.swap_remove(0);
        self.position += tokens.len();
        Ok((logits, recorder.take(tokens.len())?))
    }
}

/// How tokens are generated after a prompt.
pub struct Continuation {
    /// The maximal number of new tokens.
    pub max_tokens: usize,
    /// The sampler.
    pub sampler: Sampler,
    /// The end tokens, see [`Loaded::end_tokens`]. They end the generation and are not recorded.
    pub end_tokens: Vec<u32>,
}

/// Processes `prompt`, generates tokens as [`generate`](crate::infer::generate::generate) with the same sampler if
/// `continuation` is given, and calls `take` with the record of every position, including the last new token. Returns the
/// new tokens.
///
/// # Errors
/// [`Error::PromptLength`]; an intervention on a layer, head or position that does not exist; the error of `take`.
pub fn record(
    loaded: &Loaded,
    header: &Header,
    prompt: &[u32],
    mut continuation: Option<Continuation>,
    device: &Device,
    mut take: impl FnMut(Record) -> Result<()>,
) -> Result<Vec<u32>> {
    check_prompt(&loaded.model, prompt)?;
    super::intervention::check(&header.interventions, &header.layers, prompt.len())?;
    let recorder = Recorder::new(header);
    let mut reader = SequenceReader::new(&loaded.model, device);
    let mut texts = loaded.tokenizer.stream();
    let (mut all, mut next) = (prompt.to_vec(), prompt.to_vec());
    let mut last = None;
    loop {
        let first = reader.position;
        let (logits, rows) = reader.read(&next, &recorder)?;
        for (i, (&token, rows)) in next.iter().zip(rows).enumerate() {
            let position = (first + i) as u32;
            let text = texts.push(token)?.unwrap_or_default();
            let record = Record { position, token, generated: first + i >= prompt.len(), text, rows };
            if let Some(complete) = last.replace(record) {
                take(complete)?;
            }
        }
        let Some(continuation) = &mut continuation else { break };
        let context = loaded.model.config().max_position_embeddings;
        if all.len() - prompt.len() == continuation.max_tokens || all.len() == context {
            break;
        }
        let token = continuation.sampler.next(&logits, &all)?;
        if continuation.end_tokens.contains(&token) {
            break;
        }
        all.push(token);
        next = vec![token];
    }
    if let Some(mut record) = last {
        // The text that was held back belongs to the last token.
        record.text.extend(texts.finish()?);
        take(record)?;
    }
    Ok(all.split_off(prompt.len()))
}

/// Processes the recorded tokens again and compares every selection with its record. On the backend of the record, the
/// generated tokens are compared, too. `tolerance` is the maximal difference of energies on another backend, relative to the
/// larger of the energy and 1. Differences are not errors; they are counted in the returned [`Outcome`].
///
/// # Errors
/// [`Error::TraceModel`] if the hashes of the model differ from those of the header; [`Error::Invalid`] if the header
/// contradicts the tokens or the model; [`Error::PromptLength`]; an error of the device.
pub fn replay(
    header: &Header,
    records: &[Record],
    loaded: &Loaded,
    tolerance: f32,
    device: &Device,
) -> Result<Outcome> {
    let tokens: Vec<u32> = records.iter().map(|record| record.token).collect();
    let prompt = header.prompt_tokens.min(tokens.len());
    let now = Header::new(loaded, "", &tokens[..prompt], None, &header.interventions, device)?;
    if let Some(part) = header.model.differs(&now.model) {
        return Err(Error::TraceModel { part });
    }
    if now.input != header.input || now.layers != header.layers {
        return Err(Error::Invalid("the trace's header contradicts its tokens or the model".into()));
    }
    check_prompt(&loaded.model, &tokens)?;
    super::intervention::check(&header.interventions, &header.layers, prompt)?;
    let mut sampler = match header.sampling.filter(|_| now.same_backend(header)) {
        Some(sampling) => Some(Sampler::new(sampling, header.seed)?),
        None => None,
    };
    let replay = Replay::new(header.selecting(), now.same_backend(header), tolerance);
    let recorder = Recorder::replaying(header, replay);
    let mut reader = SequenceReader::new(&loaded.model, device);
    while reader.position < tokens.len() {
        let first = reader.position;
        let end = if first < prompt { prompt } else { first + 1 };
        recorder.expect(&records[first..end]);
        let (logits, rows) = reader.read(&tokens[first..end], &recorder)?;
        let sampled = match (&mut sampler, tokens.get(end)) {
            (Some(sampler), Some(_)) => Some(sampler.next(&logits, &tokens[..end])?),
            _ => None,
        };
        let mut replay = recorder.replay();
        let Some(replay) = replay.as_mut() else { break };
        for (record, rows) in records[first..end].iter().zip(&rows) {
            for (row, (now, recorded)) in rows.iter().zip(&record.rows).enumerate() {
                let at = || format!("position {}, row {row}", record.position);
                replay.row(at, now, recorded);
            }
        }
        if let Some((sampled, token)) =
            sampled.zip(tokens.get(end)).filter(|(sampled, token)| sampled != *token)
        {
            replay.outcome.contradiction(format!("position {end}: token {token}, but {sampled} is sampled"));
        }
    }
    let outcome = recorder.replay().take().map(|replay| replay.outcome).unwrap_or_default();
    Ok(outcome)
}
