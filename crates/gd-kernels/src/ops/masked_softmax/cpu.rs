//! The CPU implementation of [`masked_softmax`](super::masked_softmax): one pass forward and one backward, each over
//! the visible interval of every row.

use std::ops::Range;

use candle_core::{Shape, Tensor};
use num_traits::{Float, Zero};

use crate::backend::cpu::element::{Element, Real, by_float, maximum, sum1, sum2};
use crate::backend::cpu::parallel::{for_chunks, vectorize};
use crate::backend::cpu::view::cpu_slice;
use crate::backend::graph::attach1;
use crate::error::Result;
use crate::mask::Mask;

/// Rows per task.
const TASK_ROWS: usize = 64;

/// The weights of scores `[B, H, N, M]`.
pub(super) fn masked_softmax(scores: &Tensor, mask: &Mask) -> Result<Tensor> {
    let scores = scores.contiguous()?;
    let (dims, mask) = (scores.dims4()?, mask.clone());
    by_float!("masked-softmax", scores.dtype(), T => {
        let weights = {
            let (storage, layout) = scores.storage_and_layout();
            let x = &cpu_slice::<T>(&storage)?[layout.start_offset()..];
            let mut weights = vec![T::zero(); scores.elem_count()];
            for_visible(&mask, dims, &mut weights, |row, visible, out| {
                let x = &x[row * dims.3..][..dims.3];
                forward(&x[visible.clone()], &mut out[visible]);
            });
            weights
        };
        let result = (weights, Shape::from(dims));
        Ok(attach1("masked-softmax", &scores, result, move |_, p, dp| {
            let dp = dp.contiguous()?;
            let ((p, pl), (d, dl)) = (p.storage_and_layout(), dp.storage_and_layout());
            let (p, d) = (&cpu_slice::<T>(&p)?[pl.start_offset()..], &cpu_slice::<T>(&d)?[dl.start_offset()..]);
            let mut dx = vec![T::zero(); dims.0 * dims.1 * dims.2 * dims.3];
            for_visible(&mask, dims, &mut dx, |row, visible, out| {
                let at = row * dims.3;
                backward(&p[at..][visible.clone()], &d[at..][visible.clone()], &mut out[visible]);
            });
            Tensor::from_vec(dx, dims, dp.device())
        })?)
    })
}

/// Calls `f(row number, visible keys, row of out)` for every row of `[B, H, N, M]`.
fn for_visible<T: Send>(
    mask: &Mask,
    (_, h, n, m): (usize, usize, usize, usize),
    out: &mut [T],
    f: impl Fn(usize, Range<usize>, &mut [T]) + Sync,
) {
    let rows = n.min(TASK_ROWS);
    for_chunks(out, rows * m, |chunk, out| {
        vectorize(|| {
            for (r, out) in out.chunks_exact_mut(m).enumerate() {
                let row = chunk * rows + r;
                f(row, mask.visible(row / (h * n), row % n, m), out);
            }
        });
    });
}

/// The softmax of a row.
fn forward<T: Element>(x: &[T], out: &mut [T]) {
    let top = maximum(x);
    for (o, x) in out.iter_mut().zip(x) {
        *o = T::down((x.up() - top).exp_fast());
    }
    let scale = sum1(out, |o| o.up()).recip();
    for o in out {
        *o = T::down(o.up() * scale);
    }
}

/// The gradient of a row of scores, `dx = p (dp - <p, dp>)`.
fn backward<T: Element>(p: &[T], dp: &[T], out: &mut [T]) {
    let mean = sum2(p, dp, |p, d| p.up() * d.up());
    for ((o, p), d) in out.iter_mut().zip(p).zip(dp) {
        *o = T::down(p.up() * (d.up() - mean));
    }
}

#[cfg(test)]
mod tests {
    use candle_core::{DType, Device, Result, Tensor, Var, bail};

    use super::super::{composed, masked_softmax};
    use crate::mask::Mask;

    /// Values and gradients of the fused pass against the composition.
    #[test]
    fn fused_equals_composed() -> Result<()> {
        let masks = [
            Mask::none(),
            Mask::causal(0),
            Mask::causal(-2),
            Mask::causal(3),
            Mask::window(3, 1),
            Mask::causal(0).kv_len(vec![0, 7]),
        ];
        for mask in masks {
            for (dtype, bound) in
                [(DType::F64, 1e-12), (DType::F32, 1e-5), (DType::BF16, 3e-2), (DType::F16, 4e-3)]
            {
                let values: Vec<f64> =
                    (0..2 * 3 * 7 * 9).map(|i| (f64::from(i) * 12.9898).sin() * 4.0).collect();
                let x = Tensor::from_vec(values.clone(), (2, 3, 7, 9), &Device::Cpu)?.to_dtype(dtype)?;
                let x = Var::from_tensor(&x)?;
                let w = Tensor::from_vec(values, (2, 3, 7, 9), &Device::Cpu)?.cos()?.to_dtype(dtype)?;
                let run = |f: &dyn Fn(&Tensor) -> Result<Tensor>| -> Result<[Vec<f64>; 2]> {
                    let y = f(x.as_tensor())?;
                    let grads = (&y * &w)?.sum_all()?.backward()?;
                    let Some(dx) = grads.get(x.as_tensor()) else { bail!("no gradient") };
                    let flat = |t: &Tensor| t.to_dtype(DType::F64)?.flatten_all()?.to_vec1();
                    Ok([flat(&y)?, flat(dx)?])
                };
                let fused = run(&|x| Ok(masked_softmax(x, &mask)?))?;
                let composed = run(&|x| composed(x, &mask))?;
                for (f, c) in fused.iter().flatten().zip(composed.iter().flatten()) {
                    assert!((f - c).abs() <= bound, "{mask:?} {dtype:?}: {f} against {c}");
                }
            }
        }
        Ok(())
    }
}
