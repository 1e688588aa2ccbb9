//! Cross entropy of next-token prediction, in nats.
//!
//! [`cross_entropy`] takes logits. [`linear_cross_entropy`] takes the hidden states and the weights of the output
//! projection instead, and holds the logits of one chunk of rows at a time; [`linear_distillation`] adds the
//! Kullback-Leibler divergence from the distribution of a teacher. Rows with the target [`IGNORE`] do not count.

mod chunked;
mod cpu;
mod distillation;
#[cfg(feature = "gpu")]
pub(crate) mod gpu;
mod linear;

use candle_core::{D, DType, Tensor};

pub use self::chunked::chunk_rows;
pub use self::distillation::linear_distillation;
pub use self::linear::{linear_cross_entropy, linear_token_losses};
use crate::backend::dispatch::on_gpu;
use crate::backend::span::{Pass, operator_span};
use crate::backend::support::require_device;
use crate::error::{Error, Result};

/// The target of a row that is not predicted: no loss, no gradient, not counted in the mean.
pub const IGNORE: u32 = u32::MAX;

/// The number of targets u32 `[rows]` that are not [`IGNORE`]. Copies them to the host.
///
/// # Errors
/// Targets of another dtype or shape.
pub fn count_targets(targets: &Tensor) -> Result<usize> {
    Ok(count(&targets.to_vec1()?))
}

fn count(targets: &[u32]) -> usize {
    targets.iter().filter(|&&t| t != IGNORE).count()
}

/// The mean over counted rows of `logsumexp(logits) - logits[target]`, in nats.
///
/// * `logits`: `[rows, V]`, f64, f32, f16 or bf16 on the CPU; f32, f16 or bf16 on a GPU. Any strides.
/// * `targets`: u32 `[rows]`, each below V or [`IGNORE`].
///
/// Returns a scalar in f32 (f64 for f64 logits). Where every row is ignored it is 0, and so is its gradient. `logits`
/// gets a gradient, `(softmax - one-hot) / counted rows`, written in one pass. On a GPU the host does not wait
/// for the device, so that a target outside the vocabulary is no error there: it has probability 0 and the loss is
/// infinite.
///
/// # Errors
/// [`Error::Invalid`] for shapes that do not fit, no rows, or (on the CPU) a target outside the vocabulary;
/// [`Error::Unsupported`] for another dtype, or a device without kernels in this build.
///
/// # Examples
/// ```
/// use candle_core::{DType, Device, Tensor};
/// use gd_kernels::cross_entropy::{IGNORE, cross_entropy};
///
/// let logits = Tensor::zeros((2, 4), DType::F32, &Device::Cpu)?;
/// let targets = Tensor::new(&[3u32, IGNORE], &Device::Cpu)?;
/// let loss = cross_entropy(&logits, &targets)?.to_scalar::<f32>()?;
/// assert!((loss - 4f32.ln()).abs() < 1e-6);
/// # Ok::<(), gd_kernels::Error>(())
/// ```
pub fn cross_entropy(logits: &Tensor, targets: &Tensor) -> Result<Tensor> {
    let _span = operator_span("cross_entropy", Pass::Forward);
    let vocab = validate(logits, targets)?;
    on_gpu!(logits.device(), G => {
        let losses = gpu::tensors::losses::<G>(logits, targets)?;
        Ok((losses.sum_all()? / counted_rows(targets, DType::F32)?)?)
    });
    require_device("cross_entropy", logits.device())?;
    cpu::cross_entropy(logits, checked_targets(targets, vocab)?)
}

/// The loss of every row of logits `[rows, V]` with targets u32 `[rows]`, in nats, 0 for ignored rows, without
/// gradient. Waits for the device.
///
/// # Errors
/// As [`cross_entropy`]; a target outside the vocabulary is an error on every device.
pub fn token_losses(logits: &Tensor, targets: &Tensor) -> Result<Vec<f32>> {
    let vocab = validate(logits, targets)?;
    let host_targets = checked_targets(targets, vocab)?;
    let logits = logits.detach();
    on_gpu!(logits.device(), G => Ok(gpu::tensors::losses::<G>(&logits, targets)?.to_vec1()?));
    require_device("token_losses", logits.device())?;
    cpu::token_losses(&logits, &host_targets)
}

/// The loss of every row of logits `[rows, V]` with targets u32 `[rows]`: `[rows]` in nats, in f32 (f64 for f64
/// logits), 0 for ignored rows. `logits` gets a gradient.
///
/// # Errors
/// As [`cross_entropy`].
pub fn row_losses(logits: &Tensor, targets: &Tensor) -> Result<Tensor> {
    let vocab = validate(logits, targets)?;
    on_gpu!(logits.device(), G => gpu::tensors::losses::<G>(logits, targets));
    require_device("cross_entropy", logits.device())?;
    cpu::row_losses(logits, checked_targets(targets, vocab)?)
}

