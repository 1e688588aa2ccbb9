//! Output projection and cross entropy in one off the CPU, from tensor operations.
//!
//! As on the CPU, chunks of rows go through in turn, and each chunk's logits become loss and gradients at once.
//! Nothing waits for the device: the number of counted rows and the loss stay there.

use candle_core::{Result, Tensor};
use gd_kernels::fused::{Finished, attach2};

use super::linear::accumulator;
use super::{IGNORE, weight};

/// Logits that exist at a time: 512 MiB in f32, and two arrays of that size beside them.
pub(super) const CHUNK: usize = 1 << 27;

/// As [`linear_cross_entropy`](super::linear_cross_entropy), `chunk` logits at a time. hidden `[rows, C]`, weights
/// `[V, C]`, targets u32 `[rows]`. A target outside the vocabulary is not looked for.
pub(super) fn linear_cross_entropy(
    hidden: &Tensor,
    weights: &Tensor,
    targets: &Tensor,
    chunk: usize,
) -> Result<Tensor> {
    let (x, w) = (hidden.detach(), weights.detach());
    let wide = accumulator(w.dtype());
    let wanted = hidden.track_op() || weights.track_op();
    let (head, rows) = (w.t()?, x.dim(0)?);
    let step = (chunk / w.dim(0)?).max(1);
    // 1 / counted rows where a row counts, else 0: [rows, 1].
    let counts = targets.ne(IGNORE)?;
    let shares = counts.to_dtype(wide)?.broadcast_div(&weight(targets, wide)?)?.unsqueeze(1)?;
    let targets = counts.where_cond(targets, &targets.zeros_like()?)?.unsqueeze(1)?;
    let (mut losses, mut of_hidden, mut of_weights) = (Vec::new(), Vec::new(), None::<Tensor>);
    for at in (0..rows).step_by(step) {
        let n = step.min(rows - at);
        let part = |t: &Tensor| t.narrow(0, at, n);
        let (x, target, share) = (part(&x)?, part(&targets)?, part(&shares)?);
        let logits = x.matmul(&head)?.to_dtype(wide)?;
        let top = logits.max_keepdim(1)?;
        let powers = logits.broadcast_sub(&top)?.exp()?;
        let sums = powers.sum_keepdim(1)?;
        let row_losses = ((sums.log()? + top)? - logits.gather(&target, 1)?)?;
        drop(logits);
        losses.push((row_losses * &share)?.sum_all()?);
        if !wanted {
            continue;
        }
        // (softmax - one-hot) times the row's share.
        let of_logits = powers.broadcast_mul(&(&share / sums)?)?.scatter_add(&target, &share.neg()?, 1)?;
        let of_logits = of_logits.to_dtype(w.dtype())?;
        of_hidden.push(of_logits.matmul(&w)?);
        let part = of_logits.t()?.matmul(&x)?.to_dtype(wide)?;
        of_weights = Some(match of_weights {
            Some(sum) => (sum + part)?,
            None => part,
        });
    }
    let loss = Tensor::stack(&losses, 0)?.sum_all()?;
    let Some(of_weights) = of_weights else { return Ok(loss) };
    let (of_hidden, of_weights) = (Tensor::cat(&of_hidden, 0)?, of_weights.to_dtype(w.dtype())?);
    attach2("linear_cross_entropy", hidden, weights, Finished::copy_of(&loss)?, move |_, _, grad| {
        let scaled = |t: &Tensor| t.broadcast_mul(&grad.to_dtype(t.dtype())?);
        Ok([scaled(&of_hidden)?, scaled(&of_weights)?])
    })
}

#[cfg(test)]
mod tests {
    use candle_core::{DType, Device, Var};

    use super::super::linear_cross_entropy as fused;
    use super::*;

    /// Loss and gradients against those of the CPU's own passes, for chunks of one row, a few and all.
    #[test]
    fn chunks_by_tensor_operations_agree_with_the_fused_loss() -> Result<()> {
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
                let found = all(linear_cross_entropy(&hidden, &weights, &targets, chunk)?)?;
                assert_eq!(found.len(), expected.len());
                for (i, (a, b)) in found.iter().zip(&expected).enumerate() {
                    assert!((a - b).abs() <= bound * (1.0 + b.abs()), "{dtype:?} {chunk} {i}: {a}, not {b}");
                }
            }
        }
        Ok(())
    }
}
