//! Output projection and loss in one off the CPU.
//!
//! As on the CPU, chunks of rows go through in turn, and each chunk's logits become loss and gradients at once.
//! Nothing waits for the device: the number of counted rows and the loss stay there. A target outside the vocabulary
//! is not looked for.

use candle_core::{Result, Tensor};
use gd_kernels::fused::{Finished, attach2};
use gd_kernels::on_device::{cross_entropy, cross_entropy_and_gradient};

use super::linear::accumulator;
use super::weight;

/// Logits that exist at a time, at most: 512 MiB in bf16, and as much of their gradient.
const CHUNK: usize = 1 << 28;

/// As [`linear_cross_entropy`](super::linear_cross_entropy); infinite with a target outside the vocabulary.
pub(super) fn linear_cross_entropy(hidden: &Tensor, weights: &Tensor, targets: &Tensor) -> Result<Tensor> {
    let name = "linear_cross_entropy";
    in_chunks(name, hidden, weights, targets, CHUNK, |_, logits, targets, shares| match shares {
        None => Ok((cross_entropy(logits, targets)?, None)),
        Some(shares) => {
            let (losses, gradient) = cross_entropy_and_gradient(logits, targets, shares)?;
            Ok((losses, Some(gradient)))
        }
    })
}

/// The mean over counted rows of a loss of the logits `hidden weightsᵀ`, differentiable by both, at most `chunk` logits
/// at a time. hidden `[rows, C]`, weights `[V, C]`, targets u32 `[rows]`. `piece` gets the first of some rows, their
/// logits and targets; it returns their losses, and where it is given shares of the rows, the gradient of the losses'
/// sum with these weights.
pub(super) fn in_chunks(
    name: &'static str,
    hidden: &Tensor,
    weights: &Tensor,
    targets: &Tensor,
    chunk: usize,
    piece: impl Fn(usize, &Tensor, &Tensor, Option<&Tensor>) -> Result<(Tensor, Option<Tensor>)>,
) -> Result<Tensor> {
    let (x, w) = (hidden.detach(), weights.detach());
    let wide = accumulator(w.dtype());
    let wanted = hidden.track_op() || weights.track_op();
    let (head, rows, vocab) = (w.t()?, x.dim(0)?, w.dim(0)?);
    let pieces = rows.div_ceil((chunk / vocab).max(1));
    let share = weight(targets, wide)?.recip()?;
    let shares = share.broadcast_as(rows)?.contiguous()?;
    let (mut losses, mut of_hidden, mut of_weights) = (Vec::new(), Vec::new(), None::<Tensor>);
    // Of about equal size: a last one of few rows would cost as much as another.
    let starts: Vec<usize> = (0..=pieces).map(|i| i * rows / pieces).collect();
    for at in starts.windows(2) {
        let part = |t: &Tensor| t.narrow(0, at[0], at[1] - at[0]);
        let x = part(&x)?;
        let given = if wanted { Some(part(&shares)?) } else { None };
        let (row_losses, of_logits) = piece(at[0], &x.matmul(&head)?, &part(targets)?, given.as_ref())?;
        losses.push(row_losses);
        let Some(of_logits) = of_logits else { continue };
        of_hidden.push(of_logits.matmul(&w)?);
        let part = of_logits.t()?.matmul(&x)?.to_dtype(wide)?;
        of_weights = Some(match of_weights {
            Some(sum) => (sum + part)?,
            None => part,
        });
    }
    let loss = (Tensor::cat(&losses, 0)?.sum_all()? * share)?;
    let Some(of_weights) = of_weights else { return Ok(loss) };
    let (of_hidden, of_weights) = (Tensor::cat(&of_hidden, 0)?, of_weights.to_dtype(w.dtype())?);
    attach2(name, hidden, weights, Finished::copy_of(&loss)?, move |_, _, grad| {
        let scaled = |t: &Tensor| t.broadcast_mul(&grad.to_dtype(t.dtype())?);
        Ok([scaled(&of_hidden)?, scaled(&of_weights)?])
    })
}

#[cfg(test)]
mod tests {
    use candle_core::{DType, Device, Var};

    use super::super::{IGNORE, linear_cross_entropy as fused, row_losses};
    use super::*;

    /// What the kernels do with the logits of some rows, on the CPU.
    fn piece(
        _: usize,
        logits: &Tensor,
        targets: &Tensor,
        shares: Option<&Tensor>,
    ) -> Result<(Tensor, Option<Tensor>)> {
        let losses = row_losses(logits, targets)?;
        let Some(shares) = shares else { return Ok((losses, None)) };
        let logits = Var::from_tensor(logits)?;
        let grads = (row_losses(&logits, targets)? * shares)?.sum_all()?.backward()?;
        Ok((losses, grads.get(&logits).cloned()))
    }

    /// Loss and gradients against those of the CPU's own passes, for chunks of one row, a few and all.
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
                Var::from_tensor(&t.to_dtype(dtype)?)
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
            let expected = all(fused(&hidden, &weights, &targets)?)?;
            assert_eq!(expected.iter().any(|x| *x != 0.0), bound > 0.0, "every row is ignored or none is");
            for chunk in [1, 3 * v, usize::MAX] {
                let found = all(in_chunks("chunks", &hidden, &weights, &targets, chunk, piece)?)?;
                assert_eq!(found.len(), expected.len());
                for (i, (a, b)) in found.iter().zip(&expected).enumerate() {
                    assert!((a - b).abs() <= bound * (1.0 + b.abs()), "{dtype:?} {chunk} {i}: {a}, not {b}");
                }
                // Where no gradient is wanted.
                let found = in_chunks("chunks", &hidden.detach(), &weights.detach(), &targets, chunk, piece)?;
                let off = found.to_dtype(DType::F64)?.to_scalar::<f64>()? - expected[0];
                assert!(off.abs() <= bound * (1.0 + expected[0].abs()), "{dtype:?} {chunk}: {off} off");
            }
        }
        Ok(())
    }
}