/// The losses of [`row_losses`], and the gradient of `logits` `[rows, V]` for their sum weighted by `weights` `[rows]`;
/// both without a graph.
///
/// # Errors
/// As [`cross_entropy`], and weights that are not one for each row.
pub fn row_losses_and_gradient(
    logits: &Tensor,
    targets: &Tensor,
    weights: &Tensor,
) -> Result<(Tensor, Tensor)> {
    let vocab = validate(logits, targets)?;
    if weights.dims() != targets.dims() {
        return Err(Error::Invalid(format!(
            "cross_entropy: weights {:?} of {} rows",
            weights.dims(),
            targets.elem_count()
        )));
    }
    on_gpu!(logits.device(), G => gpu::tensors::losses_and_gradient::<G>(logits, targets, weights));
    require_device("cross_entropy", logits.device())?;
    cpu::row_losses_and_gradient(logits, &checked_targets(targets, vocab)?, weights)
}

/// Checks logits `[rows, V]` and targets u32 `[rows]`; returns V.
fn validate(logits: &Tensor, targets: &Tensor) -> Result<usize> {
    let fits = matches!((logits.dims(), targets.dims()), ([r, v], [t]) if r == t && *r > 0 && *v > 0);
    if !fits || targets.dtype() != DType::U32 {
        return Err(Error::Invalid(format!(
            "cross_entropy: logits {:?} and targets {:?} {:?}; [rows, V] and u32 [rows] expected, none empty",
            logits.dims(),
            targets.dims(),
            targets.dtype()
        )));
    }
    Ok(logits.dim(1)?)
}

/// Copies the targets to the host and checks that they lie in the vocabulary.
fn checked_targets(targets: &Tensor, vocab: usize) -> Result<Vec<u32>> {
    let targets = targets.to_vec1::<u32>()?;
    match targets.iter().position(|&t| t as usize >= vocab && t != IGNORE) {
        None => Ok(targets),
        Some(row) => Err(Error::Invalid(format!(
            "cross_entropy: target {} of row {row} is outside the vocabulary of {vocab}",
            targets[row]
        ))),
    }
}

/// The number of counted rows, at least 1, as a scalar on the device of the targets. The host does not wait for it.
fn counted_rows(targets: &Tensor, dtype: DType) -> candle_core::Result<Tensor> {
    targets.ne(IGNORE)?.to_dtype(dtype)?.sum_all()?.maximum(1.0)
}

/// `x - logsumexp(x)` of every row, in f32 (f64 for f64), from operations that have gradients.
///
/// The maximum of a row is detached. `candle_nn` differentiates through it: its gradient is a sum over the row that is
/// 0 but for rounding, which is 1 % of a gradient in f32 with 70,000 logits a row.
fn log_softmax(x: &Tensor) -> candle_core::Result<Tensor> {
    let x = x.to_dtype(crate::backend::cpu::element::acc_dtype(x.dtype()))?;
    let x = x.broadcast_sub(&x.max_keepdim(D::Minus1)?.detach())?;
    x.broadcast_sub(&x.exp()?.sum_keepdim(D::Minus1)?.log()?)
}

/// The loss of every row from candle's operations that have gradients.
#[cfg(test)]
fn composed_losses(logits: &Tensor, targets: &Tensor) -> candle_core::Result<Tensor> {
    let log_p = log_softmax(logits)?;
    let counts = targets.ne(IGNORE)?;
    let targets = counts.where_cond(targets, &targets.zeros_like()?)?;
    let losses = log_p.gather(&targets.unsqueeze(1)?, 1)?.squeeze(1)?.neg()?;
    counts.where_cond(&losses, &losses.zeros_like()?)
}

#[cfg(test)]
mod tests {
    use candle_core::{Device, Result, Var};

    use super::*;

    fn composed(logits: &Tensor, targets: &Tensor) -> Result<Tensor> {
        let losses = composed_losses(logits, targets)?;
        losses.sum_all()? / counted_rows(targets, losses.dtype())?
    }

    #[test]
    fn composition_agrees_in_values_and_gradients() -> Result<()> {
        let logits: Vec<f64> = (0..7 * 33).map(|i| f64::from(i * 37 % 101) / 20.0 - 2.5).collect();
        let targets = Tensor::new(&[0u32, 32, IGNORE, 7, 7, 1, 20], &Device::Cpu)?;
        for (dtype, bound) in
            [(DType::F64, 1e-13), (DType::F32, 1e-6), (DType::F16, 1e-3), (DType::BF16, 1e-2)]
        {
            let x = Var::from_tensor(
                &Tensor::new(&logits[..], &Device::Cpu)?.reshape((7, 33))?.to_dtype(dtype)?,
            )?;
            let run = |f: &dyn Fn(&Tensor, &Tensor) -> Result<Tensor>| -> Result<Vec<f64>> {
                let loss = f(x.as_tensor(), &targets)?;
                let grads = loss.backward()?;
                let grad = grads.get(&x).expect("a gradient").flatten_all()?.to_dtype(DType::F64)?;
                let mut all = grad.to_vec1::<f64>()?;
                all.push(loss.to_dtype(DType::F64)?.to_scalar()?);
                Ok(all)
            };
            let fused = run(&|logits, targets| Ok(cross_entropy(logits, targets)?))?;
            for (a, b) in fused.into_iter().zip(run(&composed)?) {
                assert!((a - b).abs() <= bound * (0.1 + b.abs()), "{dtype:?}: {a} against {b}");
            }
        }
        Ok(())
    }
}
