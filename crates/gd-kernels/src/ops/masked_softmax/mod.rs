//! Softmax over the visible keys of each query.

mod additive;
mod cpu;

use candle_core::Tensor;

use self::additive::additive;
use crate::backend::dispatch::on_cpu;
use crate::backend::span::{Pass, operator_span};
use crate::error::Result;
use crate::mask::Mask;

/// The softmax of `scores` over the visible keys of each query.
///
/// * `scores`: `[B, H, N, M]` in f64, f32, f16 or bf16, of any strides.
/// * `mask`: which of the M keys each of the N queries sees.
///
/// Returns the weights `exp(score) / sum(exp(score))` over the visible keys, `[B, H, N, M]` in the dtype of `scores`: 0
/// for keys that a query does not see, and 0 for all keys of a query that sees none. `scores` gets a gradient. On the
/// CPU, forward and backward pass are one pass each over the visible interval of every row; on a GPU, a composition of
/// candle's operations with an additive mask.
///
/// # Errors
/// Scores that are not of rank 4, a mask that does not fit them, or another dtype.
///
/// # Examples
/// ```
/// use candle_core::{DType, Device, Tensor};
/// use gd_kernels::{Mask, masked_softmax};
///
/// let scores = Tensor::zeros((1, 1, 2, 2), DType::F32, &Device::Cpu)?;
/// let weights = masked_softmax(&scores, &Mask::causal(0))?;
/// assert_eq!(weights.flatten_all()?.to_vec1::<f32>()?, [1.0, 0.0, 0.5, 0.5]);
/// # Ok::<(), gd_kernels::Error>(())
/// ```
pub fn masked_softmax(scores: &Tensor, mask: &Mask) -> Result<Tensor> {
    let _span = operator_span("masked_softmax", Pass::Forward);
    let (b, _, _, m) = scores.dims4()?;
    mask.validate(b, m)?;
    if on_cpu(scores.device()) {
        return cpu::masked_softmax(scores, mask);
    }
    Ok(composed(scores, mask)?)
}

/// [`masked_softmax`] composed of candle operations that have gradients.
fn composed(scores: &Tensor, mask: &Mask) -> candle_core::Result<Tensor> {
    let (b, _, n, m) = scores.dims4()?;
    let (bias, sees_a_key) = additive(mask, [b, n, m], scores)?;
    let scores = scores.broadcast_add(&bias)?;
    let exp = scores.broadcast_sub(&scores.max_keepdim(3)?)?.exp()?;
    let weights = exp.broadcast_div(&exp.sum_keepdim(3)?)?;
    // The softmax of a row without visible keys is uniform, but its weights must be 0.
    match sees_a_key {
        Some(factor) => weights.broadcast_mul(&factor),
        None => Ok(weights),
    }
}
