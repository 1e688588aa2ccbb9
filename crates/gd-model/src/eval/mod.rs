//! Evaluation of a model on a token stream: loss, perplexity, bits per byte and statistics of the heads. The module
//! [`selective_prediction`] evaluates predictions that may be rejected, [`reading`] what the reads of the heads are worth.

pub mod reading;
pub mod selective_prediction;

use std::cell::RefCell;
use std::ops::Range;

use candle_core::Device;
use gd_layer::{Pass, SelectionStats};
use serde::{Deserialize, Serialize};

use crate::data::{Batch, Tokens};
use crate::error::{Error, Result};
use crate::model::Transformer;

/// The evaluation of a model on a text.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Evaluation {
    /// The mean loss in nats per predicted token.
    pub loss: f64,
    /// The perplexity, `e^loss`.
    pub perplexity: f64,
    /// The loss of the predicted text tokens in bits per byte of their text. Begin and end tokens that the tokenizer adds
    /// are no text: neither their losses nor any bytes count for them.
    pub bits_per_byte: f64,
    /// The number of predicted tokens.
    pub tokens: usize,
    /// The number of predicted tokens that are text.
    pub text_tokens: usize,
    /// The size of the text of these tokens in bytes. The first token of a document without a begin token is not
    /// predicted; its share is that of an average token.
    pub text_bytes: f64,
    /// Statistics of the heads: means over layers, heads and queries.
    pub heads: HeadStats,
}

/// Statistics of the heads: means over layers, heads and queries.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize, Deserialize)]
pub struct HeadStats {
    /// The fraction of (query, head) pairs that abstained.
    pub abstained: f64,
    /// The mean weight on position 0.
    pub first_token: f64,
    /// The mean energy difference between the selected key and the runner-up.
    pub margin: f64,
    /// The mean entropy of the weights over the candidates, in nats.
    pub entropy: f64,
    /// The number of different keys that the heads of a position read, relative to the number of heads that read one.
    pub distinct: f64,
}

impl HeadStats {
    /// Adds the mean over the layers, multiplied by `weight`.
    fn add(&mut self, stats: &[SelectionStats], weight: f64) {
        let weight = weight / stats.len().max(1) as f64;
        for r in stats {
            self.abstained += weight * r.abstained;
            self.first_token += weight * r.first_token;
            self.margin += weight * r.margin;
            self.entropy += weight * r.entropy;
            self.distinct += weight * r.distinct;
        }
    }
}

/// Evaluates a model on `tokens`, which encode `bytes` bytes of text, in consecutive windows of `context` tokens, `batch`
/// windows at a time. Every token except the first of its document is predicted once, from the tokens of its document
/// before it in its window.
///
/// # Errors
/// A text without a token to predict, [`Error::NotFinite`] for a loss that is not finite, or an error of the device.
pub fn evaluate(
    model: &Transformer,
    tokens: &Tokens,
    bytes: usize,
    context: usize,
    batch: usize,
    device: &Device,
) -> Result<Evaluation> {
    observe(model, tokens, bytes, (context, batch), device, |_| Ok(()))
}

/// What [`observe`] reports about a batch.
#[derive(Debug)]
pub struct Observed<'a> {
    /// The position of the first target in the text; the others follow it.
    pub first: usize,
    /// The loss of every target in nats, 0 for the first token of a document, which is not predicted.
    pub losses: &'a [f32],
    /// The statistics of all layers.
    pub stats: &'a [SelectionStats],
}

/// Evaluates a model as [`evaluate`] and calls `watch` after each batch.
///
/// # Errors
/// As [`evaluate`], and the error of `watch`.
pub fn observe(
    model: &Transformer,
    tokens: &Tokens,
    bytes: usize,
    (context, batch): (usize, usize),
    device: &Device,
    mut watch: impl FnMut(Observed) -> Result<()>,
) -> Result<Evaluation> {
    if tokens.len() < 2 {
        return Err(Error::Invalid(format!("a text of {} tokens has nothing to predict", tokens.len())));
    }
    let stats = RefCell::new(Vec::new());
    let windows: Vec<_> = tokens.windows(context).collect();
    let mut text = TextTargets::new(tokens);
    let (mut sum, mut count, mut heads) = (0f64, 0usize, HeadStats::default());
    // Only the last window may be shorter; it forms its own batch.
    for group in windows.chunk_by(|a, b| a.len() == b.len()).flat_map(|same| same.chunks(batch.max(1))) {
        let Batch { inputs, targets, mask, predicted } = Batch::new(tokens, group, device)?;
        let pass = Pass { stats: Some(&stats), ..Pass::new(&mask) };
        let losses = model.token_losses(&inputs, &targets, &pass)?;
        // The windows of a group are consecutive, so their targets are, too.
        let first = group.first().map_or(0, |window| window.start) + 1;
        if let Some(at) = losses.iter().position(|loss| !loss.is_finite()) {
            return Err(Error::NotFinite { what: "the loss", value: losses[at].into(), token: first + at });
        }
        sum += losses.iter().map(|&x| f64::from(x)).sum::<f64>();
        text.add(first, &losses, tokens.learned(first..first + losses.len()).as_deref());
        count += predicted;
        // Taken after every pass, because the statistics may hold large tensors.
        let stats = stats.take();
        watch(Observed { first, losses: &losses, stats: &stats })?;
        heads.add(&stats, losses.len() as f64 / (tokens.len() - 1) as f64);
    }
    if count == 0 {
        return Err(Error::Invalid("the text has no token to predict".into()));
    }
    let loss = sum / count as f64;
    let text_bytes = text.bytes(bytes);
    Ok(Evaluation {
        loss,
        perplexity: loss.exp(),
        bits_per_byte: text.sum / text_bytes / std::f64::consts::LN_2,
        tokens: count,
        text_tokens: text.predicted,
        text_bytes,
        heads,
    })
}

/// The losses of the targets that are text, without begin and end tokens.
struct TextTargets {
    /// For each document its start and the range of its text.
    documents: Vec<(usize, Range<usize>)>,
    /// The first document that ends after the last target so far.
    next: usize,
    /// The sum of the losses in nats.
    sum: f64,
    /// The number of targets that are text.
    predicted: usize,
}

impl TextTargets {
    fn new(tokens: &Tokens) -> Self {
        Self { documents: tokens.text_ranges(), next: 0, sum: 0.0, predicted: 0 }
    }

    /// Adds the losses of the targets from position `first` on. Losses of tokens that are not predicted are 0;
    /// `learned` are the targets that count, if not all do.
    fn add(&mut self, first: usize, losses: &[f32], learned: Option<&[bool]>) {
        let end = first + losses.len();
        while let Some((start, text)) = self.documents.get(self.next) {
            // The first token of a document is not predicted.
            let targets = text.start.max(start + 1).max(first)..text.end.min(end);
            for at in targets.filter(|at| learned.is_none_or(|learned| learned[at - first])) {
                self.predicted += 1;
                self.sum += f64::from(losses[at - first]);
            }
            if text.end > end {
                break;
            }
            self.next += 1;
        }
    }

    /// The share of the predicted text tokens in `bytes`, the size of all text.
    fn bytes(&self, bytes: usize) -> f64 {
        let all: usize = self.documents.iter().map(|(_, text)| text.len()).sum();
        bytes as f64 * self.predicted as f64 / all as f64
    }
}
