//! Distillation: cross entropy plus the Kullback-Leibler divergence from the distribution of a teacher (Hinton et al.,
//! arXiv 1503.02531, at temperature 1).

use candle_core::Tensor;

use super::chunked::{CpuLoss, DeviceLoss, chunked};
use super::cpu::{PerRow, gradient_rows, log_sum};
use super::linear::validate;
use super::{IGNORE, log_softmax};
use crate::backend::cpu::element::{Element, Real, by_float, sum2};
use crate::backend::cpu::parallel::{for_chunks2, rows_per_chunk, vectorize};
use crate::backend::cpu::product::product;
use crate::backend::cpu::view::Rows;
use crate::backend::dispatch::on_cpu;
use crate::backend::span::{Pass, operator_span};
use crate::error::{Error, Result};

/// Maximum number of logits of a chunk on a GPU, for each of the two models: 256 MiB in f32. The composition holds
/// several arrays of that size.
const GPU_CHUNK_LOGITS: usize = 1 << 26;

/// The mean over counted rows of `CE(s, target) + kl * KL(softmax(t) || softmax(s))`, in nats, with the student's
/// logits `s = hidden weightᵀ` and the teacher's logits `t = teacher_hidden teacher_weightᵀ`, of which only a
/// chunk of rows is in memory at a time.
///
/// * `hidden`: `[rows, C]` and `weight`: `[V, C]`, the student's.
/// * `targets`: u32 `[rows]`, each below V or [`IGNORE`].
/// * `teacher_hidden`: `[rows, C']` and `teacher_weight`: `[V, C']`, which get no gradient; all floats of one dtype.
/// * `kl`: the weight of the divergence, finite and at least 0.
///
/// Returns a scalar in f32 (f64 for f64). `hidden` and `weight` get gradients.
///
/// # Errors
/// As [`linear_cross_entropy`](super::linear_cross_entropy); a teacher with another number of rows, another vocabulary
/// or dtype; or a `kl` out of its range.
pub fn linear_distillation(
    (hidden, weight): (&Tensor, &Tensor),
    targets: &Tensor,
    (teacher_hidden, teacher_weight): (&Tensor, &Tensor),
    kl: f64,
) -> Result<Tensor> {
    let _span = operator_span("linear_distillation", Pass::Forward);
    const NAME: &str = "linear_distillation";
    validate(NAME, hidden, weight, targets)?;
    validate(NAME, teacher_hidden, teacher_weight, targets)?;
    if (weight.dim(0)?, weight.dtype()) != (teacher_weight.dim(0)?, teacher_weight.dtype()) {
        return Err(Error::Invalid(format!(
            "{NAME}: weights {:?} {:?} and those of the teacher {:?} {:?}; the same vocabulary and dtype expected",
            weight.dims(),
            weight.dtype(),
            teacher_weight.dims(),
            teacher_weight.dtype()
        )));
    }
    if !(kl >= 0.0 && kl.is_finite()) {
        return Err(Error::Invalid(format!(
            "{NAME}: the weight {kl} of the divergence must be finite and at least 0"
        )));
    }
    let (teacher_hidden, teacher_projection) = (teacher_hidden.detach(), teacher_weight.detach().t()?);
    let teacher_logits = |start: usize, rows: usize| -> Result<Tensor> {
        Ok(product(&teacher_hidden.narrow(0, start, rows)?, &teacher_projection)?)
    };
    if !on_cpu(hidden.device()) {
        let loss = DeviceLoss::new(targets, weight, GPU_CHUNK_LOGITS, |rows, logits, targets, weights| {
            let teacher = teacher_logits(rows.start, rows.len())?;
            Ok(composed([logits, &teacher], targets, kl, weights)?)
        })?;
        return chunked(NAME, hidden, weight, loss);
    }
    by_float!(NAME, hidden.dtype(), T => {
        let loss = CpuLoss::<T, _>::new(targets, weight, |rows, logits, targets, scale| {
            let teacher = teacher_logits(rows.start, rows.len())?;
            let (losses, sums) = forward::<T>([logits, &teacher], targets, kl)?;
            let gradient = scale.map(|scale| backward::<T>([logits, &teacher], targets, &sums, kl, scale));
            Ok((losses, gradient.transpose()?))
        })?;
        chunked(NAME, hidden, weight, loss)
    })
}

/// The loss of every row from tensor operations, and with weights of the rows the gradient of the weighted sum of the
/// losses.
fn composed(
    [logits, teacher]: [&Tensor; 2],
    targets: &Tensor,
    kl: f64,
    weights: Option<&Tensor>,
) -> candle_core::Result<(Tensor, Option<Tensor>)> {
    let counts = targets.ne(IGNORE)?;
    let targets = counts.where_cond(targets, &targets.zeros_like()?)?.unsqueeze(1)?;
    let (log_s, log_t) = (log_softmax(logits)?, log_softmax(teacher)?);
    let p_t = log_t.exp()?;
    let divergence = ((&p_t * (log_t - &log_s)?)?.sum_keepdim(1)? * kl)?;
    let losses = (divergence - log_s.gather(&targets, 1)?)?.squeeze(1)?;
    let losses = counts.where_cond(&losses, &losses.zeros_like()?)?;
    let Some(weights) = weights else { return Ok((losses, None)) };
    let weights = (weights * counts.to_dtype(log_s.dtype())?)?.unsqueeze(1)?;
    let gradient = ((log_s.exp()? * (1.0 + kl))? - (p_t * kl)?)?;
    let gradient =
        gradient.scatter_add(&targets, &weights.ones_like()?.neg()?, 1)?.broadcast_mul(&weights)?;
    Ok((losses, Some(gradient.to_dtype(logits.dtype())?)))
}

