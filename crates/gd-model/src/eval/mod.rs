//! Loss, perplexity and bits per byte of a model on a token stream.

use std::cell::RefCell;

use candle_core::{Device, Tensor};
use gd_layer::{Pass, SelectionStats};
use serde::Serialize;

use crate::data::{Batch, Tokens};
use crate::error::{Error, Result};
use crate::model::Transformer;
use crate::train::state::{State, Stateful};

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

/// Means over the layers of a pass, see [`gd_layer::SelectionStats`].
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize)]
pub struct HeadStats {
    /// Share that read nothing.
    pub abstained: f64,
    /// Weight on position 0.
    pub first_token: f64,
    /// Lead of the best key over the runner-up.
    pub margin: f64,
    /// Entropy of the weights over the candidates, nats.
    pub entropy: f64,
    /// Different keys that the heads of a position read, as a share of the heads that read.
    pub distinct: f64,
}

impl HeadStats {
    /// Adds the mean over the layers' figures, with a weight.
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

/// What was selected when one text was looked at for the last time.
#[derive(Debug, Default)]
pub struct Picks(Vec<i32>);

impl Picks {
    /// The share of selections that are others than the last time, and the new ones in their place; none the
    /// first time.
    pub fn churn(&mut self, picks: Vec<i32>) -> Option<f64> {
        let last = std::mem::replace(&mut self.0, picks);
        let changed = last.iter().zip(&self.0).filter(|(a, b)| a != b).count();
        (!last.is_empty() && last.len() == self.0.len()).then(|| changed as f64 / last.len() as f64)
    }
}

impl Stateful for Picks {
    fn save(&self) -> Result<State> {
        let picks = Tensor::from_slice(&self.0, self.0.len(), &Device::Cpu)?;
        let tensors = (!self.0.is_empty()).then(|| ("last".to_owned(), picks)).into_iter().collect();
        Ok(State { tensors, ..State::default() })
    }

    fn restore(&mut self, state: State) -> Result<()> {
        self.0 = match state.tensors.get("last") {
            Some(picks) => picks.to_vec1()?,
            None => Vec::new(),
        };
        Ok(())
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
    observe(model, tokens, bytes, (context, batch), device, |_| ())
}

/// As [`evaluate`]; `watch` gets the figures of all layers for every batch.
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
    // Only the last window may be shorter, and goes alone.
    for group in windows.chunk_by(|a, b| a.len() == b.len()).flat_map(|same| same.chunks(batch.max(1))) {
        let Batch { inputs, targets, mask, predicted } = Batch::new(tokens, group, device)?;
        let pass = Pass { stats: Some(&stats), ..Pass::new(&mask) };
        let losses = model.token_losses(&inputs, &targets, &pass)?;
        sum += losses.iter().map(|&x| f64::from(x)).sum::<f64>();
        count += predicted;
        // Records hold whole tensors, so they do not outlive their pass.
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn churn_is_the_share_of_selections_that_changed_and_survives_a_stop() {
        let mut picks = Picks::default();
        assert_eq!(picks.churn(vec![1, 2, -1, 4]), None);
        assert_eq!(picks.churn(vec![1, 3, -1, 0]), Some(0.5));
        let mut other = Picks::default();
        other.restore(picks.save().unwrap()).unwrap();
        assert_eq!(other.churn(vec![1, 3, -1, 0]), Some(0.0));
        let mut fresh = Picks(vec![1]);
        fresh.restore(Picks::default().save().unwrap()).unwrap();
        assert_eq!(fresh.churn(vec![1]), None);
    }
}
