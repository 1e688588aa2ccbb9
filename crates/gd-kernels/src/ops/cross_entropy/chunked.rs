//! Output projection and loss as one operator, without the logits of all rows in memory, as in Liger Kernel's fused
//! linear cross entropy (Hsu et al., arXiv 2410.10989).
//!
//! The forward pass takes the rows in chunks. For each chunk it computes the logits, the losses, the gradient of the
//! logits, and from that the gradients of hidden states and weights; the backward pass only scales these. Compared with
//! computing the logits again in the backward pass, this saves one of four matrix products, but the gradient of the
//! weights is held from the forward pass on.

use std::marker::PhantomData;
use std::ops::Range;

use candle_core::{DType, Device, Shape, Tensor};

use super::cpu::PerRow;
use super::{checked_targets, count, counted_rows};
use crate::backend::cpu::element::{Element, Real, acc_dtype};
use crate::backend::cpu::product::product;
use crate::backend::graph::{Finished, attach2, with_contiguous_rows};
use crate::error::Result;

/// The mean over rows of a loss of their logits, computed chunk by chunk on one kind of device.
pub(super) trait ChunkedLoss {
    /// The rows of each chunk, in order and without gaps.
    fn chunks(&self) -> Vec<Range<usize>>;

    /// Adds the losses of the rows of a chunk with these logits `[rows, V]`. Returns the gradient of the mean loss for
    /// the logits where `differentiate` is set.
    fn add(&mut self, rows: Range<usize>, logits: &Tensor, differentiate: bool) -> Result<Option<Tensor>>;

    /// The mean of the losses that were added, a scalar without a graph.
    fn mean(self) -> Result<Tensor>;

    /// `gradient` times the gradient `by` of the loss, a scalar.
    fn scaled(gradient: &Tensor, by: &Tensor) -> candle_core::Result<Tensor>;
}

/// The mean of `loss` over the logits `hidden weightᵀ`, differentiable by both.
///
/// * `name`: the name of the operator in candle's graph.
/// * `hidden`: `[rows, C]`; `weight`: `[V, C]`, of one dtype.
pub(super) fn chunked<L: ChunkedLoss>(
    name: &'static str,
    hidden: &Tensor,
    weight: &Tensor,
    mut loss: L,
) -> Result<Tensor> {
    let (hidden, weight) = (with_contiguous_rows(hidden)?, with_contiguous_rows(weight)?);
    let differentiate = hidden.track_op() || weight.track_op();
    let is_trained = weight.track_op();
    let (x, w) = (hidden.detach(), weight.detach());
    let projection = w.t()?;
    let (mut dhidden, mut dweight) = (Vec::new(), None::<Tensor>);
    for rows in loss.chunks() {
        let x = x.narrow(0, rows.start, rows.len())?;
        let Some(dlogits) = loss.add(rows, &product(&x, &projection)?, differentiate)? else { continue };
        dhidden.push(product(&dlogits, &w)?);
        if !is_trained {
            continue;
        }
        let part = product(&dlogits.t()?, &x)?.to_dtype(acc_dtype(w.dtype()))?;
        dweight = Some(match dweight {
            Some(sum) => (sum + part)?,
            None => part,
        });
    }
    let mean = loss.mean()?;
    if dhidden.is_empty() {
        return Ok(mean);
    }
    let dhidden = Tensor::cat(&dhidden, 0)?;
    let dweight = dweight.map(|gradient| gradient.to_dtype(w.dtype())).transpose()?;
    Ok(attach2(name, &hidden, &weight, Finished::copy_of(&mean)?, move |_, _, grad| {
        let dweight = dweight.as_ref().map(|gradient| L::scaled(gradient, grad));
        Ok([Some(L::scaled(&dhidden, grad)?), dweight.transpose()?])
    })?)
}

/// A loss on the CPU, of logits of type `T`.
///
/// `row_losses` gets the rows of a chunk, their logits and targets. It returns the loss of every row, and with a scale
/// the gradient of the sum of the losses times the scale.
pub(super) struct CpuLoss<T, F> {
    targets: Vec<u32>,
    /// Rows of a chunk.
    chunk: usize,
    /// Rows that count, at least 1.
    counted: f64,
    sum: f64,
    row_losses: F,
    element: PhantomData<T>,
}

impl<T: Element, F> CpuLoss<T, F>
where
    F: Fn(Range<usize>, &Tensor, &[u32], Option<f64>) -> Result<(PerRow<T>, Option<Tensor>)>,
{
    /// For targets u32 `[rows]` and weights `[V, C]`.
    ///
    /// # Errors
    /// A target outside the vocabulary.
    pub(super) fn new(targets: &Tensor, weight: &Tensor, row_losses: F) -> Result<Self> {
        let (vocab, width) = weight.dims2()?;
        let targets = checked_targets(targets, vocab)?;
        let counted = count(&targets).max(1) as f64;
        let chunk = chunk_rows(vocab, width);
        Ok(Self { targets, chunk, counted, sum: 0.0, row_losses, element: PhantomData })
    }
}

