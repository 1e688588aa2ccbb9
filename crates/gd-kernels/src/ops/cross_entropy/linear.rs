//! Cross entropy of hidden states and an output projection.

use candle_core::{DType, Tensor};

#[cfg(feature = "gpu")]
use super::chunked::DeviceLoss;
use super::chunked::{CpuLoss, chunk_rows, chunked, chunks_of};
#[cfg(feature = "gpu")]
use super::gpu;
use super::{cpu, token_losses};
use crate::backend::cpu::element::{Element, Real, by_float};
use crate::backend::cpu::product::product;
use crate::backend::dispatch::on_gpu;
use crate::backend::span::{Pass, operator_span};
use crate::backend::support::require_device;
use crate::error::{Error, Result};

/// Maximum number of logits of a chunk on a GPU: 512 MiB in bf16, and as much of their gradient.
#[cfg(feature = "gpu")]
const GPU_CHUNK_LOGITS: usize = 1 << 28;

/// [`cross_entropy`](super::cross_entropy) of the logits `hidden weightᵀ`, of which only a chunk of rows is in memory
/// at a time.
///
/// * `hidden`: `[rows, C]`; `weight`: `[V, C]`, of one dtype.
/// * `targets`: u32 `[rows]`, each below V or [`IGNORE`](super::IGNORE).
///
/// Returns the mean over counted rows in nats, a scalar in f32 (f64 for f64). `hidden` and `weight` get gradients.
///
/// # Errors
/// As [`cross_entropy`](super::cross_entropy).
///
/// # Examples
/// ```
/// use candle_core::{DType, Device, Tensor};
/// use gd_kernels::cross_entropy::linear_cross_entropy;
///
/// let hidden = Tensor::ones((3, 2), DType::F32, &Device::Cpu)?;
/// let weight = Tensor::zeros((8, 2), DType::F32, &Device::Cpu)?;
/// let targets = Tensor::new(&[0u32, 5, 7], &Device::Cpu)?;
/// let loss = linear_cross_entropy(&hidden, &weight, &targets)?.to_scalar::<f32>()?;
/// assert!((loss - 8f32.ln()).abs() < 1e-6);
/// # Ok::<(), gd_kernels::Error>(())
/// ```
pub fn linear_cross_entropy(hidden: &Tensor, weight: &Tensor, targets: &Tensor) -> Result<Tensor> {
    let _span = operator_span("linear_cross_entropy", Pass::Forward);
    const NAME: &str = "linear_cross_entropy";
    validate(NAME, hidden, weight, targets)?;
    on_gpu!(hidden.device(), G => {
        let loss = DeviceLoss::new(targets, weight, GPU_CHUNK_LOGITS, |_, logits, targets, weights| {
            match weights {
                None => Ok((gpu::tensors::losses::<G>(logits, targets)?, None)),
                Some(weights) => {
                    let (losses, gradient) =
                        gpu::tensors::losses_and_gradient::<G>(logits, targets, weights)?;
                    Ok((losses, Some(gradient)))
                }
            }
        })?;
        chunked(NAME, hidden, weight, loss)
    });
    require_device(NAME, hidden.device())?;
    by_float!(NAME, hidden.dtype(), T => {
        let loss = CpuLoss::<T, _>::new(targets, weight, |_, logits, targets, scale| {
            let (losses, log_sums) = cpu::forward::<T>(logits, targets)?;
            let gradient = scale.map(|scale| {
                let scale = <T as Element>::Acc::of(scale);
                cpu::backward::<T>(logits, targets, &log_sums, |_| scale)
            });
            Ok((losses, gradient.transpose()?))
        })?;
        chunked(NAME, hidden, weight, loss)
    })
}

/// [`token_losses`] of the logits `hidden weightᵀ`, of which only a chunk of rows is in memory at a time.
///
/// * `hidden`: `[rows, C]`; `weight`: `[V, C]`, of one dtype.
/// * `targets`: u32 `[rows]`, each below V or [`IGNORE`](super::IGNORE).
///
/// Returns the loss of every row in nats, 0 for ignored rows, without gradient.
///
/// # Errors
/// As [`token_losses`].
pub fn linear_token_losses(hidden: &Tensor, weight: &Tensor, targets: &Tensor) -> Result<Vec<f32>> {
    validate("linear_token_losses", hidden, weight, targets)?;
    let (hidden, projection) = (hidden.detach(), weight.detach().t()?);
    let (rows, width) = hidden.dims2()?;
    let mut losses = Vec::with_capacity(rows);
    for chunk in chunks_of(rows, chunk_rows(weight.dim(0)?, width)) {
        let logits = product(&hidden.narrow(0, chunk.start, chunk.len())?, &projection)?;
        losses.extend(token_losses(&logits, &targets.narrow(0, chunk.start, chunk.len())?)?);
    }
    Ok(losses)
}

/// Checks the arguments of the loss `name`.
pub(super) fn validate(name: &str, hidden: &Tensor, weight: &Tensor, targets: &Tensor) -> Result<()> {
    let fits = matches!(
        (hidden.dims(), weight.dims(), targets.dims()),
        ([r, c], [v, w], [t]) if r == t && c == w && *r > 0 && *c > 0 && *v > 0
    );
    if fits && targets.dtype() == DType::U32 && hidden.dtype() == weight.dtype() {
        return Ok(());
    }
    Err(Error::Invalid(format!(
        "{name}: hidden {:?} {:?}, weight {:?} {:?} and targets {:?} {:?}; [rows, C], [V, C] of \
         the same dtype and u32 [rows] expected, none empty",
        hidden.dims(),
        hidden.dtype(),
        weight.dims(),
        weight.dtype(),
        targets.dims(),
        targets.dtype()
    )))
}
