//! Which keys a query may see: the given mask, alone or together with a causal one.

use candle_core::{DType, Result, Tensor};

use super::definition::Named;
use super::rows::both;
use super::stages::{Mask, Run};

/// The inputs with the positions of queries and keys, i64.
pub(super) const POSITIONS: [Named; 2] =
    [("query_positions", "[B,N], optional"), ("key_positions", "[B,M], optional")];

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
        let mask = if fits { align_batch(mask, scores)? } else { mask.clone() };
        if !fits || mask.broadcast_as(scores.shape()).is_err() {
            let (dims, dtype) = (mask.dims(), mask.dtype());
            candle_core::bail!(
                "mask {dims:?} {dtype:?} does not fit scores {:?}: u8 [N, M] expected",
                scores.dims()
            );
        }
        mask.broadcast_as(scores.shape())?.contiguous()
    }
}

/// The mask with as many dimensions as the scores, if its first one is the batch: `[B, 1, N, M]` for scores
/// `[B, 2, H, N, M]` becomes `[B, 1, 1, N, M]`.
fn align_batch(mask: &Tensor, scores: &Tensor) -> Result<Tensor> {
    let (dims, rank) = (mask.dims(), scores.rank());
    if dims.len() < 3 || dims.len() >= rank {
        return Ok(mask.clone());
    }
    let mut shape = vec![1; rank];
    shape[0] = dims[0];
    shape[rank - dims.len() + 1..].copy_from_slice(&dims[1..]);
    mask.reshape(shape)
}

/// The given mask, and of its keys those up to the own position.
pub(super) struct Causal;

impl Mask for Causal {
    fn name(&self) -> &'static str {
        "causal"
    }

    fn mask(&self, scores: &Tensor, run: &mut Run) -> Result<Tensor> {
        let (query, key) = positions(scores, run)?;
        both(&Given.mask(scores, run)?, &key.broadcast_le(&query)?)
    }
}

/// The positions of the queries `[.., N, 1]` and of the keys `[.., 1, M]` as i64: the inputs `query_positions` `[B, N]`
/// and `key_positions` `[B, M]`, or else 0, 1, .. for the keys and those of the last keys for the queries.
///
/// # Errors
/// More queries than keys, or positions of another shape.
pub(super) fn positions(scores: &Tensor, run: &Run) -> Result<(Tensor, Tensor)> {
    let [.., n, m] = *scores.dims() else { candle_core::bail!("scores {:?} have no rows", scores.dims()) };
    if let [Some(query), Some(key)] = POSITIONS.map(|(name, _)| run.inputs.optional(name)) {
        let b = query.dims2()?.0;
        return Ok((query.reshape((b, 1, n, 1))?, key.reshape((b, 1, 1, m))?));
    }
    if n > m {
        candle_core::bail!("{n} queries at the last of {m} keys: at most as many queries as keys expected");
    }
    let query = Tensor::arange((m - n) as i64, m as i64, scores.device())?.reshape((n, 1))?;
    Ok((query, Tensor::arange(0, m as i64, scores.device())?.reshape((1, m))?))
}