impl<T: Element, F> ChunkedLoss for CpuLoss<T, F>
where
    F: Fn(Range<usize>, &Tensor, &[u32], Option<f64>) -> Result<(PerRow<T>, Option<Tensor>)>,
{
    fn chunks(&self) -> Vec<Range<usize>> {
        chunks_of(self.targets.len(), self.chunk).collect()
    }

    fn add(&mut self, rows: Range<usize>, logits: &Tensor, differentiate: bool) -> Result<Option<Tensor>> {
        let scale = differentiate.then_some(1.0 / self.counted);
        let (losses, gradient) = (self.row_losses)(rows.clone(), logits, &self.targets[rows], scale)?;
        // Added in f64 and in order: the loss has the same bits for any number of threads.
        self.sum = losses.iter().fold(self.sum, |sum, &loss| sum + loss.wide());
        Ok(gradient)
    }

    fn mean(self) -> Result<Tensor> {
        let mean = vec![<T as Element>::Acc::of(self.sum / self.counted)];
        Ok(Tensor::from_vec(mean, Shape::from(()), &Device::Cpu)?)
    }

    fn scaled(gradient: &Tensor, by: &Tensor) -> candle_core::Result<Tensor> {
        let by = by.to_dtype(DType::F64)?.to_scalar::<f64>()?;
        // The usual case: the loss itself is differentiated.
        if by == 1.0 { Ok(gradient.clone()) } else { gradient * by }
    }
}

/// A loss on a GPU. The number of counted rows and the loss stay in its memory, so that the host does not wait for it.
///
/// `row_losses` gets the rows of a chunk, their logits and targets. It returns the loss of every row, and with weights
/// of the rows the gradient of the weighted sum of the losses.
pub(super) struct DeviceLoss<F> {
    targets: Tensor,
    chunks: Vec<Range<usize>>,
    /// One over the number of counted rows, a scalar.
    row_weight: Tensor,
    losses: Vec<Tensor>,
    row_losses: F,
}

impl<F> DeviceLoss<F>
where
    F: Fn(Range<usize>, &Tensor, &Tensor, Option<&Tensor>) -> Result<(Tensor, Option<Tensor>)>,
{
    /// For targets u32 `[rows]` and weights `[V, C]`, in chunks of at most `max_logits` logits. The chunks are of about
    /// equal size, since a last chunk of few rows would take about as long as a full one.
    pub(super) fn new(targets: &Tensor, weight: &Tensor, max_logits: usize, row_losses: F) -> Result<Self> {
        let (rows, vocab) = (targets.dim(0)?, weight.dim(0)?);
        let chunk_count = rows.div_ceil((max_logits / vocab).max(1));
        let chunks = (0..chunk_count).map(|i| i * rows / chunk_count..(i + 1) * rows / chunk_count).collect();
        let row_weight = counted_rows(targets, acc_dtype(weight.dtype()))?.recip()?;
        Ok(Self { targets: targets.clone(), chunks, row_weight, losses: Vec::new(), row_losses })
    }
}

impl<F> ChunkedLoss for DeviceLoss<F>
where
    F: Fn(Range<usize>, &Tensor, &Tensor, Option<&Tensor>) -> Result<(Tensor, Option<Tensor>)>,
{
    fn chunks(&self) -> Vec<Range<usize>> {
        self.chunks.clone()
    }

    fn add(&mut self, rows: Range<usize>, logits: &Tensor, differentiate: bool) -> Result<Option<Tensor>> {
        let targets = self.targets.narrow(0, rows.start, rows.len())?;
        let weights = match differentiate {
            true => Some(self.row_weight.broadcast_as(rows.len())?.contiguous()?),
            false => None,
        };
        let (losses, gradient) = (self.row_losses)(rows, logits, &targets, weights.as_ref())?;
        self.losses.push(losses);
        Ok(gradient)
    }

    fn mean(self) -> Result<Tensor> {
        Ok((Tensor::cat(&self.losses, 0)?.sum_all()? * self.row_weight)?)
    }

    fn scaled(gradient: &Tensor, by: &Tensor) -> candle_core::Result<Tensor> {
        gradient.broadcast_mul(&by.to_dtype(gradient.dtype())?)
    }
}

/// Logits of a chunk on the CPU where the vocabulary is small: 4 MiB in f32.
const CPU_CHUNK_LOGITS: usize = 1 << 20;

/// Minimum number of rows of a chunk on the CPU.
const MIN_CHUNK_ROWS: usize = 16;

