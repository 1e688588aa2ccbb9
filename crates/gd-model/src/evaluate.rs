//! Loss, perplexity and bits per byte of a model on a token stream.

use std::cell::RefCell;

use candle_core::Device;
use gd_layer::{Pass, Record};
use serde::Serialize;

use crate::data::{Batch, Tokens};
use crate::error::{Error, Result};
use crate::loss::{counted, token_losses};
use crate::transformer::Transformer;

/// What a model does on a text.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Evaluation {
    /// Mean loss, nats per predicted token.
    pub loss: f64,
    /// `e^loss`.
    pub perplexity: f64,
    /// Bits per byte of the text.
    pub bits_per_byte: f64,
    /// Predicted tokens.
    pub tokens: usize,
    /// What the heads did; means over layers, heads and queries.
    pub heads: HeadStats,
}

/// Means over the layers of a pass, see [`gd_layer::Record`].
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize)]
pub struct HeadStats {
    /// Share that read nothing.
    pub abstained: f64,
    /// Weight on position 0.
    pub first_token: f64,
    /// Lead of the best key over the runner-up.
    pub margin: f64,
}

impl HeadStats {
    /// Adds the mean over the layers' records, with a weight.
    fn add(&mut self, records: &[Record], weight: f64) {
        let weight = weight / records.len().max(1) as f64;
        for r in records {
            self.abstained += weight * r.abstained;
            self.first_token += weight * r.first_token;
            self.margin += weight * r.margin;
        }
    }
}

/// Measures `tokens`, which stand for `bytes` bytes of text, in consecutive windows of `context`,
/// `batch` at a time; every token but the first of each document is predicted once, from its own
/// document alone.
///
/// # Errors
/// A text in which nothing can be predicted.
pub fn evaluate(
    model: &Transformer,
    tokens: &Tokens,
    bytes: usize,
    context: usize,
    batch: usize,
    device: &Device,
) -> Result<Evaluation> {
    if tokens.len() < 2 {
        return Err(Error::Invalid(format!("a text of {} tokens has nothing to predict", tokens.len())));
    }
    let records = RefCell::new(Vec::new());
    let windows: Vec<_> = tokens.windows(context).collect();
    let (mut sum, mut count, mut heads) = (0f64, 0usize, HeadStats::default());
    // Only the last window may be shorter, and goes alone.
    for group in windows.chunk_by(|a, b| a.len() == b.len()).flat_map(|same| same.chunks(batch.max(1))) {
        let Batch { inputs, targets, mask } = Batch::new(tokens, group, device)?;
        let pass = Pass { record: Some(&records), ..Pass::new(&mask) };
        let logits = model.forward(&inputs, &pass, None)?.detach().flatten_to(1)?;
        let targets = targets.flatten_all()?;
        let losses = token_losses(&logits, &targets)?;
        sum += losses.iter().map(|&x| f64::from(x)).sum::<f64>();
        count += counted(&targets)?;
        // Records hold whole tensors, so they do not outlive their pass.
        heads.add(&records.take(), losses.len() as f64 / (tokens.len() - 1) as f64);
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
