//! Which keys a query may see: the given mask, alone or together with a causal one.

use candle_core::{DType, Result, Tensor};

use super::rows::both;
use super::stages::{Mask, Run};

/// The input `mask`, `[N, M]` or with leading dimensions, 1 for a visible key; all keys without one.
pub(super) struct Given;

impl Mask for Given {
    fn name(&self) -> &'static str {
        "mask"
    }

    fn mask(&self, scores: &Tensor, run: &mut Run) -> Result<Tensor> {
        let Some(mask) = run.inputs.optional("mask") else {
            return Tensor::ones(scores.shape(), DType::U8, scores.device());
        };
        let fits = mask.dtype() == DType::U8 && mask.rank() >= 2;
        if !fits || mask.broadcast_as(scores.shape()).is_err() {
            let (dims, dtype) = (mask.dims(), mask.dtype());
            candle_core::bail!("mask {dims:?} {dtype:?} does not fit scores {:?}: u8 [N, M] expected", scores.dims());
        }
        mask.broadcast_as(scores.shape())?.contiguous()
    }
}

/// The given mask, and of its keys those up to the own position j <= i + (M - N).
pub(super) struct Causal;

impl Mask for Causal {
    fn name(&self) -> &'static str {
        "causal"
    }

    fn mask(&self, scores: &Tensor, run: &mut Run) -> Result<Tensor> {
        let (query, key) = positions(scores)?;
        both(&Given.mask(scores, run)?, &key.broadcast_le(&query)?)
    }
}

/// The positions of the queries `[N, 1]` and of the keys `[1, M]` as i64; the last query stands at the last key.
///
/// # Errors
/// More queries than keys.
pub(super) fn positions(scores: &Tensor) -> Result<(Tensor, Tensor)> {
    let [.., n, m] = *scores.dims() else { candle_core::bail!("scores {:?} have no rows", scores.dims()) };
    if n > m {
        candle_core::bail!("{n} queries at the last of {m} keys: at most as many queries as keys expected");
    }
    let (first, end) = ((m - n) as i64, m as i64);
    let query = Tensor::arange(first, end, scores.device())?.reshape((n, 1))?;
    Ok((query, Tensor::arange(0, end, scores.device())?.reshape((1, m))?))
}
