//! Cross entropy of next-token prediction, in nats.
//!
//! logits `[rows, V]` in f64, f32, f16 or bf16, targets u32 `[rows]`; rows with the target [`IGNORE`]
//! do not count. One fused pass that stores one number a row, and a backward pass that writes
//! `(softmax - one-hot) / counted rows` directly. Sums run in f32 (f64 for f64, on the CPU alone).
//!
//! [`linear_cross_entropy`] takes the hidden states `[rows, C]` and the weights `[V, C]` of the output
//! projection instead, and holds the logits of a few rows at a time; [`linear_distillation`] adds the distance
//! from another model's logits.

mod distill;
mod linear;
mod on_device;

pub use self::distill::linear_distillation;
pub(crate) use self::linear::chunk_rows;
pub use self::linear::{linear_cross_entropy, linear_token_losses};
use candle_core::{D, DType, Result, Shape, Tensor, bail};
use gd_kernels::element::{Element, Real, maximum, sum1};
use gd_kernels::fused::{
    Rows, attach1, for_chunks, for_chunks2, rows_per_chunk, vectorize, with_contiguous_rows,
};
use gd_kernels::{by_float, on_cpu};

/// The target of a row that is not to be predicted: no loss, no gradient, not counted in the mean.
pub const IGNORE: u32 = u32::MAX;

/// Targets that are to be predicted.
///
/// # Errors
/// Targets that are not u32 `[rows]`.
pub fn counted(targets: &Tensor) -> Result<usize> {
    Ok(count(&targets.to_vec1()?))
}

fn count(targets: &[u32]) -> usize {
    targets.iter().filter(|&&t| t != IGNORE).count()
}

/// The mean over counted rows of `logsumexp(logits) - logits[target]`: a scalar in f32 (f64 for f64
/// logits). Where every row is ignored it is 0, and so is its gradient.
///
/// # Errors
/// Shapes that do not fit, no rows, or a target outside the vocabulary.
pub fn cross_entropy(logits: &Tensor, targets: &Tensor) -> Result<Tensor> {
    let vocab = validate(logits, targets)?;
    if !on_cpu(logits.device()) {
        let losses = gd_kernels::on_device::cross_entropy(logits, targets)?;
        return losses.sum_all()? / weight(targets, DType::F32)?;
    }
    let logits = with_contiguous_rows(logits)?;
    let targets = checked_targets(targets, vocab)?;
    let rows = count(&targets).max(1);
    by_float!("cross_entropy", logits.dtype(), T => {
        let (losses, log_sums) = forward::<T>(&logits, &targets)?;
        // Added in f64 and in order: the loss has the same bits for any thread count.
        let mean = losses.iter().map(|l| l.wide()).sum::<f64>() / rows as f64;
        let result = (vec![<T as Element>::Acc::of(mean)], Shape::from(()));
        attach1("cross_entropy", &logits, result, move |logits, grad| {
            let grad = grad.to_dtype(DType::F64)?.to_scalar::<f64>()?;
            backward::<T>(logits, &targets, &log_sums, grad / rows as f64)
        })
    })
}

/// The loss of every row, 0 for ignored ones, without gradient.
///
/// # Errors
/// As [`cross_entropy`].
pub fn token_losses(logits: &Tensor, targets: &Tensor) -> Result<Vec<f32>> {
    let vocab = validate(logits, targets)?;
    if !on_cpu(logits.device()) {
        checked_targets(targets, vocab)?;
        return gd_kernels::on_device::cross_entropy(&logits.detach(), targets)?.to_vec1();
    }
    let logits = with_contiguous_rows(&logits.detach())?;
    let targets = checked_targets(targets, vocab)?;
    by_float!("token_losses", logits.dtype(), T => {
        Ok(forward::<T>(&logits, &targets)?.0.iter().map(|l| l.wide() as f32).collect())
    })
}

/// The size of the vocabulary.
fn validate(logits: &Tensor, targets: &Tensor) -> Result<usize> {
    let fits = matches!((logits.dims(), targets.dims()), ([r, v], [t]) if r == t && *r > 0 && *v > 0);
    if !fits || targets.dtype() != DType::U32 {
        bail!(
            "cross_entropy: logits {:?} and targets {:?} {:?}; [rows, V] and u32 [rows] expected, none empty",
            logits.dims(),
            targets.dims(),
            targets.dtype()
        );
    }
    logits.dim(1)
}

fn checked_targets(targets: &Tensor, vocab: usize) -> Result<Vec<u32>> {
    let targets = targets.to_vec1::<u32>()?;
    match targets.iter().position(|&t| t as usize >= vocab && t != IGNORE) {
        None => Ok(targets),
        Some(row) => {
            bail!("cross_entropy: target {} of row {row} is outside the vocabulary of {vocab}", targets[row])
        }
    }
}

/// The number of counted rows, at least 1, as a scalar on the targets' device: nothing waits for it.
fn weight(targets: &Tensor, dtype: DType) -> Result<Tensor> {
    targets.ne(IGNORE)?.to_dtype(dtype)?.sum_all()?.maximum(1.0)
}

