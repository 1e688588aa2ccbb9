//! Which positions of a chunk of linear attention read each other.

use candle_core::{DType, Result, Tensor};

/// Which positions of a chunk belong together, as numbers 0 and 1.
pub(super) struct ChunkSets {
    /// Whether a query reads a key, `[B|1, 1, 1, N, N]`.
    pub(super) pairs: Tensor,
    /// Whether the sequence of a query began before the chunk, `[B|1, 1, 1, N, 1]`.
    pub(super) reads: Tensor,
    /// Whether a key belongs to the sequence of the last position, `[B|1, 1, N, 1]`.
    pub(super) stays: Tensor,
    /// Whether that sequence began before the chunk, `[B|1, 1, 1, 1]`.
    pub(super) keeps: Tensor,
}

impl ChunkSets {
    /// From the positions `[B|1, N]` (i64) of the chunk in their sequences.
    pub(super) fn new(at: &Tensor, dtype: DType) -> Result<Self> {
        let (b, n) = at.dims2()?;
        let place = Tensor::arange(0i64, n as i64, at.device())?;
        // The place of the first position of every sequence, negative before the chunk.
        let first = place.broadcast_sub(at)?;
        let (query, key) = (place.reshape((1, n, 1))?, place.reshape((1, 1, n))?);
        let own = key.broadcast_ge(&first.unsqueeze(2)?)?;
        let pairs = own.broadcast_mul(&key.broadcast_le(&query)?)?;
        let last = first.narrow(1, n - 1, 1)?;
        Ok(Self {
            pairs: pairs.to_dtype(dtype)?.reshape((b, 1, 1, n, n))?,
            reads: first.lt(0i64)?.to_dtype(dtype)?.reshape((b, 1, 1, n, 1))?,
            stays: place.broadcast_ge(&last)?.to_dtype(dtype)?.reshape((b, 1, n, 1))?,
            keeps: last.lt(0i64)?.to_dtype(dtype)?.reshape((b, 1, 1, 1))?,
        })
    }
}
