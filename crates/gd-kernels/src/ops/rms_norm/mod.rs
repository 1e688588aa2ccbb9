//! Root mean square normalisation.

#[cfg(feature = "gpu")]
pub(crate) mod gpu;

use candle_core::Tensor;

use crate::backend::dispatch::{on_gpu, refused};
use crate::error::Result;

/// `x / sqrt(mean(x^2) + eps) * weight` over the last dimension, for x `[.., C]` and weight `[C]` of one dtype.
/// Differentiable in both; the gradient of the weight is a sum in a fixed order.
///
/// # Errors
/// Tensors on the CPU, or of a dtype without kernels.
#[allow(unused_variables)] // without a GPU in this build
pub fn rms_norm(x: &Tensor, weight: &Tensor, eps: f64) -> Result<Tensor> {
    on_gpu!(x.device(), G => gpu::tensors::rms_norm::<G>(x, weight, eps));
    refused("rms_norm", x)
}