/// The loss of every row from candle primitives that have gradients.
#[cfg(test)]
fn row_losses(logits: &Tensor, targets: &Tensor) -> Result<Tensor> {
    let log_p = log_softmax(logits)?;
    let counts = targets.ne(IGNORE)?;
    let targets = counts.where_cond(targets, &targets.zeros_like()?)?;
    let losses = log_p.gather(&targets.unsqueeze(1)?, 1)?.squeeze(1)?.neg()?;
    counts.where_cond(&losses, &losses.zeros_like()?)
}

/// `x - logsumexp(x)` of every row, in f32 (f64 for f64), from primitives that have gradients.
///
/// The greatest of a row is a constant here. `candle_nn` differentiates it, too: that sum over the row should
/// cancel and leaves its rounding, 1 % of a gradient in f32 with 70,000 logits a row.
fn log_softmax(x: &Tensor) -> Result<Tensor> {
    let x = x.to_dtype(if x.dtype() == DType::F64 { DType::F64 } else { DType::F32 })?;
    let x = x.broadcast_sub(&x.max_keepdim(D::Minus1)?.detach())?;
    x.broadcast_sub(&x.exp()?.sum_keepdim(D::Minus1)?.log()?)
}

/// One number a row.
type PerRow<T> = Vec<<T as Element>::Acc>;

/// The loss and the logsumexp of every row.
fn forward<T: Element>(logits: &Tensor, targets: &[u32]) -> Result<(PerRow<T>, PerRow<T>)> {
    let (storage, layout) = logits.storage_and_layout();
    let logits = Rows::<T>::new(&storage, layout)?;
    let mut losses = vec![T::Acc::default(); targets.len()];
    let mut log_sums = losses.clone();
    let rows = rows_per_chunk(logits.len());
    for_chunks2((&mut losses, rows), (&mut log_sums, rows), |chunk, losses, log_sums| {
        vectorize(|| {
            for (j, (loss, sum)) in losses.iter_mut().zip(log_sums).enumerate() {
                let target = targets[chunk * rows + j];
                if target == IGNORE {
                    continue;
                }
                let row = logits.row(chunk * rows + j);
                *sum = log_sum(row);
                *loss = *sum - row[target as usize].up();
            }
        });
    });
    Ok((losses, log_sums))
}

/// `(softmax - one-hot) * scale`.
fn backward<T: Element>(logits: &Tensor, targets: &[u32], log_sums: &[T::Acc], scale: f64) -> Result<Tensor> {
    let (storage, layout) = logits.storage_and_layout();
    let input = Rows::<T>::new(&storage, layout)?;
    let scale = T::Acc::of(scale);
    gradient_rows::<T>(
        logits,
        targets,
        #[inline(always)]
        |i, target, grad| {
            let (row, log_sum) = (input.row(i), log_sums[i]);
            for (g, &x) in grad.iter_mut().zip(row) {
                *g = T::down((x.up() - log_sum).exp_fast() * scale);
            }
            let p = (row[target].up() - log_sum).exp_fast();
            grad[target] = T::down((p - T::Acc::of(1.0)) * scale);
        },
    )
}

/// The logsumexp of a row.
#[inline(always)]
fn log_sum<T: Element>(row: &[T]) -> T::Acc {
    let top = maximum(row);
    top + T::Acc::of(sum1(row, |x: T| (x.up() - top).exp_fast()).wide().ln())
}

/// A gradient in the shape of `logits` `[rows, V]`: `fill` gets the number, the target and the gradient of every
/// row that counts; the others are 0. It is compiled into the widest vectors only where it is inlined.
fn gradient_rows<T: Element>(
    logits: &Tensor,
    targets: &[u32],
    fill: impl Fn(usize, usize, &mut [T]) + Sync,
) -> Result<Tensor> {
    let vocab = logits.dim(1)?;
    let mut grad = vec![T::zero(); targets.len() * vocab];
    let rows = rows_per_chunk(vocab);
    for_chunks(&mut grad, rows * vocab, |chunk, grad| {
        vectorize(|| {
            for (j, grad) in grad.chunks_exact_mut(vocab).enumerate() {
                let i = chunk * rows + j;
                if targets[i] != IGNORE {
                    fill(i, targets[i] as usize, grad);
                }
            }
        });
    });
    Tensor::from_vec(grad, logits.shape(), logits.device())
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::{Device, Var};

    fn composed(logits: &Tensor, targets: &Tensor) -> Result<Tensor> {
        let losses = row_losses(logits, targets)?;
        losses.sum_all()? / weight(targets, losses.dtype())?
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
            let run = |f: fn(&Tensor, &Tensor) -> Result<Tensor>| -> Result<Vec<f64>> {
                let loss = f(x.as_tensor(), &targets)?;
                let grads = loss.backward()?;
                let grad = grads.get(&x).expect("a gradient").flatten_all()?.to_dtype(DType::F64)?;
                let mut all = grad.to_vec1::<f64>()?;
                all.push(loss.to_dtype(DType::F64)?.to_scalar()?);
                Ok(all)
            };
            for (a, b) in run(cross_entropy)?.into_iter().zip(run(composed)?) {
                assert!((a - b).abs() <= bound * (0.1 + b.abs()), "{dtype:?}: {a} against {b}");
            }
        }
        Ok(())
    }
}
