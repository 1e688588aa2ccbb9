//! Learning from another model: cross entropy, and beside it the Kullback-Leibler divergence of the logits
//! from that model's (Hinton et al., arXiv 1503.02531, at temperature 1).

use candle_core::{Result, Tensor, bail};
use gd_kernels::element::{Element, Real, sum2};
use gd_kernels::fused::{Rows, for_chunks2, rows_per_chunk, vectorize};
use gd_kernels::{by_float, on_cpu};

use super::linear::{in_chunks, validate};
use super::{IGNORE, PerRow, gradient_rows, log_softmax, log_sum, on_device};

/// Logits of each model that exist at a time off the CPU: 256 MiB in f32, and a few arrays of that size beside them.
const CHUNK: usize = 1 << 26;

/// The mean over counted rows of `CE(s, target) + kl * KL(softmax(t) || softmax(s))`, in nats, with the logits
/// `s = hidden weightᵀ` and those of the other model `t`, from its own hidden states `[rows, C']` and weights
/// `[V, C']`, which get no gradient. hidden `[rows, C]`, weight `[V, C]`, targets u32 `[rows]`, all floats of one
/// dtype; a scalar in f32 (f64 for f64). The logits of a few rows exist at a time.
///
/// # Errors
/// As [`linear_cross_entropy`](super::linear_cross_entropy), another model of other rows, another vocabulary or
/// dtype, or a `kl` that is negative or not finite.
pub fn linear_distillation(
    (hidden, weight): (&Tensor, &Tensor),
    targets: &Tensor,
    (other_hidden, other_weight): (&Tensor, &Tensor),
    kl: f64,
) -> Result<Tensor> {
    validate("linear_distillation", hidden, weight, targets)?;
    validate("linear_distillation", other_hidden, other_weight, targets)?;
    if (weight.dim(0)?, weight.dtype()) != (other_weight.dim(0)?, other_weight.dtype()) {
        bail!(
            "linear_distillation: weights {:?} {:?} and those of the other model {:?} {:?}; the same vocabulary \
             and dtype expected",
            weight.dims(),
            weight.dtype(),
            other_weight.dims(),
            other_weight.dtype()
        );
    }
    if !(kl >= 0.0 && kl.is_finite()) {
        bail!("linear_distillation: the weight {kl} of the divergence must be finite and at least 0");
    }
    let (other_hidden, other_head) = (other_hidden.detach(), other_weight.detach().t()?);
    if !on_cpu(hidden.device()) {
        let name = "linear_distillation";
        return on_device::in_chunks(name, hidden, weight, targets, CHUNK, |at, logits, targets, shares| {
            let other = other_hidden.narrow(0, at, logits.dim(0)?)?.matmul(&other_head)?;
            composed((logits, &other), targets, kl, shares)
        });
    }
    by_float!("linear_distillation", hidden.dtype(), T => {
        in_chunks::<T>("linear_distillation", hidden, weight, targets, |at, logits, targets, scale| {
            let other = other_hidden.narrow(0, at, targets.len())?.matmul(&other_head)?;
            let (losses, sums) = forward::<T>(logits, &other, targets, kl)?;
            let gradient = scale.map(|scale| backward::<T>(logits, &other, targets, &sums, kl, scale));
            Ok((losses, gradient.transpose()?))
        })
    })
}

/// The loss of every row from tensor operations, and with shares of the rows the gradient of the losses' sum with these
/// weights.
fn composed(
    (logits, other): (&Tensor, &Tensor),
    targets: &Tensor,
    kl: f64,
    shares: Option<&Tensor>,
) -> Result<(Tensor, Option<Tensor>)> {
    let counts = targets.ne(IGNORE)?;
    let targets = counts.where_cond(targets, &targets.zeros_like()?)?.unsqueeze(1)?;
    let (of_s, of_t) = (log_softmax(logits)?, log_softmax(other)?);
    let theirs = of_t.exp()?;
    let apart = ((&theirs * (of_t - &of_s)?)?.sum_keepdim(1)? * kl)?;
    let losses = (apart - of_s.gather(&targets, 1)?)?.squeeze(1)?;
    let losses = counts.where_cond(&losses, &losses.zeros_like()?)?;
    let Some(shares) = shares else { return Ok((losses, None)) };
    let shares = (shares * counts.to_dtype(of_s.dtype())?)?.unsqueeze(1)?;
    let gradient = ((of_s.exp()? * (1.0 + kl))? - (theirs * kl)?)?;
    let gradient = gradient.scatter_add(&targets, &shares.ones_like()?.neg()?, 1)?.broadcast_mul(&shares)?;
    Ok((losses, Some(gradient.to_dtype(logits.dtype())?)))
}

/// The logsumexps of a row of both models' logits.
type Sums<T> = Vec<[<T as Element>::Acc; 2]>;

/// The loss and the logsumexps of every row.
fn forward<T: Element>(
    logits: &Tensor,
    other: &Tensor,
    targets: &[u32],
    kl: f64,
) -> Result<(PerRow<T>, Sums<T>)> {
    let ((storage, layout), (others, other)) = (logits.storage_and_layout(), other.storage_and_layout());
    let (logits, other) = (Rows::<T>::new(&storage, layout)?, Rows::<T>::new(&others, other)?);
    let mut losses = vec![T::Acc::default(); targets.len()];
    let mut sums = vec![[T::Acc::default(); 2]; targets.len()];
    let (rows, kl) = (rows_per_chunk(logits.len()), T::Acc::of(kl));
    for_chunks2((&mut losses, rows), (&mut sums, rows), |chunk, losses, sums| {
        vectorize(|| {
            for (j, (loss, sums)) in losses.iter_mut().zip(sums).enumerate() {
                let i = chunk * rows + j;
                if targets[i] == IGNORE {
                    continue;
                }
                let (s, t) = (logits.row(i), other.row(i));
                let (of_s, of_t) = (log_sum(s), log_sum(t));
                let apart = sum2(t, s, |t: T, s: T| {
                    let log_p = t.up() - of_t;
                    log_p.exp_fast() * (log_p - (s.up() - of_s))
                });
                *sums = [of_s, of_t];
                *loss = of_s - s[targets[i] as usize].up() + kl * apart;
            }
        });
    });
    Ok((losses, sums))
}

