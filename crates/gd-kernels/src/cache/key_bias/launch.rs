//! The launch that computes the biases of keys on a GPU; scans and decoding add them to the products of queries and
//! keys.

use bytemuck::bytes_of;
use candle_core::{DType, Tensor};

use crate::backend::gpu::kernel::{KernelOp, Variant};
use crate::backend::gpu::params::{self, BiasParams, ScoreCode};
use crate::backend::gpu::tensors::{Rows, TensorGpu, Vector};
use crate::backend::gpu::{Constants, Gpu, Launch, Prior, Slice, Tensor4, grid};
use crate::cache::key_bias::{KEY_PADDING, bias_row};
use crate::cache::key_shape::KeyShape;
use crate::error::Result;
use crate::options::Score;

const _: () = assert!(KEY_PADDING == params::KEY_PADDING as usize, "the padding that the kernels expect");

/// Warps of a block; each computes the bias of one key.
const WARPS: usize = 8;

/// What the biases are computed from.
#[derive(Debug)]
pub struct BiasInputs<'a, B> {
    /// `[sequences, Hk, keys, D]`.
    pub k: Tensor4<'a, B>,
    /// Hq; used with a prior.
    pub q_heads: usize,
    /// f32 `[Hq]`; used with a prior.
    pub beta: Slice<'a, B>,
    /// A key prior, which is added as a score.
    pub prior: Option<Prior<'a, B>>,
}

/// The biases of all keys, f32 `[sequences, Hk, bias_row]`, or `[sequences, Hq, bias_row]` with a prior.
///
/// # Errors
/// A tensor of 2^31 elements or more, a dtype without kernels, and errors of the launch.
pub fn key_bias<G: Gpu>(
    gpu: &G,
    shape: &KeyShape,
    keys: usize,
    x: &BiasInputs<'_, G::Buffer>,
) -> Result<G::Buffer> {
    let KeyShape { sequences, kv_heads, head_dim, dtype, score } = *shape;
    let [k_batch, k_head, k_row] = x.k.checked("k", [sequences, kv_heads, keys, head_dim])?;
    let heads = if x.prior.is_some() { x.q_heads } else { kv_heads };
    let row = bias_row(keys);
    let bias = gpu.allocate(sequences * heads * row * 4)?;
    let [prior_batch, prior_heads] = Prior::sizes(x.prior.as_ref());
    let params = BiasParams {
        batch: sequences as u32,
        q_heads: x.q_heads as u32,
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
        score: ScoreCode::from(score) as u32,
    };
    let blocks = (sequences * heads) as u128 * row as u128 / WARPS as u128;
    gpu.launch(&Launch {
        kernel: Variant::new("scan", dtype, &gpu.arch())?.kernel(KernelOp::KeyBias),
        grid: grid("scan", blocks)?,
        block: 32 * WARPS as u32,
        shared_bytes: 0,
        params: bytes_of(&params).to_vec(),
        constants: Constants::default(),
        buffers: vec![Some(x.k.data), Some(x.beta), x.prior.as_ref().map(|p| p.data), Some((&bias).into())],
    })?;
    Ok(bias)
}

/// The biases of a tensor k `[B, Hk, M, D]` without a prior: f32 `[B, Hk, bias_row(M)]`.
pub(crate) fn of_tensor<G: TensorGpu>(k: &Tensor, score: Score) -> Result<Tensor> {
    let (shape, keys) = (KeyShape::of(k, score)?, k.dim(2)?);
    let gpu = G::of(k.device())?;
    let rows = Rows::<G::Buffer>::new(k)?;
    // The kernel takes beta, but does not use it without a prior.
    let beta = Vector::new(&Tensor::ones(shape.kv_heads, DType::F32, k.device())?, DType::F32)?;
    let x = BiasInputs { k: rows.tensor4(), q_heads: shape.kv_heads, beta: beta.slice(), prior: None };
    let bias = key_bias(&gpu, &shape, keys, &x)?;
    gpu.tensor(bias, DType::F32, (shape.sequences, shape.kv_heads, bias_row(keys)))
}
