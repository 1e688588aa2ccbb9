//! Operators that are fused on a GPU here, and on the CPU in the crates above: one launch forward and one or two
//! backward, in f32, f16 or bf16, rounded once. Tensors of any strides.

use candle_core::Tensor;

use crate::error::{Error, Result};
use crate::gpu::on_gpu;

/// `x / sqrt(mean(x^2) + eps) * weight` over the last dimension, for x `[.., C]` and weight `[C]` of one dtype.
/// Differentiable in both; the gradient of the weight is a sum in a fixed order.
///
/// # Errors
/// Tensors on the CPU, or of a dtype without kernels.
#[allow(unused_variables)] // without a GPU in this build
pub fn rms_norm(x: &Tensor, weight: &Tensor, eps: f64) -> Result<Tensor> {
    on_gpu!(x.device(), G => crate::gpu::tensors::rows::rms_norm::<G>(x, weight, eps));
    refused("rms_norm", x)
}

/// Rotates row `n` of every head of x `[B, H, N, D]` by the angles of position `offset + n`, of which cos and sin f32
/// `[positions, D / 2]` hold the cosines and sines; one offset, or one for every batch entry. Element i of the first
/// half of a row and element i of the second are a pair. Differentiable in x.
///
/// # Errors
/// Tensors on the CPU, shapes that do not fit, positions beyond the angles, or a dtype without kernels.
#[allow(unused_variables)] // without a GPU in this build
pub fn rotary(x: &Tensor, cos: &Tensor, sin: &Tensor, offsets: &[usize]) -> Result<Tensor> {
    on_gpu!(x.device(), G => crate::gpu::tensors::rows::rotate::<G>(x, [cos, sin], offsets));
    refused("rotary", x)
}

/// `silu(gate) * up`, both of one shape and dtype. Differentiable in both.
///
/// # Errors
/// Tensors on the CPU, or of a dtype without kernels.
#[allow(unused_variables)] // without a GPU in this build
pub fn swiglu(gate: &Tensor, up: &Tensor) -> Result<Tensor> {
    on_gpu!(gate.device(), G => crate::gpu::tensors::rows::gated::<G>(gate, up));
    refused("swiglu", gate)
}

/// `logsumexp(logits) - logits[target]` of every row, in nats: f32 `[rows]`, for logits `[rows, V]` and targets u32
/// `[rows]`. Differentiable in the logits. The target `u32::MAX` is of a row that does not count: its loss and its
/// gradient are 0. Another target that is no column has probability 0 and the loss +inf.
///
/// # Errors
/// Tensors on the CPU, shapes that do not fit, or a dtype without kernels.
#[allow(unused_variables)] // without a GPU in this build
pub fn cross_entropy(logits: &Tensor, targets: &Tensor) -> Result<Tensor> {
    on_gpu!(logits.device(), G => crate::gpu::tensors::cross_entropy::losses::<G>(logits, targets));
    refused("cross_entropy", logits)
}

/// The same losses, and with them the gradient for the logits of their sum weighted by `weights`, f32 `[rows]`; both
/// without a graph.
///
/// # Errors
/// As [`cross_entropy`].
#[allow(unused_variables)] // without a GPU in this build
pub fn cross_entropy_and_gradient(
    logits: &Tensor,
    targets: &Tensor,
    weights: &Tensor,
) -> Result<(Tensor, Tensor)> {
    on_gpu!(logits.device(), G => {
        crate::gpu::tensors::cross_entropy::losses_and_gradient::<G>(logits, targets, weights)
    });
    refused("cross_entropy", logits)
}

pub(crate) fn refused<T>(op: &str, t: &Tensor) -> Result<T> {
    let device = t.device().location();
    Err(Error::Unsupported(format!("{op} on {device:?}: no GPU of this build")))
}
