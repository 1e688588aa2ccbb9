//! A text through the model, with a record of every position: once to record it, and again to check it.

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

/// A text that is being read.
struct Reader<'a> {
    model: &'a Transformer,
    device: &'a Device,
    cache: Vec<LayerCache>,
    read: usize,
}

impl<'a> Reader<'a> {
    fn new(model: &'a Transformer, device: &'a Device) -> Self {
        Self { model, device, cache: model.new_cache(), read: 0 }
    }

    /// Reads the next tokens; the logits after the last, and the rows of every position.
    fn read(&mut self, tokens: &[u32], recorder: &Recorder) -> Result<(Vec<f32>, Vec<Vec<Row>>)> {
        let mask = Mask::causal(self.read as i64);
        let ids = Tensor::new(tokens, self.device)?.unsqueeze(0)?;
        let pass = Pass { probe: Some(recorder), ..Pass::new(&mask) };
        let logits = last_logits(self.model, &ids, &pass, &mut self.cache)?.swap_remove(0);
        self.read += tokens.len();
        Ok((logits, recorder.take(tokens.len())?))
    }
}

/// How a recorded text goes on after its prompt.
pub struct Continuation {
    /// The most tokens to add.
    pub max_tokens: usize,
    /// What draws them.
    pub sampler: Sampler,
    /// The tokens that end a text; they are not recorded.
    pub ends: Vec<u32>,
}

/// Reads `prompt` as [`crate::infer::generate::generate`] does, continues it as that would with the same sampler, and
/// hands every position's record on, that of the last token too. Returns the new tokens.
///
/// # Errors
/// An empty prompt, one longer than the model's context, an intervention on what is not there, or what `take`
/// reports.
pub fn record(
    loaded: &Loaded,
    header: &Header,
    prompt: &[u32],
    mut onward: Option<Continuation>,
    device: &Device,
    mut take: impl FnMut(Record) -> Result<()>,
) -> Result<Vec<u32>> {
    check_prompt(&loaded.model, prompt)?;
    super::intervention::check(&header.interventions, &header.layers, prompt.len())?;
    let recorder = Recorder::new(header);
    let mut reader = Reader::new(&loaded.model, device);
    let mut texts = loaded.tokenizer.stream();
    let (mut all, mut next) = (prompt.to_vec(), prompt.to_vec());
    loop {
        let first = reader.read;
        let (logits, rows) = reader.read(&next, &recorder)?;
        for (i, (&token, rows)) in next.iter().zip(rows).enumerate() {
            let position = (first + i) as u32;
            let text = texts.push(token)?.unwrap_or_default();
            take(Record { position, token, generated: first + i >= prompt.len(), text, rows })?;
        }
        let Some(onward) = &mut onward else { break };
        let room = loaded.model.config().max_position_embeddings;
        if all.len() - prompt.len() == onward.max_tokens || all.len() == room {
            break;
        }
        let token = onward.sampler.next(&logits, &all)?;
        if onward.ends.contains(&token) {
            break;
        }
        all.push(token);
        next = vec![token];
    }
    Ok(all.split_off(prompt.len()))
}

/// Runs recorded tokens again and holds every selection against its record; the tokens, too, where they were drawn
/// on the same backend.
///
/// # Errors
/// A model that is not the recorded one, records that are no text for it, or what the model reports. What differs
/// is no error but the outcome.
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
    let mut reader = Reader::new(&loaded.model, device);
    while reader.read < tokens.len() {
        let first = reader.read;
        let end = if first < prompt { prompt } else { first + 1 };
        recorder.expect(&records[first..end]);
        let (logits, rows) = reader.read(&tokens[first..end], &recorder)?;
        let drawn = match (&mut sampler, tokens.get(end)) {
            (Some(sampler), Some(_)) => Some(sampler.next(&logits, &tokens[..end])?),
            _ => None,
        };
        let mut replay = recorder.replay();
        let Some(replay) = replay.as_mut() else { break };
        for (record, rows) in records[first..end].iter().zip(&rows) {
            for (place, (now, recorded)) in rows.iter().zip(&record.rows).enumerate() {
                let at = || format!("position {}, row {place}", record.position);
                replay.row(at, now, recorded);
            }
        }
        if let Some((drawn, token)) = drawn.zip(tokens.get(end)).filter(|(drawn, token)| drawn != *token) {
            replay.outcome.contradiction(format!("position {end}: token {token}, drawn {drawn}"));
        }
    }
    let outcome = recorder.replay().take().map(|replay| replay.outcome).unwrap_or_default();
    Ok(outcome)
}
