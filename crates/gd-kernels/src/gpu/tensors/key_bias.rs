//! What decoding adds to the scores of keys, kept beside a cache that does not change.

use candle_core::{DType, Tensor};

use super::{Rows, TensorGpu, Vector};
use crate::error::{Error, Result};
use crate::gpu::{on_gpu, scan as gpu};
use crate::mask::Mask;
use crate::options::{Precision, Score, TieBreak};
use crate::plan::Problem;
use crate::scan::dims4;

/// The norms of keys `[B, Hk, M, D]` as decoding needs them, 4 bytes a key. A decoding step that is given
/// them reads the keys once instead of twice.
#[derive(Debug, Clone)]
pub struct KeyBias {
    /// f32 `[B, Hk, M rounded up]`.
    bias: Tensor,
    shape: [usize; 4],
    score: Score,
}

impl KeyBias {
    /// Those of k, on a GPU, for scans with this score.
    ///
    /// # Errors
    /// A tensor of another rank, dtype or device.
    pub fn new(k: &Tensor, score: Score) -> Result<Self> {
        on_gpu!(k.device(), G => Self::of_keys::<G>(k, score));
        Err(Error::Unsupported(format!(
            "key biases of keys on {:?}; on a GPU they are",
            k.device().location()
        )))
    }

    fn of_keys<G: TensorGpu>(k: &Tensor, score: Score) -> Result<Self> {
        let (batch, heads, keys, head_dim) = dims4("k", k)?;
        let device = G::of(k.device())?;
        let problem = Problem {
            batch,
            q_heads: heads,
            kv_heads: heads,
            queries: 1,
            keys,
            head_dim,
            candidates: 1,
            dtype: k.dtype(),
            score,
            tie: TieBreak::default(),
            precision: Precision::default(),
        };
        let (rows, mask) = (Rows::<G::Buffer>::new(k)?, Mask::none());
        // Without a prior the biases do not depend on beta.
        let beta = Vector::new(&Tensor::ones(heads, DType::F32, k.device())?, DType::F32)?;
        let (q, beta) = (rows.tensor4(), beta.slice());
        let x = gpu::Inputs { q, k: q, beta, prior: None, protected: None, mask: &mask };
        let bias = gpu::key_bias(&device, &problem, &x)?;
        let bias = device.tensor(bias, DType::F32, (batch, heads, gpu::bias_row(keys)))?;
        Ok(Self { bias, shape: [batch, heads, keys, head_dim], score })
    }

    /// The biases for a problem, if they are those of its keys.
    pub(super) fn of<B: From<Tensor>>(&self, problem: &Problem) -> Result<Vector<B>> {
        let Problem { batch, kv_heads, keys, head_dim, score, .. } = *problem;
        if (self.shape, self.score) != ([batch, kv_heads, keys, head_dim], score) {
            return Err(Error::Invalid(format!(
                "key biases of {:?} {:?} for keys {:?} {score:?}",
                self.shape,
                self.score,
                [batch, kv_heads, keys, head_dim]
            )));
        }
        Vector::new(&self.bias, DType::F32)
    }
}
