//! The sum of gated averages: what the heads of a Beacon contribute to the output of a layer.

mod cpu;

use candle_core::Tensor;

use crate::backend::dispatch::on_cpu;
use crate::backend::span::{Pass, operator_span};
use crate::error::{Error, Result};

/// `y_h + sum over r of sigmoid(gate_(h, r)) * averages_(h, r)` for every row, where head h has the averages
/// `h R .. (h + 1) R`.
///
/// * `averages`: `[B, H R, N, D]`; `gate`: logits `[B, H R, N]`, of one dtype (f64, f32, f16 or bf16).
/// * `y`: `[B, Hy, N, D]` with Hy <= H: the output of the first Hy heads, to which the sum is added. The other heads
///   have none.
/// * `heads`: H.
///
/// Returns `[B, H, N, D]` in the same dtype. All tensors get gradients.
///
/// # Errors
/// [`Error::Invalid`] if shapes or dtypes do not fit; [`Error::Unsupported`] for another dtype.
///
/// # Examples
/// ```
/// use candle_core::{Device, Tensor};
/// use gd_kernels::gated_sum;
///
/// // One head with two averages of one row; sigmoid(0) is one half.
/// let averages = Tensor::new(&[[[[2f32]], [[4.0]]]], &Device::Cpu)?;
/// let gate = averages.zeros_like()?.squeeze(3)?;
/// let y = Tensor::new(&[[[[10f32]]]], &Device::Cpu)?;
/// let sum = gated_sum(&averages, &gate, &y, 1)?;
/// assert_eq!(sum.flatten_all()?.to_vec1::<f32>()?, [13.0]);
/// # Ok::<(), gd_kernels::Error>(())
/// ```
pub fn gated_sum(averages: &Tensor, gate: &Tensor, y: &Tensor, heads: usize) -> Result<Tensor> {
    let _span = operator_span("gated_sum", Pass::Forward);
    let fits = match (averages.dims(), gate.dims(), y.dims()) {
        ([b, hr, n, d], [gb, gh, gn], [yb, yh, yn, yd]) => {
            [gb, yb] == [b, b]
                && gh == hr
                && [gn, yn] == [n, n]
                && yd == d
                && *yh <= heads
                && heads > 0
                && hr.is_multiple_of(heads)
                && *hr > 0
        }
        _ => false,
    };
    if !fits || averages.dtype() != gate.dtype() || averages.dtype() != y.dtype() {
        return Err(Error::Invalid(format!(
            "gated_sum: averages {:?} {:?}, gate {:?} {:?} and y {:?} {:?} for {heads} heads; [B, H R, N, D], [B, H R, N] \
             and [B, up to H, N, D] of one dtype expected",
            averages.dims(),
            averages.dtype(),
            gate.dims(),
            gate.dtype(),
            y.dims(),
            y.dtype()
        )));
    }
    if on_cpu(averages.device()) {
        return cpu::gated_sum([averages, gate, y], heads);
    }
    let (b, hr, n, d) = averages.dims4()?;
    let gated = averages.broadcast_mul(&(gate.neg()?.exp()? + 1.0)?.recip()?.unsqueeze(3)?)?;
    let sum = gated.reshape((b, heads, hr / heads, n, d))?.sum(2)?;
    let with_y = y.dim(1)?;
    let first = (y + sum.narrow(1, 0, with_y)?)?;
    Ok(match heads - with_y {
        0 => first,
        others => Tensor::cat(&[&first, &sum.narrow(1, with_y, others)?], 1)?,
    })
}