/// The logsumexps of a row of the student's and the teacher's logits.
type LogSums<T> = Vec<[<T as Element>::Acc; 2]>;

/// The loss and the logsumexps of every row.
fn forward<T: Element>(
    [logits, teacher]: [&Tensor; 2],
    targets: &[u32],
    kl: f64,
) -> candle_core::Result<(PerRow<T>, LogSums<T>)> {
    let ((s, s_layout), (t, t_layout)) = (logits.storage_and_layout(), teacher.storage_and_layout());
    let (logits, teacher) = (Rows::<T>::new(&s, s_layout)?, Rows::<T>::new(&t, t_layout)?);
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
                let (s, t) = (logits.row(i), teacher.row(i));
                let (sum_s, sum_t) = (log_sum(s), log_sum(t));
                let divergence = sum2(t, s, |t: T, s: T| {
                    let log_p = t.up() - sum_t;
                    log_p.exp_fast() * (log_p - (s.up() - sum_s))
                });
                *sums = [sum_s, sum_t];
                *loss = sum_s - s[targets[i] as usize].up() + kl * divergence;
            }
        });
    });
    Ok((losses, sums))
}

/// `((1 + kl) softmax(s) - kl softmax(t) - one-hot) * scale`.
fn backward<T: Element>(
    [logits, teacher]: [&Tensor; 2],
    targets: &[u32],
    sums: &[[T::Acc; 2]],
    kl: f64,
    scale: f64,
) -> candle_core::Result<Tensor> {
    let ((s, s_layout), (t, t_layout)) = (logits.storage_and_layout(), teacher.storage_and_layout());
    let (student, teacher) = (Rows::<T>::new(&s, s_layout)?, Rows::<T>::new(&t, t_layout)?);
    let (of_student, of_teacher) = (T::Acc::of((1.0 + kl) * scale), T::Acc::of(kl * scale));
    let of_target = T::Acc::of(scale);
    gradient_rows::<T>(
        logits,
        targets,
        #[inline(always)]
        |i, target, grad| {
            let [sum_s, sum_t] = sums[i];
            let mix = |s: T, t: T| {
                (s.up() - sum_s).exp_fast() * of_student - (t.up() - sum_t).exp_fast() * of_teacher
            };
            let (s, t) = (student.row(i), teacher.row(i));
            for ((g, &s), &t) in grad.iter_mut().zip(s).zip(t) {
                *g = T::down(mix(s, t));
            }
            grad[target] = T::down(mix(s[target], t[target]) - of_target);
        },
    )
}

#[cfg(test)]
mod tests {
    use candle_core::{DType, Device, Result, Var};

    use super::super::{composed_losses, counted_rows};
    use super::*;

    /// The same loss composed of candle operations that have gradients.
    fn plain(logits: &Tensor, targets: &Tensor, teacher: &Tensor, kl: f64) -> Result<Tensor> {
        let teacher = log_softmax(&teacher.detach())?;
        let divergence = (teacher.exp()? * (&teacher - log_softmax(logits)?)?)?.sum(1)?;
        let counts = targets.ne(IGNORE)?;
        let divergence = counts.where_cond(&divergence, &divergence.zeros_like()?)?;
        let divergence = (divergence * kl)?;
        let losses = (composed_losses(logits, targets)? + &divergence)?;
        losses.sum_all()? / counted_rows(targets, divergence.dtype())?
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
            let teacher = [noise(rows * 5, 29, (rows, 5), dtype)?, noise(vocab * 5, 53, (vocab, 5), dtype)?];
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
                let fused =
                    linear_distillation((&hidden, &weight), &targets, (&teacher[0], &teacher[1]), kl)?;
                let logits = hidden.matmul(&weight.t()?)?;
                let teacher_logits = teacher[0].matmul(&teacher[1].t()?)?;
                let plain = run(plain(&logits, &targets, &teacher_logits, kl)?)?;
                // As on a GPU, in chunks of 12 and 13 rows.
                let loss =
                    DeviceLoss::new(&targets, &weight, 14 * vocab, |rows, logits, targets, weights| {
                        let teacher = teacher_logits.narrow(0, rows.start, rows.len())?;
                        Ok(composed([logits, &teacher], targets, kl, weights)?)
                    })?;
                let chunked = chunked("chunks", &hidden, &weight, loss)?;
                for (name, got) in [("fused", run(fused)?), ("chunked", run(chunked)?)] {
                    assert_eq!(got.len(), plain.len());
                    for (a, b) in got.into_iter().zip(&plain) {
                        let close = (a - b).abs() <= bound * (1.0 + b.abs());
                        assert!(close, "{name} {dtype:?} {kl}: {a} against {b}");
                    }
                }
            }
        }
        Ok(())
    }
}