/// The number of rows whose logits exist at a time on the CPU, for a vocabulary of `vocab` tokens and hidden states of
/// `hidden_size` elements.
///
/// With a large vocabulary, a product of few rows is limited by reading the weights, so that chunks must not be small.
/// The gradient of the weights, `[vocab, hidden_size]`, is held in any case; logits of a quarter of its size add little
/// memory.
pub fn chunk_rows(vocab: usize, hidden_size: usize) -> usize {
    (CPU_CHUNK_LOGITS / vocab).max(hidden_size / 4).max(MIN_CHUNK_ROWS)
}

/// The ranges of `0..rows` in chunks of `chunk` rows.
pub(super) fn chunks_of(rows: usize, chunk: usize) -> impl Iterator<Item = Range<usize>> {
    (0..rows).step_by(chunk).map(move |start| start..(start + chunk).min(rows))
}

#[cfg(test)]
mod tests {
    use candle_core::Var;

    use super::super::{IGNORE, composed_losses, linear_cross_entropy};
    use super::*;

    /// Losses and gradients of the logits of a chunk as the kernels compute them, composed of candle operations.
    fn row_losses(
        _: Range<usize>,
        logits: &Tensor,
        targets: &Tensor,
        weights: Option<&Tensor>,
    ) -> Result<(Tensor, Option<Tensor>)> {
        let losses = composed_losses(logits, targets)?;
        let Some(weights) = weights else { return Ok((losses, None)) };
        let logits = Var::from_tensor(logits)?;
        let grads = (composed_losses(&logits, targets)? * weights)?.sum_all()?.backward()?;
        Ok((losses, grads.get(&logits).cloned()))
    }

    /// Loss and gradients against those of the CPU implementation, for chunks of one row, of three rows and of all.
    #[test]
    fn chunks_together_have_the_loss_and_the_gradients_of_all_rows() -> Result<()> {
        let (rows, c, v) = (11usize, 6usize, 9usize);
        let values = |n: usize, step: usize| -> Vec<f64> {
            (0..n).map(|i| (i * step % 101) as f64 / 40.0 - 1.2).collect()
        };
        let ids: Vec<u32> = (0..rows).map(|i| if i % 4 == 1 { IGNORE } else { (i * 5 % v) as u32 }).collect();
        let none = vec![IGNORE; rows];
        for (targets, dtype, bound) in
            [(&ids, DType::F64, 1e-12), (&ids, DType::F32, 2e-6), (&none, DType::F64, 0.0)]
        {
            let targets = Tensor::new(&targets[..], &Device::Cpu)?;
            let tensor = |n: usize, step| -> Result<Var> {
                let t = Tensor::from_vec(values(n * c, step), (n, c), &Device::Cpu)?;
                Ok(Var::from_tensor(&t.to_dtype(dtype)?)?)
            };
            let (hidden, weights) = (tensor(rows, 37)?, tensor(v, 53)?);
            let all = |loss: Tensor| -> Result<Vec<f64>> {
                // Not the last operation, so that the incoming gradient is not 1.
                let grads = (&loss * 3.0)?.backward()?;
                let mut all = vec![loss.to_dtype(DType::F64)?.to_scalar::<f64>()?];
                for var in [&hidden, &weights] {
                    let grad = grads.get(var).expect("a gradient").to_dtype(DType::F64)?;
                    all.extend(grad.flatten_all()?.to_vec1::<f64>()?);
                }
                Ok(all)
            };
            let expected = all(linear_cross_entropy(&hidden, &weights, &targets)?)?;
            assert_eq!(expected.iter().any(|x| *x != 0.0), bound > 0.0, "every row is ignored or none is");
            for max_logits in [1, 3 * v, usize::MAX] {
                let in_chunks = |hidden: &Tensor, weights: &Tensor| {
                    let loss = DeviceLoss::new(&targets, weights, max_logits, row_losses)?;
                    chunked("chunks", hidden, weights, loss)
                };
                let got = all(in_chunks(&hidden, &weights)?)?;
                assert_eq!(got.len(), expected.len());
                for (i, (a, b)) in got.iter().zip(&expected).enumerate() {
                    let close = (a - b).abs() <= bound * (1.0 + b.abs());
                    assert!(close, "{dtype:?} {max_logits} {i}: {a}, not {b}");
                }
                // Without gradients.
                let got = in_chunks(&hidden.detach(), &weights.detach())?;
                let off = got.to_dtype(DType::F64)?.to_scalar::<f64>()? - expected[0];
                let close = off.abs() <= bound * (1.0 + expected[0].abs());
                assert!(close, "{dtype:?} {max_logits}: {off} off");
            }
        }
        Ok(())
    }
}
