//! The gated activation SwiGLU.

#[cfg(feature = "gpu")]
pub(crate) mod gpu;

use candle_core::Tensor;

use crate::backend::dispatch::{on_gpu, refused};
use crate::error::Result;

/// `silu(gate) * up`, both of one shape and dtype. Differentiable in both.
///
/// # Errors
/// Tensors on the CPU, or of a dtype without kernels.
#[allow(unused_variables)] // without a GPU in this build
pub fn swiglu(gate: &Tensor, up: &Tensor) -> Result<Tensor> {
    on_gpu!(gate.device(), G => gpu::tensors::gated::<G>(gate, up));
    refused("swiglu", gate)
}
