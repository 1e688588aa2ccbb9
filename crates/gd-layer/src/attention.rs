//! What every attention layer offers, whatever happens inside.
//!
//! Shapes: x `[B, N, C]` in and out.

use std::cell::RefCell;

use candle_core::{Result, Tensor};
use gd_kernels::{Mask, Selected};

use crate::cache::LayerCache;

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
#[derive(Debug)]
pub struct Pass<'a> {
    /// Which keys each query sees.
    pub mask: &'a Mask,
    /// Share of the hard forward pass: 1 selects, 0 blends the candidates.
    pub hardness: f64,
    /// Candidates per query, if not the layers' own number.
    pub candidates: Option<usize>,
    /// Where every layer, first to last, leaves a record; none to save the work.
    pub record: Option<&'a RefCell<Vec<Record>>>,
}

impl<'a> Pass<'a> {
    /// A hard pass without records.
    pub fn new(mask: &'a Mask) -> Self {
        Self { mask, hardness: 1.0, candidates: None, record: None }
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
    /// The selections themselves; none for a softmax layer.
    pub selected: Option<Selected>,
}
