//! The biases of keys on a GPU, which scans and decoding add to the products of queries and keys.

use bytemuck::bytes_of;

use crate::backend::gpu::kernel::{KernelOp, Variant};
use crate::backend::gpu::params::{BiasParams, KEY_PADDING, ScoreCode};
use crate::backend::gpu::{Constants, Gpu, Launch, Prior, grid};
use crate::cache::key_bias::{BIAS_TILE, bias_row};
use crate::error::Result;
use crate::ops::scan::gpu::launch::Inputs;
use crate::ops::scan::problem::Problem;

const _: () = assert!(BIAS_TILE == KEY_PADDING as usize, "the padding that kernels expect");

/// Warps of the kernel that computes biases; each takes one key.
const BIAS_WARPS: usize = 8;

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
        score: ScoreCode::from(problem.score) as u32,
    };
    let blocks = (batch * heads) as u128 * row as u128 / BIAS_WARPS as u128;
    gpu.launch(&Launch {
        kernel: Variant::new("scan", dtype, &gpu.arch())?.kernel(KernelOp::KeyBias),
        grid: grid("scan", blocks)?,
        block: 32 * BIAS_WARPS as u32,
        shared_bytes: 0,
        params: bytes_of(&params).to_vec(),
        constants: Constants::default(),
        buffers: vec![Some(x.k.data), Some(x.beta), x.prior.as_ref().map(|p| p.data), Some((&bias).into())],
    })?;
    Ok(bias)
}
