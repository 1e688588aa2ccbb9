//! Keys kept as 8-bit integers beside a KV cache, for certified scans.

use candle_core::{DType, Tensor};

use crate::by_float;
use crate::cpu::filter::Filter;
use crate::cpu::view::with_view;
use crate::error::{Error, Result};
use crate::fused::with_contiguous_rows;
use crate::options::Score;
use crate::plan::{Problem, require_device};
use crate::scan::dims4;

/// The keys `[B, Hk, M, D]` of a cache as integers with scales and error bounds: D + 16 bytes a key.
/// A certified scan that is given them reads the keys themselves only where the bounds cannot decide,
/// and its result is that of the native scan.
#[derive(Debug, Clone)]
pub struct QuantizedKeys {
    filter: Filter,
    shape: [usize; 3],
    dtype: DType,
}

impl QuantizedKeys {
    /// Quantises k `[B, Hk, M, D]` in f32, f16 or bf16 for scans with this score.
    ///
    /// # Errors
    /// A tensor of another rank, dtype or device.
    pub fn new(k: &Tensor, score: Score) -> Result<Self> {
        let (b, h, _, d) = dims4("k", k)?;
        if d > crate::plan::MAX_HEAD_DIM {
            return Err(Error::Unsupported(format!("head_dim {d}; at most {}", crate::plan::MAX_HEAD_DIM)));
        }
        let mut new = Self { filter: Filter::new(b * h, d, score), shape: [b, h, d], dtype: k.dtype() };
        new.append(k)?;
        Ok(new)
    }

    /// Appends k `[B, Hk, m, D]`.
    ///
    /// # Errors
    /// Another batch, number of heads, head_dim or dtype.
    pub fn append(&mut self, k: &Tensor) -> Result<()> {
        let (b, h, _, d) = dims4("k", k)?;
        require_device("quantised keys", k.device())?;
        if [b, h, d] != self.shape || k.dtype() != self.dtype || k.dtype() == DType::F64 {
            return Err(Error::Invalid(format!(
                "k {:?} of {:?} does not continue quantised keys of batch {}, heads {}, head_dim {} and {:?}",
                k.dims(),
                k.dtype(),
                self.shape[0],
                self.shape[1],
                self.shape[2],
                self.dtype
            )));
        }
        let k = with_contiguous_rows(&k.detach())?;
        by_float!("quantised keys", k.dtype(), T => with_view::<T, _>(&k, |k| {
            self.filter.append(k);
            Ok(())
        }))
    }

    /// Keys held per head.
    pub fn len(&self) -> usize {
        self.filter.len()
    }

    /// Whether no key is held.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The integers, if they are those of a problem's keys.
    pub(crate) fn filter(&self, problem: &Problem) -> Result<&Filter> {
        let Problem { batch, kv_heads, keys, head_dim, .. } = *problem;
        let fits = self.shape == [batch, kv_heads, head_dim] && self.len() == keys;
        if !fits || self.dtype != problem.dtype || self.filter.score() != problem.score {
            return Err(Error::Invalid(format!(
                "quantised keys [{}, {}, {}, {}] of {:?} for the {:?} score do not belong to keys [{batch}, \
                 {kv_heads}, {keys}, {head_dim}] of {:?} and the {:?} score",
                self.shape[0],
                self.shape[1],
                self.len(),
                self.shape[2],
                self.dtype,
                self.filter.score(),
                problem.dtype,
                problem.score
            )));
        }
        Ok(&self.filter)
    }
}
