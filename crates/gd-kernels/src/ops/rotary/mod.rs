//! Rotary position embedding.

#[cfg(feature = "gpu")]
pub(crate) mod gpu;

use candle_core::Tensor;

use crate::backend::dispatch::{on_gpu, refused};
use crate::error::Result;

/// Rotates row `n` of every head of x `[B, H, N, D]` by the angles of position `offset + n`, of which cos and sin f32
/// `[positions, D / 2]` hold the cosines and sines; one offset, or one for every batch entry. Element i of the first
/// half of a row and element i of the second are a pair. Differentiable in x.
///
/// # Errors
/// Tensors on the CPU, shapes that do not fit, positions beyond the angles, or a dtype without kernels.
#[allow(unused_variables)] // without a GPU in this build
pub fn rotary(x: &Tensor, cos: &Tensor, sin: &Tensor, offsets: &[usize]) -> Result<Tensor> {
    on_gpu!(x.device(), G => gpu::tensors::rotate::<G>(x, [cos, sin], offsets));
    refused("rotary", x)
}
