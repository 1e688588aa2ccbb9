//! The gated activation of a feed-forward block (Shazeer, arXiv 2002.05202): `y = silu(gate) * up`.

pub(crate) mod cpu;
#[cfg(feature = "gpu")]
pub(crate) mod gpu;

use candle_core::Tensor;

use crate::backend::dispatch::on_gpu;
use crate::backend::span::{Pass, operator_span};
use crate::backend::support::require_device;
use crate::error::{Error, Result};

/// `silu(gate) * up`, element by element, with `silu(x) = x * sigmoid(x)`.
///
/// * `gate`, `up`: `[.., C]` of one shape and dtype (f64, f32, f16 or bf16 on the CPU; f32, f16 or bf16 on a GPU), of
///   any strides, such as the two halves of one projection.
///
/// Returns `[.., C]` in the same dtype, computed in f32 (f64 for f64) and rounded once. Both tensors get gradients.
///
/// # Errors
/// [`Error::Invalid`] if shapes or dtypes differ, or if the tensors are scalars; [`Error::Unsupported`] for another
/// dtype, or a device without kernels in this build.
///
/// # Examples
/// ```
/// use candle_core::{Device, Tensor};
///
/// let gate = Tensor::new(&[[0f32, 2.0]], &Device::Cpu)?;
/// let up = Tensor::new(&[[5f32, 3.0]], &Device::Cpu)?;
/// let y = gd_kernels::swiglu(&gate, &up)?.to_vec2::<f32>()?;
/// assert_eq!(y[0][0], 0.0);
/// assert!((y[0][1] - 6.0 / (1.0 + (-2f32).exp())).abs() < 1e-5);
/// # Ok::<(), gd_kernels::Error>(())
/// ```
pub fn swiglu(gate: &Tensor, up: &Tensor) -> Result<Tensor> {
    let _span = operator_span("swiglu", Pass::Forward);
    if gate.dims() != up.dims() || gate.dtype() != up.dtype() || gate.rank() == 0 {
        return Err(Error::Invalid(format!(
            "swiglu: gate {:?} {:?} and up {:?} {:?} differ or have no dimension",
            gate.dims(),
            gate.dtype(),
            up.dims(),
            up.dtype()
        )));
    }
    on_gpu!(gate.device(), G => gpu::tensors::swiglu::<G>(gate, up));
    require_device("swiglu", gate.device())?;
    cpu::swiglu(gate, up)
}