/// `((1 + kl) softmax(s) - kl softmax(t) - one-hot) * scale`.
fn backward<T: Element>(
    logits: &Tensor,
    other: &Tensor,
    targets: &[u32],
    sums: &[[T::Acc; 2]],
    kl: f64,
    scale: f64,
) -> Result<Tensor> {
    let ((storage, layout), (others, other)) = (logits.storage_and_layout(), other.storage_and_layout());
    let (input, other) = (Rows::<T>::new(&storage, layout)?, Rows::<T>::new(&others, other)?);
    let (mine, theirs, one) = (T::Acc::of((1.0 + kl) * scale), T::Acc::of(kl * scale), T::Acc::of(scale));
    gradient_rows::<T>(
        logits,
        targets,
        #[inline(always)]
        |i, target, grad| {
            let [of_s, of_t] = sums[i];
            let of = |s: T, t: T| (s.up() - of_s).exp_fast() * mine - (t.up() - of_t).exp_fast() * theirs;
            let (s, t) = (input.row(i), other.row(i));
            for ((g, &s), &t) in grad.iter_mut().zip(s).zip(t) {
                *g = T::down(of(s, t));
            }
            grad[target] = T::down(of(s[target], t[target]) - one);
        },
    )
}

#[cfg(test)]
mod tests {
    use super::super::{row_losses, weight};
    use super::*;
    use candle_core::{DType, Device, Var};

    /// The same from candle primitives that have gradients.
    fn plain(logits: &Tensor, targets: &Tensor, other: &Tensor, kl: f64) -> Result<Tensor> {
        let other = log_softmax(&other.detach())?;
        let apart = (other.exp()? * (&other - log_softmax(logits)?)?)?.sum(1)?;
        let counts = targets.ne(IGNORE)?;
        let apart = counts.where_cond(&apart, &apart.zeros_like()?)?;
        let apart = (apart * kl)?;
        (row_losses(logits, targets)? + &apart)?.sum_all()? / weight(targets, apart.dtype())?
    }

    /// Values and both gradients, with rows that do not count, on a vocabulary that takes several chunks.
    #[test]
    fn composition_agrees_in_values_and_gradients() -> Result<()> {
        let noise = |n: usize, step: usize, shape: (usize, usize), dtype| {
            let values: Vec<f64> = (0..n).map(|i| (i * step % 101) as f64 / 50.0 - 1.0).collect();
            Tensor::from_vec(values, shape, &Device::Cpu)?.to_dtype(dtype)
        };
        let (rows, vocab) = (37, 70_001);
        let targets: Vec<u32> =
            (0..rows as u32).map(|i| if i % 5 == 2 { IGNORE } else { i * 7919 % vocab as u32 }).collect();
        let targets = Tensor::new(targets, &Device::Cpu)?;
        for (dtype, bound) in [(DType::F64, 1e-12), (DType::F32, 1e-5)] {
            let other = [noise(rows * 5, 29, (rows, 5), dtype)?, noise(vocab * 5, 53, (vocab, 5), dtype)?];
            for kl in [0.0, 0.7] {
                let hidden = Var::from_tensor(&noise(rows * 3, 37, (rows, 3), dtype)?)?;
                let weight = Var::from_tensor(&noise(vocab * 3, 17, (vocab, 3), dtype)?)?;
                let run = |loss: Tensor| -> Result<Vec<f64>> {
                    let grads = loss.backward()?;
                    let mut all = vec![loss.to_dtype(DType::F64)?.to_scalar()?];
                    for var in [&hidden, &weight] {
                        let grad = grads.get(var).expect("a gradient").flatten_all()?;
                        // Of the order of 1 / rows and 1 / vocab; compared on the same scale.
                        let scale = grad.abs()?.max_all()?.to_dtype(DType::F64)?.to_scalar::<f64>()?;
                        assert!(scale > 0.0);
                        let grad = (grad.to_dtype(DType::F64)? / scale)?;
                        all.extend(grad.to_vec1::<f64>()?);
                        all.push(scale);
                    }
                    Ok(all)
                };
                let fused = linear_distillation((&hidden, &weight), &targets, (&other[0], &other[1]), kl)?;
                let logits = hidden.matmul(&weight.t()?)?;
                let others = other[0].matmul(&other[1].t()?)?;
                let plain = run(plain(&logits, &targets, &others, kl)?)?;
                // As off the CPU, in chunks of 12 and 13 rows.
                let chunked = on_device::in_chunks(
                    "chunks",
                    &hidden,
                    &weight,
                    &targets,
                    14 * vocab,
                    |at, logits, targets, shares| {
                        let others = others.narrow(0, at, logits.dim(0)?)?;
                        composed((logits, &others), targets, kl, shares)
                    },
                )?;
                for (name, found) in [("fused", run(fused)?), ("chunked", run(chunked)?)] {
                    assert_eq!(found.len(), plain.len());
                    for (a, b) in found.into_iter().zip(&plain) {
                        let held = (a - b).abs() <= bound * (1.0 + b.abs());
                        assert!(held, "{name} {dtype:?} {kl}: {a} against {b}");
                    }
                }
            }
        }
        Ok(())
    }
}
