//! The CPU implementation of the losses: a forward pass that stores the logsumexp of every row, and a backward pass
//! that writes the gradient of the logits directly. Sums run in f32 (f64 for f64).

use candle_core::{DType, Shape, Tensor, WithDType};

use super::{IGNORE, count};
use crate::backend::cpu::element::{Element, Real, by_float, maximum, sum1};
use crate::backend::cpu::parallel::{for_chunks, for_chunks2, rows_per_chunk, vectorize};
use crate::backend::cpu::view::Rows;
use crate::backend::graph::{attach1, with_contiguous_rows};
use crate::error::Result;

/// One number for each row, in the accumulator type.
pub(super) type PerRow<T> = Vec<<T as Element>::Acc>;

/// The mean loss of validated tensors.
pub(super) fn cross_entropy(logits: &Tensor, targets: Vec<u32>) -> Result<Tensor> {
    let logits = with_contiguous_rows(logits)?;
    let rows = count(&targets).max(1);
    by_float!("cross_entropy", logits.dtype(), T => {
        let (losses, log_sums) = forward::<T>(&logits, &targets)?;
        // Added in f64 and in order: the loss has the same bits for any number of threads.
        let mean = losses.iter().map(|l| l.wide()).sum::<f64>() / rows as f64;
        let result = (vec![<T as Element>::Acc::of(mean)], Shape::from(()));
        Ok(attach1("cross_entropy", &logits, result, move |logits, _, grad| {
            let grad = grad.to_dtype(DType::F64)?.to_scalar::<f64>()?;
            let scale = <T as Element>::Acc::of(grad / rows as f64);
            backward::<T>(logits, &targets, &log_sums, |_| scale)
        })?)
    })
}

/// The loss of every row of validated tensors `[rows]`.
pub(super) fn row_losses(logits: &Tensor, targets: Vec<u32>) -> Result<Tensor> {
    let logits = with_contiguous_rows(logits)?;
    by_float!("cross_entropy", logits.dtype(), T => {
        let (losses, log_sums) = forward::<T>(&logits, &targets)?;
        let result = (losses, Shape::from(targets.len()));
        Ok(attach1("cross_entropy", &logits, result, move |logits, _, dlosses| {
            let dlosses = dlosses.to_vec1::<<T as Element>::Acc>()?;
            backward::<T>(logits, &targets, &log_sums, |row| dlosses[row])
        })?)
    })
}

/// The losses of [`row_losses`] without a graph, and the gradient of the logits for the sum of the losses weighted by
/// `weights` `[rows]`.
pub(super) fn row_losses_and_gradient(
    logits: &Tensor,
    targets: &[u32],
    weights: &Tensor,
) -> Result<(Tensor, Tensor)> {
    let logits = with_contiguous_rows(&logits.detach())?;
    by_float!("cross_entropy", logits.dtype(), T => {
        let weights = weights.to_dtype(<T as Element>::Acc::DTYPE)?.to_vec1::<<T as Element>::Acc>()?;
        let (losses, log_sums) = forward::<T>(&logits, targets)?;
        let gradient = backward::<T>(&logits, targets, &log_sums, |row| weights[row])?;
        Ok((Tensor::from_vec(losses, targets.len(), logits.device())?, gradient))
    })
}

/// The loss of every row of validated tensors.
pub(super) fn token_losses(logits: &Tensor, targets: &[u32]) -> Result<Vec<f32>> {
    let logits = with_contiguous_rows(logits)?;
    by_float!("token_losses", logits.dtype(), T => {
        Ok(forward::<T>(&logits, targets)?.0.iter().map(|l| l.wide() as f32).collect())
    })
}

/// The loss and the logsumexp of every row.
pub(super) fn forward<T: Element>(
    logits: &Tensor,
    targets: &[u32],
) -> candle_core::Result<(PerRow<T>, PerRow<T>)> {
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

/// The gradient of the logits, `(softmax - one-hot) * scale`, with a scale for every row.
pub(super) fn backward<T: Element>(
    logits: &Tensor,
    targets: &[u32],
    log_sums: &[T::Acc],
    scale: impl Fn(usize) -> T::Acc + Sync,
) -> candle_core::Result<Tensor> {
    let (storage, layout) = logits.storage_and_layout();
    let input = Rows::<T>::new(&storage, layout)?;
    gradient_rows::<T>(
        logits,
        targets,
        #[inline(always)]
        |i, target, grad| {
            let (row, log_sum, scale) = (input.row(i), log_sums[i], scale(i));
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
pub(super) fn log_sum<T: Element>(row: &[T]) -> T::Acc {
    let top = maximum(row);
    top + T::Acc::of(sum1(row, |x: T| (x.up() - top).exp_fast()).wide().ln())
}

/// A gradient in the shape of `logits` `[rows, V]`: `fill` gets the number, the target and the gradient of every
/// row that counts; the others are 0. It is compiled for the widest vectors only where it is inlined.
pub(super) fn gradient_rows<T: Element>(
    logits: &Tensor,
    targets: &[u32],
    fill: impl Fn(usize, usize, &mut [T]) + Sync,
) -> candle_core::Result<Tensor> {
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
