//! Evaluation of a model on a token stream: loss, perplexity, bits per byte and statistics of the heads. The module
//! [`selective_prediction`] evaluates predictions that may be rejected.

pub mod selective_prediction;

use std::cell::RefCell;

use candle_core::Device;
use gd_layer::{Pass, SelectionStats};
use serde::Serialize;

use crate::data::{Batch, Tokens};
use crate::error::{Error, Result};
use crate::model::Transformer;

/// The evaluation of a model on a text.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Evaluation {
    /// The mean loss in nats per predicted token.
    pub loss: f64,
    /// The perplexity, `e^loss`.
    pub perplexity: f64,
    /// The loss in bits per byte of the text.
    pub bits_per_byte: f64,
    /// The number of predicted tokens.
    pub tokens: usize,
    /// Statistics of the heads: means over layers, heads and queries.
    pub heads: HeadStats,
}

/// Statistics of the heads: means over layers, heads and queries.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize)]
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
/// A text without a token to predict, or an error of the device.
pub fn evaluate(
    model: &Transformer,
    tokens: &Tokens,
    bytes: usize,
    context: usize,
    batch: usize,
    device: &Device,
) -> Result<Evaluation> {
    observe(model, tokens, bytes, (context, batch), device, |_| ())
}

/// Evaluates a model as [`evaluate`] and calls `watch` with the statistics of all layers after each batch.
///
/// # Errors
/// As [`evaluate`].
pub fn observe(
    model: &Transformer,
    tokens: &Tokens,
    bytes: usize,
    (context, batch): (usize, usize),
    device: &Device,
    mut watch: impl FnMut(&[SelectionStats]),
) -> Result<Evaluation> {
    if tokens.len() < 2 {
        return Err(Error::Invalid(format!("a text of {} tokens has nothing to predict", tokens.len())));
    }
    let stats = RefCell::new(Vec::new());
    let windows: Vec<_> = tokens.windows(context).collect();
    let (mut sum, mut count, mut heads) = (0f64, 0usize, HeadStats::default());
    // Only the last window may be shorter; it forms its own batch.
    for group in windows.chunk_by(|a, b| a.len() == b.len()).flat_map(|same| same.chunks(batch.max(1))) {
        let Batch { inputs, targets, mask, predicted } = Batch::new(tokens, group, device)?;
        let pass = Pass { stats: Some(&stats), ..Pass::new(&mask) };
        let losses = model.token_losses(&inputs, &targets, &pass)?;
        sum += losses.iter().map(|&x| f64::from(x)).sum::<f64>();
        count += predicted;
        // Taken after every pass, because the statistics may hold large tensors.
        let stats = stats.take();
        watch(&stats);
        heads.add(&stats, losses.len() as f64 / (tokens.len() - 1) as f64);
    }
    if count == 0 {
        return Err(Error::Invalid("documents of one token each have nothing to predict".into()));
    }
    let loss = sum / count as f64;
    // The first token is given, so its share of the bytes is left out.
    let predicted = bytes as f64 * count as f64 / tokens.len() as f64;
    Ok(Evaluation {
        loss,
        perplexity: loss.exp(),
        bits_per_byte: sum / predicted / std::f64::consts::LN_2,
        tokens: count,
        heads,
    })
}
