//! The validated sizes and options of a scan, which decoding shares.

use candle_core::{DType, Tensor};

use crate::backend::check::{check_stored, dims4};
use crate::cache::KeyShape;
use crate::error::{Error, Result};
use crate::ops::scan::options::Scan;
use crate::options::{Precision, Score, TieBreak};

/// The sizes and options of a scan of q `[batch, q_heads, queries, head_dim]` against k
/// `[batch, kv_heads, keys, head_dim]`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Problem {
    /// B.
    pub batch: usize,
    /// Hq, a multiple of `kv_heads`.
    pub q_heads: usize,
    /// Hk.
    pub kv_heads: usize,
    /// N.
    pub queries: usize,
    /// M.
    pub keys: usize,
    /// D.
    pub head_dim: usize,
    /// K, without protected keys.
    pub candidates: usize,
    /// Element type of q.
    pub dtype: DType,
    /// Element type of k: that of q or, on the CPU, f16 or bf16 where q is f32.
    pub key_dtype: DType,
    /// How keys are scored.
    pub score: Score,
    /// Which of several keys with the same energy comes first.
    pub tie: TieBreak,
    /// How the candidates are found.
    pub precision: Precision,
}

impl Problem {
    /// Validates the shapes, dtypes and devices of q and k, and the mask.
    ///
    /// # Errors
    /// [`Error::Invalid`] names the shapes or values that do not fit.
    pub(crate) fn new(q: &Tensor, k: &Tensor, scan: &Scan) -> Result<Self> {
        let (batch, q_heads, queries, head_dim) = dims4("q", q)?;
        let (k_batch, kv_heads, keys, k_dim) = dims4("k", k)?;
        if k_batch != batch || k_dim != head_dim {
            return Err(Error::Invalid(format!(
                "q {:?} and k {:?} differ in batch or head_dim",
                q.dims(),
                k.dims()
            )));
        }
        if q_heads % kv_heads != 0 {
            return Err(Error::Invalid(format!(
                "{q_heads} query heads are not a multiple of {kv_heads} key heads"
            )));
        }
        check_stored("scan", q, "k", k)?;
        if !q.device().same_device(k.device()) {
            return Err(Error::Invalid("q and k are on different devices".into()));
        }
        if keys > i32::MAX as usize {
            return Err(Error::Invalid(format!("{keys} keys do not fit an i32 index")));
        }
        scan.mask.validate(batch, keys)?;
        Ok(Self {
            batch,
            q_heads,
            kv_heads,
            queries,
            keys,
            head_dim,
            candidates: scan.candidates,
            dtype: q.dtype(),
            key_dtype: k.dtype(),
            score: scan.score,
            tie: scan.tie,
            precision: scan.precision_on(q.device()),
        })
    }

    /// Query heads per key-value head.
    pub fn group(&self) -> usize {
        self.q_heads / self.kv_heads
    }

    /// The shape of the keys.
    pub(crate) fn key_shape(&self) -> KeyShape {
        let Self { batch, kv_heads, head_dim, key_dtype, score, .. } = *self;
        KeyShape { sequences: batch, kv_heads, head_dim, dtype: key_dtype, score }
    }

    /// The shape of a key prior; refuses one that is not `[B|1, Hq|Hk, M]`.
    pub(crate) fn prior_dims(&self, prior: &Tensor) -> Result<[usize; 3]> {
        let Self { batch, q_heads, kv_heads, keys, .. } = *self;
        match *prior.dims() {
            [b, h, m] if (b == 1 || b == batch) && (h == q_heads || h == kv_heads) && m == keys => {
                Ok([b, h, m])
            }
            _ => Err(Error::Invalid(format!(
                "prior {:?} is not [{batch} or 1, {q_heads} or {kv_heads}, {keys}] (batch, heads, keys)",
                prior.dims(),
            ))),
        }
    }

    /// The shape of protected keys; refuses others than i32 `[B|1, Hq|Hk|1, N|1, P]`.
    pub(crate) fn protected_dims(&self, protected: &Tensor) -> Result<[usize; 4]> {
        let Self { batch, q_heads, kv_heads, queries, .. } = *self;
        let fits = |x: usize, sizes: &[usize]| x == 1 || sizes.contains(&x);
        if protected.dtype() != DType::I32 {
            return Err(Error::Invalid(format!(
                "protected holds {:?}, not i32 key indices",
                protected.dtype()
            )));
        }
        match *protected.dims() {
            [b, h, n, p]
                if fits(b, &[batch]) && fits(h, &[q_heads, kv_heads]) && fits(n, &[queries]) && p > 0 =>
            {
                Ok([b, h, n, p])
            }
            _ => Err(Error::Invalid(format!(
                "protected {:?} is not [{batch} or 1, {q_heads}, {kv_heads} or 1, {queries} or 1, slots]",
                protected.dims()
            ))),
        }
    }
}
