//! The interface of every attention layer.
//!
//! Shapes: x `[B, N, C]` in and out.

use std::cell::RefCell;

use candle_core::{Result, Tensor};
use gd_kernels::Mask;

use crate::cache::LayerCache;
use crate::probe::Probe;
use crate::stats::SelectionStats;

/// A layer in which positions attend to each other. [`GdAttention`](crate::GdAttention) and
/// [`SoftmaxAttention`](crate::SoftmaxAttention) are interchangeable behind it.
pub trait Attention: Send + Sync {
    /// x `[B, N, C]` -> `[B, N, C]`. With a cache, x continues the cached positions and the offset of the mask is their
    /// number; keys and values that went through the cache carry no gradient.
    ///
    /// # Errors
    /// Names the shapes, offsets or options that do not fit.
    fn attend(&self, x: &Tensor, pass: &Pass, cache: Option<&mut LayerCache>) -> Result<Tensor>;
}

/// What holds for all layers during one forward pass. [`Pass::new`] gives the defaults; set the other fields as needed.
#[derive(Debug, Clone, Copy)]
pub struct Pass<'a> {
    /// Which keys each query sees.
    pub mask: &'a Mask,
    /// Share of the hard forward pass in [0, 1]: 1 selects, 0 blends the candidates.
    pub hardness: f64,
    /// Candidates per query, if not the number that the layers are configured with.
    pub candidates: Option<usize>,
    /// Preserve floor of the gradient, if not that of the layers.
    pub preserve_floor: Option<f64>,
    /// Temperature of the gradient's softmax, if not that of the layers.
    pub temperature: Option<f64>,
    /// Added to the thresholds of heads that have one, in units of the score.
    pub threshold: Option<f64>,
    /// Where every layer, first to last, appends its figures; none to save the work.
    pub stats: Option<&'a RefCell<Vec<SelectionStats>>>,
    /// Observes the selecting layers, and may intervene.
    pub probe: Option<&'a dyn Probe>,
    /// The number of the layer, which the model sets for each: the probe gets it.
    pub layer: usize,
}

impl<'a> Pass<'a> {
    /// A hard pass with the options of the layers, without figures and probe.
    pub fn new(mask: &'a Mask) -> Self {
        Self {
            mask,
            hardness: 1.0,
            candidates: None,
            preserve_floor: None,
            temperature: None,
            threshold: None,
            stats: None,
            probe: None,
            layer: 0,
        }
    }
}
