//! What the reads of a model's heads are worth: its loss without them, and its loss on tokens that could be read.

use std::cell::RefCell;
use std::collections::HashSet;

use candle_core::Device;
use gd_layer::Pass;
use serde::{Deserialize, Serialize};

use crate::data::{Batch, Tokens};
use crate::error::{Error, Result};
use crate::model::Transformer;

/// Parts of a window over which the loss by position is averaged.
const PARTS: usize = 8;

/// What the reads of a model's heads are worth on a text.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
pub struct ReadingReport {
    /// The mean loss in nats per token.
    pub loss: f64,
    /// The same without what the heads read: from the Beacon alone.
    pub loss_without_reads: f64,
    /// The mean gate of the heads that select, 0 where they abstain; none without heads that select.
    pub gate: Option<f64>,
    /// The share of their reads with a gate of at least 0.1.
    pub open: Option<f64>,
    /// The mean loss in each eighth of a window.
    pub by_position: Vec<f64>,
    /// The length n of the n-grams.
    pub ngram: usize,
    /// The mean loss on tokens whose n-gram occurred before in the window.
    pub repeated: f64,
    /// The share of these tokens.
    pub repeated_share: f64,
    /// The mean loss on all other tokens.
    pub other: f64,
}

impl ReadingReport {
    /// What cutting all reads costs in nats per token.
    pub fn cost_of_cut(&self) -> f64 {
        self.loss_without_reads - self.loss
    }
}

/// A sum of losses and their number.
#[derive(Debug, Clone, Copy, Default)]
struct Sum {
    sum: f64,
    count: usize,
}

impl Sum {
    fn add(&mut self, loss: f32) {
        self.sum += f64::from(loss);
        self.count += 1;
    }

    fn mean(self) -> f64 {
        self.sum / self.count.max(1) as f64
    }
}

/// Measures a model on `tokens` in consecutive windows of `context` tokens, `batch` at a time, with n-grams of `ngram`
/// tokens. A shorter last window is left out.
///
/// # Errors
/// A text shorter than a window, or an error of the device.
pub fn measure_reading(
    model: &Transformer,
    tokens: &Tokens,
    (context, batch): (usize, usize),
    ngram: usize,
    device: &Device,
) -> Result<ReadingReport> {
    let windows: Vec<_> = tokens.windows(context).filter(|window| window.len() == context).collect();
    let (mut all, mut cut, mut repeated, mut other) =
        (Sum::default(), Sum::default(), Sum::default(), Sum::default());
    let mut parts = [Sum::default(); PARTS];
    let (stats, mut gates, mut open) = (RefCell::new(Vec::new()), Vec::new(), Vec::new());
    for group in windows.chunks(batch.max(1)) {
        let Batch { inputs, targets, mask, .. } = Batch::new(tokens, group, device)?;
        let pass = Pass { stats: Some(&stats), ..Pass::new(&mask) };
        let losses = model.token_losses(&inputs, &targets, &pass)?;
        let without = model.token_losses(&inputs, &targets, &Pass { cut_reads: true, ..Pass::new(&mask) })?;
        for layer in stats.take() {
            gates.extend(layer.gate);
            open.extend(layer.open);
        }
        let (ids, targets) = (inputs.to_vec2::<u32>()?, targets.to_vec2::<u32>()?);
        let rows = losses.chunks(context).zip(without.chunks(context));
        for ((ids, targets), (losses, without)) in ids.iter().zip(&targets).zip(rows) {
            let seen = occurred_before(ids, targets, ngram);
            for (at, (&loss, &without)) in losses.iter().zip(without).enumerate() {
                if targets[at] == gd_kernels::cross_entropy::IGNORE {
                    continue;
                }
                all.add(loss);
                cut.add(without);
                parts[at * PARTS / context].add(loss);
                if seen[at] { repeated.add(loss) } else { other.add(loss) }
            }
        }
    }
    if all.count == 0 {
        return Err(Error::Invalid(format!("a text of {} tokens has no window of {context}", tokens.len())));
    }
    let mean = |x: &[f64]| (!x.is_empty()).then(|| x.iter().sum::<f64>() / x.len() as f64);
    Ok(ReadingReport {
        loss: all.mean(),
        loss_without_reads: cut.mean(),
        gate: mean(&gates),
        open: mean(&open),
        by_position: parts.iter().map(|part| part.mean()).collect(),
        ngram,
        repeated: repeated.mean(),
        repeated_share: repeated.count as f64 / all.count as f64,
        other: other.mean(),
    })
}

/// For every target whether the n-gram that it ends occurred before in the window: n - 1 inputs and the target.
fn occurred_before(ids: &[u32], targets: &[u32], n: usize) -> Vec<bool> {
    let mut window = ids.to_vec();
    window.extend(targets.last());
    let mut seen = HashSet::new();
    let ends_known = |at: usize| {
        // The target of position `at` is token `at + 1` of the window.
        (at + 2).checked_sub(n).is_some_and(|start| !seen.insert(window[start..at + 2].to_vec()))
    };
    (0..targets.len()).map(ends_known).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_ngram_counts_from_its_second_time_on() {
        // Bigrams 12 23 31 12 25: the second 12 ends at the target of position 3.
        let (ids, targets) = ([1, 2, 3, 1, 2], [2, 3, 1, 2, 5]);
        assert_eq!(occurred_before(&ids, &targets, 2), [false, false, false, true, false]);
        // Trigrams: none is complete before position 1.
        let (ids, targets) = ([1, 2, 1, 2, 1], [2, 1, 2, 1, 2]);
        assert_eq!(occurred_before(&ids, &targets, 3), [false, false, false, true, true]);
    }
}
