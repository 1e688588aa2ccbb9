//! The biases of keys on a GPU, which scans and decoding add to the products of queries and keys.

use bytemuck::bytes_of;
use candle_core::DType;

use crate::backend::gpu::params::BiasParams;
use crate::backend::gpu::{Constants, Gpu, Launch, Prior, dtype_name, grid};
use crate::cache::key_bias::bias_row;
use crate::error::{Error, Result};
use crate::ops::scan::gpu::launch::Inputs;
use crate::ops::scan::problem::Problem;
use crate::options::Score;

/// The head_dims of the compiled kernels; others are padded to the next.
pub const HEAD_DIMS: [usize; 6] = [32, 64, 96, 128, 192, 256];
/// Warps of the kernel that computes biases; each takes one key.
const BIAS_WARPS: usize = 8;

/// The compiled head_dim for `head_dim`.
pub(crate) fn padded_dim(op: &str, head_dim: usize) -> Result<usize> {
    let fits = HEAD_DIMS.into_iter().find(|&d| d >= head_dim).filter(|_| head_dim.is_multiple_of(8));
    fits.filter(|_| head_dim > 0).ok_or_else(|| {
        Error::Unsupported(format!("{op}: head_dim {head_dim} on a GPU; multiples of 8 from 8 to 256 are"))
    })
}

/// The biases of all keys, f32 `[B, Hk|Hq, bias_row]`, for [`scan`] and decoding.
///
/// # Errors
/// As [`scan`].
pub fn key_bias<G: Gpu>(gpu: &G, problem: &Problem, x: &Inputs<'_, G::Buffer>) -> Result<G::Buffer> {
    let Problem { batch, q_heads, kv_heads, keys, head_dim, dtype, .. } = *problem;
    let [k_batch, k_head, k_row] = x.k.checked("k", [batch, kv_heads, keys, head_dim])?;
    let heads = if x.prior.is_some() { q_heads } else { kv_heads };
    let row = bias_row(keys);
    let bias = gpu.allocate(batch * heads * row * 4)?;
    let [prior_batch, prior_heads] = Prior::sizes(x.prior.as_ref());
    let params = BiasParams {
        batch: batch as u32,
        q_heads: q_heads as u32,
        kv_heads: kv_heads as u32,
        keys: keys as u32,
        head_dim: head_dim as u32,
        k_batch,
        k_head,
        k_row,
        bias_heads: heads as u32,
        bias_row: row as u32,
        prior_batch,
        prior_heads,
        score: u32::from(problem.score == Score::Dot),
    };
    let blocks = (batch * heads) as u128 * row as u128 / BIAS_WARPS as u128;
    gpu.launch(&Launch {
        kernel: format!("scan_bias_{}_{}", dtype_name("scan", dtype)?, gpu.arch().suffix()),
        grid: grid("scan", blocks)?,
        block: 32 * BIAS_WARPS as u32,
        shared_bytes: 0,
        params: bytes_of(&params).to_vec(),
        constants: Constants::default(),
        buffers: vec![Some(x.k.data), Some(x.beta), x.prior.as_ref().map(|p| p.data), Some((&bias).into())],
    })?;
    Ok(bias)
}
