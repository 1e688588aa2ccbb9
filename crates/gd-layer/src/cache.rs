//! The state of one layer between decoding steps.

use candle_core::{Result, Tensor};
use gd_kernels::AverageState;

/// Positions by which a growing cache is extended.
const BLOCK: usize = 256;

/// A tensor that grows along one dimension without copying what it holds at every step.
#[derive(Debug, Clone)]
struct Growing {
    buffer: Tensor,
    dim: usize,
    len: usize,
}

impl Growing {
    fn new(first: &Tensor, dim: usize) -> Result<Self> {
        let mut shape = first.dims().to_vec();
        shape[dim] = first.dims()[dim].next_multiple_of(BLOCK);
        let buffer = Tensor::zeros(shape, first.dtype(), first.device())?;
        let mut grown = Self { buffer, dim, len: 0 };
        grown.append(first)?;
        Ok(grown)
    }

    fn append(&mut self, next: &Tensor) -> Result<()> {
        let next = next.detach().contiguous()?;
        let more = next.dims()[self.dim];
        let capacity = self.buffer.dims()[self.dim];
        if self.len + more > capacity {
            let mut shape = self.buffer.dims().to_vec();
            shape[self.dim] = (self.len + more).max(capacity * 2).next_multiple_of(BLOCK);
            let buffer = Tensor::zeros(shape, self.buffer.dtype(), self.buffer.device())?;
            buffer.slice_set(&self.get()?.contiguous()?, self.dim, 0)?;
            self.buffer = buffer;
        }
        self.buffer.slice_set(&next, self.dim, self.len)?;
        self.len += more;
        Ok(())
    }

    fn get(&self) -> Result<Tensor> {
        self.buffer.narrow(self.dim, 0, self.len)
    }
}

/// Keys, values, key prior, the convolution's last inputs and the running averages of one layer.
/// Nothing in it carries a gradient.
#[derive(Debug, Clone, Default)]
pub struct LayerCache {
    keys: Option<Growing>,
    values: Option<Growing>,
    prior: Option<Growing>,
    /// Last inputs of the causal convolution `[B, W-1, C]`.
    pub(crate) conv: Option<Tensor>,
    /// Running averages of the Beacon's memory.
    pub(crate) average: Option<AverageState>,
}

fn push(slot: &mut Option<Growing>, next: &Tensor, dim: usize) -> Result<Tensor> {
    match slot {
        Some(grown) => grown.append(next)?,
        None => *slot = Some(Growing::new(next, dim)?),
    }
    slot.as_ref().map_or_else(|| next.narrow(dim, 0, 0), Growing::get)
}

impl LayerCache {
    /// An empty cache.
    pub fn new() -> Self {
        Self::default()
    }

    /// Positions held.
    pub fn len(&self) -> usize {
        self.keys.as_ref().map_or(0, |k| k.len)
    }

    /// Whether nothing is held.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Appends k, v `[B, Hk, N, D]` and prior `[B, Hk, N]`; returns all positions held.
    pub(crate) fn extend(
        &mut self,
        k: &Tensor,
        v: &Tensor,
        prior: Option<&Tensor>,
    ) -> Result<(Tensor, Tensor, Option<Tensor>)> {
        let prior = prior.map(|p| push(&mut self.prior, p, 2)).transpose()?;
        Ok((push(&mut self.keys, k, 2)?, push(&mut self.values, v, 2)?, prior))
    }
}
