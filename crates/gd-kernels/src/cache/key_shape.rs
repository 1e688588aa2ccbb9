//! The shape of cached keys, and the checks of keys against it.

use candle_core::{DType, Tensor};

use crate::backend::check::dims4;
use crate::cache::position::{WritePosition, check_positions};
use crate::error::{Error, Result};
use crate::options::Score;

/// Shape and dtype of cached keys `[sequences, Hk, _, D]`, and the score that they are prepared for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct KeyShape {
    /// Batch entries or pages.
    pub sequences: usize,
    /// Hk.
    pub kv_heads: usize,
    /// D.
    pub head_dim: usize,
    /// Element type of the keys.
    pub dtype: DType,
    /// The score whose key biases are stored.
    pub score: Score,
}

impl KeyShape {
    /// The shape of k `[sequences, Hk, M, D]`.
    pub(crate) fn of(k: &Tensor, score: Score) -> Result<Self> {
        let (sequences, kv_heads, _, head_dim) = dims4("k", k)?;
        Ok(Self { sequences, kv_heads, head_dim, dtype: k.dtype(), score })
    }

    /// Checks keys k `[R, Hk, m, D]` that are to be written at these positions; returns m. `cache` names the cache in
    /// errors.
    pub(crate) fn check_write(
        &self,
        cache: &str,
        k: &Tensor,
        at: &[WritePosition],
        lengths: &[usize],
    ) -> Result<usize> {
        let (entries, kv_heads, rows, head_dim) = dims4("k", k)?;
        if (kv_heads, head_dim, k.dtype()) != (self.kv_heads, self.head_dim, self.dtype) {
            return Err(Error::Invalid(format!(
                "k {:?} of {:?} does not continue {cache} of batch {}, heads {}, head_dim {} and {:?}",
                k.dims(),
                k.dtype(),
                self.sequences,
                self.kv_heads,
                self.head_dim,
                self.dtype
            )));
        }
        check_positions(at, entries, rows, lengths)?;
        Ok(rows)
    }

    /// The shape of stacked caches; refuses caches that differ in more than their sequences.
    pub(crate) fn stacked(cache: &str, shapes: impl Iterator<Item = Self>) -> Result<Self> {
        let mut stacked: Option<Self> = None;
        for shape in shapes {
            let Some(first) = &mut stacked else {
                stacked = Some(shape);
                continue;
            };
            let kind = |s: &Self| (s.kv_heads, s.head_dim, s.dtype, s.score);
            if kind(&shape) != kind(first) {
                return Err(Error::Invalid(format!(
                    "{cache} of (heads, head_dim, dtype, score) {:?} and {:?} cannot be stacked",
                    kind(first),
                    kind(&shape)
                )));
            }
            first.sequences += shape.sequences;
        }
        stacked.ok_or_else(|| Error::Invalid(format!("no {cache} to stack")))
    }

    /// Checks that a cache of this shape, with `longest` keys, belongs to keys of shape `keys` with `count` keys.
    pub(crate) fn check_keys(&self, cache: &str, longest: usize, keys: &Self, count: usize) -> Result<()> {
        if (self, longest) == (keys, count) {
            return Ok(());
        }
        let describe = |s: &Self, count: usize| {
            let dims = [s.sequences, s.kv_heads, count, s.head_dim];
            format!("{dims:?} of {:?} for the {:?} score", s.dtype, s.score)
        };
        Err(Error::Invalid(format!(
            "{cache} {} do not belong to keys {}",
            describe(self, longest),
            describe(keys, count)
        )))
    }
}
