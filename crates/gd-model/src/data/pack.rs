//! Batches of packed windows. Windows are cut without regard to documents, and a mask separates the documents in one
//! window. Rotary positions count through the window, because only their differences matter.

use std::ops::Range;

use candle_core::{Device, Tensor};
use gd_kernels::Mask;
use gd_kernels::cross_entropy::IGNORE;

use super::order::Epoch;
use super::tokens::Tokens;
use crate::error::{Error, Result};

/// The inputs and targets of one forward pass.
#[derive(Clone, Debug)]
pub struct Batch {
    /// The input tokens, u32 `[B, N]`.
    pub inputs: Tensor,
    /// The token after each input, u32 `[B, N]`; [`IGNORE`] for the last token of a document, and where
    /// the next token is not to be learned ([`Tokens::learned`]).
    pub targets: Tensor,
    /// The number of targets that are not [`IGNORE`].
    pub predicted: usize,
    /// A causal mask, in which a token sees its own document alone.
    pub mask: Mask,
}

impl Batch {
    /// A batch with one row per window. The windows are ranges of inputs of the same length that end before the last
    /// token.
    ///
    /// # Errors
    /// No windows, or an error of the device.
    pub fn new(tokens: &Tokens, windows: &[Range<usize>], device: &Device) -> Result<Self> {
        let Some(n) = windows.first().map(ExactSizeIterator::len) else {
            return Err(Error::Invalid("a batch without windows".into()));
        };
        let (mut inputs, mut targets) = (Vec::new(), Vec::new());
        let mut boundaries = Vec::with_capacity(windows.len());
        for window in windows {
            let ids = tokens.read(window.start..window.end + 1);
            let first = targets.len();
            inputs.extend_from_slice(&ids[..n]);
            targets.extend_from_slice(&ids[1..]);
            for (at, learned) in
                tokens.learned(window.start + 1..window.end + 1).into_iter().flatten().enumerate()
            {
                if !learned {
                    targets[first + at] = IGNORE;
                }
            }
            let mut row = vec![0];
            for end in tokens.ends(window.clone()) {
                targets[first + end - 1] = IGNORE;
                row.push(end);
            }
            if row.last() != Some(&n) {
                row.push(n);
            }
            boundaries.push(row);
        }
        let causal = Mask::causal(0);
        let predicted = targets.iter().filter(|&&t| t != IGNORE).count();
        let packed = boundaries.iter().any(|row| row.len() > 2);
        Ok(Self {
            inputs: Tensor::from_vec(inputs, (windows.len(), n), device)?,
            targets: Tensor::from_vec(targets, (windows.len(), n), device)?,
            predicted,
            mask: if packed { causal.packed(boundaries) } else { causal },
        })
    }
}

/// Training batches. Every epoch reads all windows of the text once, in its own random order and with its own random
/// phase.
#[derive(Debug)]
pub struct Batches {
    tokens: Tokens,
    seed: u64,
}

impl Batches {
    /// Batches of `tokens` in an order that depends on `seed`.
    pub fn new(tokens: Tokens, seed: u64) -> Self {
        Self { tokens, seed }
    }

    /// The batch of the windows of `context` inputs at these places of the run, see [`places`](super::places). It depends
    /// on the tokens, the seed and the arguments alone.
    ///
    /// # Errors
    /// No places, or a text shorter than one window.
    pub fn batch(&self, places: Range<u64>, context: usize, device: &Device) -> Result<Batch> {
        let count = self.windows_per_epoch(context)? as u64;
        let mut epoch = None;
        let windows: Vec<Range<usize>> = places
            .map(|place| {
                let number = place / count;
                if epoch.as_ref().is_none_or(|(n, _)| *n != number) {
                    epoch = Some((number, Epoch::new(self.seed, number, self.tokens.len(), context)));
                }
                let start = epoch.as_ref().map_or(0, |(_, e)| e.start(place % count));
                start..start + context
            })
            .collect();
        Batch::new(&self.tokens, &windows, device)
    }

    /// The number of windows of `context` inputs in an epoch.
    ///
    /// # Errors
    /// A text shorter than one window.
    pub fn windows_per_epoch(&self, context: usize) -> Result<usize> {
        super::check("the training text", &self.tokens, context, "")?;
        Ok(Epoch::windows(self.tokens.len(), context))
    }
}
