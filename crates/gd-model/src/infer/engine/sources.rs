//! Which positions the selecting layers read when a token was predicted.

use std::sync::{Mutex, PoisonError};

use candle_core::{DType, Result};
use gd_layer::{Probe, SelectionView};
use serde::Serialize;

/// What a head of a selecting layer read when it predicted a token.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Source {
    /// The index of the layer.
    pub layer: usize,
    /// The query head.
    pub head: usize,
    /// The position of the token whose value was read; `None` if the head abstained.
    pub position: Option<usize>,
    /// The energy difference to the next candidate; +∞ if there is none.
    pub margin: f32,
}

/// The selections of a layer for the last query of every sequence.
#[derive(Debug)]
struct Layer {
    index: usize,
    heads: usize,
    /// `[B * Hq]`, negative where the head abstained.
    positions: Vec<i32>,
    margins: Vec<f32>,
}

/// Records the selections for the last query of every sequence in one forward pass.
#[derive(Debug, Default)]
pub(super) struct SourceProbe {
    layers: Mutex<Vec<Layer>>,
}

impl SourceProbe {
    /// The sources of a sequence, by its index in the batch: layer by layer, head by head.
    pub(super) fn of(&self, sequence: usize) -> Vec<Source> {
        let layers = self.layers.lock().unwrap_or_else(PoisonError::into_inner);
        let source = |layer: &Layer, head: usize| {
            let at = sequence * layer.heads + head;
            Some(Source {
                layer: layer.index,
                head,
                position: usize::try_from(*layer.positions.get(at)?).ok(),
                margin: *layer.margins.get(at)?,
            })
        };
        layers.iter().flat_map(|layer| (0..layer.heads).filter_map(move |head| source(layer, head))).collect()
    }
}

impl Probe for SourceProbe {
    fn selected(&self, view: &SelectionView) -> Result<()> {
        let (_, heads, queries) = view.selected.index.dims3()?;
        let index = view.selected.index.narrow(2, queries - 1, 1)?;
        let margin = view.selected.margin.narrow(2, queries - 1, 1)?;
        self.layers.lock().unwrap_or_else(PoisonError::into_inner).push(Layer {
            index: view.layer,
            heads,
            positions: index.flatten_all()?.to_vec1()?,
            margins: margin.to_dtype(DType::F32)?.flatten_all()?.to_vec1()?,
        });
        Ok(())
    }
}
