//! What decoding on a GPU adds to the scores of keys, kept beside a cache.

#[cfg(feature = "gpu")]
pub(crate) mod gpu;
#[cfg(feature = "gpu")]
pub mod launch;

use candle_core::{DType, Tensor};

use crate::backend::check::dims4;
use crate::backend::dispatch::on_gpu;
use crate::cache::append_buffer::{AppendBuffer, WritePosition, check_places, ends};
use crate::error::{Error, Result};
use crate::options::Score;

/// Keys to a multiple of which biases are padded.
pub(crate) const BIAS_TILE: usize = 64;

/// Biases of a head, in whole tiles.
pub(crate) fn bias_row(keys: usize) -> usize {
    keys.next_multiple_of(BIAS_TILE)
}

/// The norms of keys `[B, Hk, M, D]` as decoding on a GPU needs them, 4 bytes a key. A decoding step that is given
/// them reads the keys once instead of twice.
///
/// Batch entries, or the pages `[pages, Hk, page, D]` of a [`PagedCache`](crate::PagedCache), may have different
/// numbers of keys. Clones share their memory until one of them is written to.
#[derive(Debug, Clone)]
pub struct KeyBias {
    /// f32 `[B, Hk, room]`, room a multiple of the tiles of keys that decoding reads.
    bias: AppendBuffer,
    head_dim: usize,
    dtype: DType,
    score: Score,
}

impl KeyBias {
    /// Those of k, on a GPU, for scans with this score.
    ///
    /// # Errors
    /// A tensor of another rank, dtype or device.
    pub fn new(k: &Tensor, score: Score) -> Result<Self> {
        let mut new = Self::like(k, score)?;
        new.append(k)?;
        Ok(new)
    }

    /// None yet, for batch entries (or pages), heads, head_dim, dtype and device as those of k `[B, Hk, M, D]`.
    ///
    /// # Errors
    /// A tensor of another rank.
    pub fn like(k: &Tensor, score: Score) -> Result<Self> {
        let (batch, heads, keys, head_dim) = dims4("k", k)?;
        let room = bias_row(keys);
        let bias = AppendBuffer::new(&[batch, heads, room], DType::F32, k.device())?;
        Ok(Self { bias, head_dim, dtype: k.dtype(), score })
    }

    /// Appends those of k `[B, Hk, m, D]`, to every batch entry behind its own last key.
    ///
    /// # Errors
    /// Another batch, number of heads, head_dim, dtype or device.
    pub fn append(&mut self, k: &Tensor) -> Result<()> {
        self.write(k, &ends(self.lengths()))
    }

    /// Writes those of k `[R, Hk, m, D]`: of its entry r over those of batch entry (or page) `at[r][0]` from key
    /// `at[r][1]` on, or behind them.
    ///
    /// # Errors
    /// As [`Int8Keys::write`](crate::Int8Keys::write).
    pub fn write(&mut self, k: &Tensor, at: &[WritePosition]) -> Result<()> {
        let (entries, heads, more, head_dim) = dims4("k", k)?;
        let own = self.bias.buffer().dims();
        if (heads, head_dim, k.dtype()) != (own[1], self.head_dim, self.dtype) {
            return Err(Error::Invalid(format!(
                "k {:?} of {:?} does not continue the biases of keys of batch {}, heads {}, head_dim {} and {:?}",
                k.dims(),
                k.dtype(),
                own[0],
                own[1],
                self.head_dim,
                self.dtype
            )));
        }
        check_places(at, entries, more, self.lengths())?;
        let new = biases(k, self.score)?;
        self.bias.write(&new.narrow(2, 0, more)?, at)
    }

    /// Some of the batch entries, in any order.
    ///
    /// # Errors
    /// One that is not there.
    pub fn select(&self, entries: &[usize]) -> Result<Self> {
        Ok(Self { bias: self.bias.select(entries)?, ..*self })
    }

    /// The batch entries of several, in their order.
    ///
    /// # Errors
    /// None to stack, or keys of other heads, dimensions, dtypes, scores or devices than the first.
    pub fn stack(all: &[&Self]) -> Result<Self> {
        let Some(first) = all.first() else { return Err(Error::Invalid("no key biases to stack".into())) };
        let kind = |one: &Self| (one.bias.buffer().dims()[1], one.head_dim, one.dtype, one.score);
        if let Some(other) = all.iter().find(|one| kind(one) != kind(first)) {
            return Err(Error::Invalid(format!(
                "key biases of (heads, head_dim, dtype, score) {:?} and {:?} are not of one cache",
                kind(first),
                kind(other)
            )));
        }
        let bias = AppendBuffer::stack(&all.iter().map(|one| &one.bias).collect::<Vec<_>>())?;
        Ok(Self { bias, ..**first })
    }

    /// Keys of every batch entry.
    pub fn lengths(&self) -> &[usize] {
        self.bias.lengths()
    }

    /// The biases, f32 `[B, Hk, room]`, if they are those of these keys `[B, Hk, M, D]`.
    #[cfg_attr(not(feature = "gpu"), allow(dead_code))]
    pub(crate) fn of(&self, keys: [usize; 4], score: Score) -> Result<&Tensor> {
        let own = self.bias.buffer().dims();
        let shape = [own[0], own[1], self.bias.longest(), self.head_dim];
        if (shape, self.score) != (keys, score) {
            return Err(Error::Invalid(format!(
                "key biases of {shape:?} {:?} for keys {keys:?} {score:?}",
                self.score
            )));
        }
        Ok(self.bias.buffer())
    }
}

/// Those of k `[B, Hk, M, D]`: f32 `[B, Hk, M rounded up]`.
fn biases(k: &Tensor, score: Score) -> Result<Tensor> {
    on_gpu!(k.device(), G => crate::cache::key_bias::gpu::biases::<G>(k, score));
    Err(Error::Unsupported(format!(
        "key biases for the {score:?} score of keys on {:?}; on a GPU they are",
        k.device().location()
    )))
}
