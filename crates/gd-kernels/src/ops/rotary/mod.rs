//! Rotary position embedding (Su et al., arXiv 2104.09864), half-split as in Llama: element `i` of the first half of
//! a row and element `i` of the second half are a pair, which is rotated by the angle `position * theta^(-2i / D)`.

pub(crate) mod cpu;
#[cfg(feature = "gpu")]
pub(crate) mod gpu;

use candle_core::Tensor;

use crate::backend::dispatch::on_gpu;
use crate::backend::span::{Pass, operator_span};
use crate::backend::support::require_device;
use crate::error::{Error, Result};

/// Rotates row `n` of every head of `x` by the angles of position `offset + n`: with `x1` and `x2` the halves of a row,
/// `y1 = x1 cos - x2 sin` and `y2 = x2 cos + x1 sin`.
///
/// * `x`: `[B, H, N, D]` with an even D, f64, f32, f16 or bf16 on the CPU; f32, f16 or bf16 on a GPU. Any strides: a
///   transposed `[B, N, H, D]` is read in place.
/// * `cos`, `sin`: `[positions, D / 2]`, the cosines and sines of the angles in radians; f64 for f64 `x`, else f32.
/// * `offsets`: the position of row 0, one for all batch entries or one for each of them.
///
/// Returns `[B, H, N, D]`, contiguous, in the dtype of `x`. `x` gets a gradient, which is the rotation by the negative
/// angles; `cos` and `sin` are constants.
///
/// # Errors
/// [`Error::Invalid`] if the shapes do not fit, positions exceed those of the angles, or the angles have another dtype
/// than named above; [`Error::Unsupported`] for another dtype, or a device without kernels in this build.
///
/// # Examples
/// ```
/// use candle_core::{DType, Device, Tensor};
///
/// // One head of two elements; the angle of position 1 is 90 degrees.
/// let cos = Tensor::new(&[[1f32], [0.0]], &Device::Cpu)?;
/// let sin = Tensor::new(&[[0f32], [1.0]], &Device::Cpu)?;
/// let x = Tensor::new(&[[[[3f32, 4.0], [3.0, 4.0]]]], &Device::Cpu)?;
/// let y = gd_kernels::rotary(&x, &cos, &sin, &[0])?;
/// assert_eq!(y.flatten_all()?.to_vec1::<f32>()?, [3.0, 4.0, -4.0, 3.0]);
/// # Ok::<(), gd_kernels::Error>(())
/// ```
pub fn rotary(x: &Tensor, cos: &Tensor, sin: &Tensor, offsets: &[usize]) -> Result<Tensor> {
    let _span = operator_span("rotary", Pass::Forward);
    validate(x.dims(), cos, sin, offsets)?;
    on_gpu!(x.device(), G => gpu::tensors::rotary::<G>(x, [cos, sin], offsets));
    require_device("rotary", x.device())?;
    cpu::rotary(x, [cos, sin], offsets)
}

/// Checks the angles and offsets for x of shape `x`.
pub(crate) fn validate(x: &[usize], cos: &Tensor, sin: &Tensor, offsets: &[usize]) -> Result<()> {
    let fits = match (x, cos.dims()) {
        ([_, _, _, d], [_, pairs]) => 2 * pairs == *d && *d > 0 && cos.dims() == sin.dims(),
        _ => false,
    };
    if !fits {
        return Err(Error::Invalid(format!(
            "rotary: x {x:?}, cos {:?} and sin {:?}; [B, H, N, D] and [positions, D / 2] expected",
            cos.dims(),
            sin.dims()
        )));
    }
    let (batch, rows, positions) = (x[0], x[2], cos.dims()[0]);
    if offsets.len() != 1 && offsets.len() != batch {
        return Err(Error::Invalid(format!(
            "rotary: {} offsets for a batch of {batch} (1 or {batch} expected)",
            offsets.len()
        )));
    }
    match offsets.iter().find(|offset| offset.saturating_add(rows) > positions) {
        Some(offset) => Err(Error::Invalid(format!(
            "rotary: {rows} positions from offset {offset} exceed the {positions} positions of the angles"
        ))),
        None => Ok(()),
    }
}
