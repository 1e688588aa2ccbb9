//! The interface of the attention layers.
//!
//! Shapes: x `[B, N, C]` in and out.

use std::cell::RefCell;

use candle_core::{Result, Tensor};
use gd_kernels::Mask;

use crate::cache::LayerCache;
use crate::linear::Linear;
use crate::probe::Probe;
use crate::stats::SelectionStats;

/// An attention layer. [`GdAttention`](crate::GdAttention) and
/// [`SoftmaxAttention`](crate::SoftmaxAttention) implement it, so that a model can use either.
pub trait Attention: Send + Sync {
    /// The output `[B, N, C]` of the layer for x `[B, N, C]`. With a cache, x continues the cached positions, whose
    /// number must be the offset of the mask; keys and values are then read from the cache, and carry no gradient.
    ///
    /// # Errors
    /// Shapes, offsets or options that do not fit.
    fn attend(&self, x: &Tensor, pass: &Pass, cache: Option<&mut LayerCache>) -> Result<Tensor>;

    /// The projections of the layer by the names of their weights: `q_proj`, `k_proj`, `v_proj`, `o_proj` and `g_proj`, as
    /// far as the layer has them.
    fn projections_mut(&mut self) -> Vec<(&'static str, &mut Linear)>;
}

/// The options of a forward pass, the same for all layers. [`Pass::new`] gives the defaults; set the other fields as
/// needed.
#[derive(Debug, Clone, Copy)]
pub struct Pass<'a> {
    /// Which keys each query sees.
    pub mask: &'a Mask,
    /// Share of the hard forward pass in [0, 1]: 1 selects, 0 blends the candidates.
    pub hardness: f64,
    /// Candidates per query; none for the number that each layer is configured with.
    pub candidates: Option<usize>,
    /// Preserve floor in [0, 1] of the gradient; none for that of each layer.
    pub preserve_floor: Option<f64>,
    /// Temperature T > 0 of the gradient's softmax; none for that of each layer.
    pub temperature: Option<f64>,
    /// Added to the thresholds of heads that have one, in the unit of energies.
    pub threshold: Option<f64>,
    /// Whether the layers compute their output without what their heads read: that of the Beacon alone. The heads still
    /// read, so that statistics and probes see what they would.
    pub cut_reads: bool,
    /// Every layer, first to last, appends its statistics here; none to skip their computation.
    pub stats: Option<&'a RefCell<Vec<SelectionStats>>>,
    /// Observes the selecting layers, and may change their candidates.
    pub probe: Option<&'a dyn Probe>,
    /// The index of the layer, which the model sets for each of them and which is passed to the probe.
    pub layer: usize,
}

impl<'a> Pass<'a> {
    /// A pass with hardness 1 and the options of the layers, without statistics and probe.
    pub fn new(mask: &'a Mask) -> Self {
        Self {
            mask,
            hardness: 1.0,
            candidates: None,
            preserve_floor: None,
            temperature: None,
            threshold: None,
            cut_reads: false,
            stats: None,
            probe: None,
            layer: 0,
        }
    }
}
