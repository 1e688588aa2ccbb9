//! The biases of keys without a prior, as [`KeyBias`](crate::KeyBias) keeps them.

use candle_core::{DType, Tensor};

use crate::backend::check::dims4;
use crate::backend::gpu::tensors::{Rows, TensorGpu, Vector};
use crate::cache::key_bias::{bias_row, launch as gpu};
use crate::error::Result;
use crate::mask::Mask;
use crate::ops::scan::gpu::launch::Inputs;
use crate::ops::scan::problem::Problem;
use crate::options::{Precision, Score, TieBreak};

/// Those of k `[B, Hk, M, D]`: f32 `[B, Hk, bias_row]`.
pub(crate) fn biases<G: TensorGpu>(k: &Tensor, score: Score) -> Result<Tensor> {
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
    let x = Inputs { q, k: q, beta, prior: None, protected: None, mask: &mask };
    let bias = gpu::key_bias(&device, &problem, &x)?;
    device.tensor(bias, DType::F32, (batch, heads, bias_row(keys)))
}
