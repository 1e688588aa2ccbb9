//! Cross entropy of logits and target classes.

#[cfg(feature = "gpu")]
pub(crate) mod gpu;

use candle_core::Tensor;

use crate::backend::dispatch::{on_gpu, refused};
use crate::error::Result;

/// `logsumexp(logits) - logits[target]` of every row, in nats: f32 `[rows]`, for logits `[rows, V]` and targets u32
/// `[rows]`. Differentiable in the logits. The target `u32::MAX` is of a row that does not count: its loss and its
/// gradient are 0. Another target that is no column has probability 0 and the loss +inf.
///
/// # Errors
/// Tensors on the CPU, shapes that do not fit, or a dtype without kernels.
#[allow(unused_variables)] // without a GPU in this build
pub fn cross_entropy(logits: &Tensor, targets: &Tensor) -> Result<Tensor> {
    on_gpu!(logits.device(), G => gpu::tensors::losses::<G>(logits, targets));
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
        gpu::tensors::losses_and_gradient::<G>(logits, targets, weights)
    });
    refused("cross_entropy", logits)
}
