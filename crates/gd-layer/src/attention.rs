//! What every attention layer offers, whatever happens inside.
//!
//! Shapes: x `[B, N, C]` in and out.

use std::cell::RefCell;

use candle_core::{Result, Tensor};
use gd_kernels::{Mask, Selected};

use crate::cache::LayerCache;
use crate::probe::Probe;

/// A layer that lets positions read each other. `GdAttention` and `SoftmaxAttention` are swap
/// partners behind it.
pub trait Attention: Send + Sync {
    /// x `[B, N, C]` -> `[B, N, C]`. With a cache, x continues the cached positions and the mask's
    /// offset is their number; cached tensors carry no gradient.
    ///
    /// # Errors
    /// Names what does not fit.
    fn attend(&self, x: &Tensor, pass: &Pass, cache: Option<&mut LayerCache>) -> Result<Tensor>;
}

/// What holds for all layers during one forward pass.
#[derive(Debug, Clone, Copy)]
pub struct Pass<'a> {
    /// Which keys each query sees.
    pub mask: &'a Mask,
    /// Share of the hard forward pass: 1 selects, 0 blends the candidates.
    pub hardness: f64,
    /// Candidates per query, if not the layers' own number.
    pub candidates: Option<usize>,
    /// Preserve floor of the gradient, if not the layers' own.
    pub preserve_floor: Option<f64>,
    /// Temperature of the gradient's softmax, if not the layers' own.
    pub temperature: Option<f64>,
    /// Added to the heads' thresholds where they have one, in units of the score.
    pub threshold: Option<f64>,
    /// Where every layer, first to last, leaves a record; none to save the work.
    pub record: Option<&'a RefCell<Vec<Record>>>,
    /// What looks into the selecting layers, and may reach in.
    pub probe: Option<&'a dyn Probe>,
    /// The number of the layer, which the model sets for each: the probe gets it.
    pub layer: usize,
}

impl<'a> Pass<'a> {
    /// A hard pass without records.
    pub fn new(mask: &'a Mask) -> Self {
        Self {
            mask,
            hardness: 1.0,
            candidates: None,
            preserve_floor: None,
            temperature: None,
            threshold: None,
            record: None,
            probe: None,
            layer: 0,
        }
    }
}

/// What a layer did in one pass, over batch, heads and queries.
#[derive(Debug, Clone)]
pub struct Record {
    /// Share of (query, head) pairs that read nothing.
    pub abstained: f64,
    /// Mean weight on position 0 (for a selecting layer: share of queries that select it).
    pub first_token: f64,
    /// Mean lead of the best key over the runner-up, in units of the score, where there are two.
    pub margin: f64,
    /// Mean entropy of the weights over the candidates, nats: of the keys in view for a softmax layer.
    pub entropy: f64,
    /// Mean number of different keys that the heads of a position read, as a share of the heads that read.
    pub distinct: f64,
    /// The key of greatest weight for every (batch, head, query) in this order; -1 where nothing is read.
    pub picks: Vec<i32>,
    /// The selections themselves; none for a softmax layer.
    pub selected: Option<Selected>,
}

/// The different keys that the heads of a position read, over the heads that read: the mean over batch and
/// positions where any does. `picks` as in [`Record`], for `b` sequences of `n` queries.
pub(crate) fn distinct(picks: &[i32], b: usize, n: usize) -> f64 {
    let heads = picks.len() / (b * n).max(1);
    let (mut sum, mut count) = (0.0, 0usize);
    let mut read = Vec::with_capacity(heads);
    for (b, i) in (0..b).flat_map(|b| (0..n).map(move |i| (b, i))) {
        read.clear();
        read.extend((0..heads).map(|h| picks[(b * heads + h) * n + i]).filter(|&j| j >= 0));
        if read.is_empty() {
            continue;
        }
        let of = read.len();
        read.sort_unstable();
        read.dedup();
        sum += read.len() as f64 / of as f64;
        count += 1;
    }
    sum / count.max(1) as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn distinct_keys_are_counted_over_the_heads_that_read() {
        // Two sequences, three heads, two queries.
        let picks = [0, 1, 0, 1, 0, 0, 5, -1, 6, -1, -1, -1];
        // (0: one of three), (1: two of three), (5 and 6: two of two), none.
        assert!((distinct(&picks, 2, 2) - (1.0 / 3.0 + 2.0 / 3.0 + 1.0) / 3.0).abs() < 1e-12);
    }
}
