//! Root-mean-square normalisation (Zhang and Sennrich, arXiv 1910.07467):
//! `y = x / sqrt(mean(x^2) + eps) * weight` over the last dimension.

pub(crate) mod cpu;
#[cfg(feature = "gpu")]
pub(crate) mod gpu;

use candle_core::Tensor;

use crate::backend::dispatch::on_gpu;
use crate::backend::span::{Pass, operator_span};
use crate::backend::support::require_device;
use crate::error::{Error, Result};

/// Normalises the last dimension of `x` to root mean square 1 and scales it by `weight`.
///
/// * `x`: `[.., C]`, f64, f32, f16 or bf16 on the CPU; f32, f16 or bf16 on a GPU. Any strides.
/// * `weight`: `[C]`, in the dtype of `x`.
/// * `eps`: added to the mean of the squares, so that a row of zeros stays finite.
///
/// Returns `[.., C]` in the dtype of `x`. Sums run in f32 (f64 for f64), and the result is rounded once. Both
/// tensors get gradients; the gradient of `weight` is summed in a fixed order, so that it has the same bits for any
/// number of threads.
///
/// # Errors
/// [`Error::Invalid`] if `weight` is not `[C]` in the dtype of `x`; [`Error::Unsupported`] for another dtype, or a
/// device without kernels in this build.
///
/// # Examples
/// ```
/// use candle_core::{Device, Tensor};
///
/// let x = Tensor::new(&[[3f32, 4.0], [0.0, 2.0]], &Device::Cpu)?;
/// let weight = Tensor::new(&[1f32, 1.0], &Device::Cpu)?;
/// let y = gd_kernels::rms_norm(&x, &weight, 0.0)?.to_vec2::<f32>()?;
/// // The root mean square of (3, 4) is sqrt(12.5).
/// assert!((y[0][0] - 3.0 / 12.5f32.sqrt()).abs() < 1e-6);
/// # Ok::<(), gd_kernels::Error>(())
/// ```
pub fn rms_norm(x: &Tensor, weight: &Tensor, eps: f64) -> Result<Tensor> {
    let _span = operator_span("rms_norm", Pass::Forward);
    let size = x.dims().last().copied().unwrap_or(0);
    if size == 0 || weight.dims() != [size] || weight.dtype() != x.dtype() {
        return Err(Error::Invalid(format!(
            "rms_norm: weight {:?} {:?} does not fit the last dimension of x {:?} {:?}",
            weight.dims(),
            weight.dtype(),
            x.dims(),
            x.dtype()
        )));
    }
    on_gpu!(x.device(), G => gpu::tensors::rms_norm::<G>(x, weight, eps));
    require_device("rms_norm", x.device())?;
    cpu::rms_norm(x, weight, eps)
}
