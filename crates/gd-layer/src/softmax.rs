//! Softmax over the visible keys: scores `[B, H, N, M]` to weights of the same shape.
//!
//! On the CPU one fused pass each way over the visible interval of every row; on other devices a
//! composition of differentiable primitives with an additive mask.

use candle_core::{CpuStorage, CustomOp1, Layout, Result, Shape, Tensor, WithDType, bail};
use gd_kernels::element::{Element, Real, maximum, sum1, sum2};
use gd_kernels::fused::{cpu_slice, for_chunks, vectorize};
use gd_kernels::{Mask, by_float, on_cpu};
use num_traits::{Float, Zero};

/// `softmax` over the keys that the mask leaves to each query; 0 for the others, and for all keys of
/// a query that sees none.
///
/// # Errors
/// Scores that are not of rank 4, or a mask that does not fit them.
pub(crate) fn masked_softmax(scores: &Tensor, mask: &Mask) -> Result<Tensor> {
    let (b, _, _, m) = scores.dims4()?;
    mask.validate(b, m)?;
    if !on_cpu(scores.device()) {
        return composed(scores, mask);
    }
    scores.contiguous()?.apply_op1(MaskedSoftmax { mask: mask.clone() })
}

/// The same from candle primitives that have gradients.
fn composed(scores: &Tensor, mask: &Mask) -> Result<Tensor> {
    let (b, _, n, m) = scores.dims4()?;
    let (bias, seen) = crate::mask::additive(mask, b, n, m, scores)?;
    let weights = candle_nn::ops::softmax(&scores.broadcast_add(&bias)?, 3)?;
    // A row of the mask without a single key is uniform after the softmax: it reads nothing.
    match seen {
        Some(seen) => weights.broadcast_mul(&seen),
        None => Ok(weights),
    }
}

struct MaskedSoftmax {
    mask: Mask,
}

impl MaskedSoftmax {
    /// Calls `f(row number, visible keys, row of out)` for every row.
    fn rows<T: Send>(
        &self,
        dims: (usize, usize, usize, usize),
        out: &mut [T],
        f: impl Fn(usize, std::ops::Range<usize>, &mut [T]) + Sync,
    ) {
        let (_, h, n, m) = dims;
        for_chunks(out, n.min(64) * m, |chunk, out| {
            vectorize(|| {
                for (r, out) in out.chunks_exact_mut(m).enumerate() {
                    let row = chunk * n.min(64) + r;
                    f(row, self.mask.visible(row / (h * n), row % n, m), out);
                }
            });
        });
    }
}

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

/// `dx = p (dp - <p, dp>)`.
fn backward<T: Element>(p: &[T], dp: &[T], out: &mut [T]) {
    let mean = sum2(p, dp, |p, d| p.up() * d.up());
    for ((o, p), d) in out.iter_mut().zip(p).zip(dp) {
        *o = T::down(p.up() * (d.up() - mean));
    }
}

impl CustomOp1 for MaskedSoftmax {
    fn name(&self) -> &'static str {
        "masked-softmax"
    }

    fn cpu_fwd(&self, scores: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let dims = layout.shape().dims4()?;
        let Some((start, end)) = layout.contiguous_offsets() else { bail!("masked-softmax: strided scores") };
        by_float!("masked-softmax", candle_core::backend::BackendStorage::dtype(scores), T => {
            let x = &scores.as_slice::<T>()?[start..end];
            let mut out = vec![T::zero(); x.len()];
            self.rows(dims, &mut out, |row, seen, out| {
                let x = &x[row * dims.3..][..dims.3];
                forward(&x[seen.clone()], &mut out[seen]);
            });
            Ok((T::to_cpu_storage_owned(out), layout.shape().clone()))
        })
    }

    fn bwd(&self, scores: &Tensor, p: &Tensor, dp: &Tensor) -> Result<Option<Tensor>> {
        let (dims, dp) = (p.dims4()?, dp.contiguous()?);
        by_float!("masked-softmax", scores.dtype(), T => {
            let ((p, pl), (d, dl)) = (p.storage_and_layout(), dp.storage_and_layout());
            let (p, d) = (&cpu_slice::<T>(&p)?[pl.start_offset()..], &cpu_slice::<T>(&d)?[dl.start_offset()..]);
            let mut out = vec![T::zero(); dims.0 * dims.1 * dims.2 * dims.3];
            self.rows(dims, &mut out, |row, seen, out| {
                let at = row * dims.3;
                backward(&p[at..][seen.clone()], &d[at..][seen.clone()], &mut out[seen]);
            });
            Ok(Some(Tensor::from_vec(out, scores.shape(), scores.device())?))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::{DType, Device, Var};

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
                let (fused, composed) = (run(&|x| masked_softmax(x, &mask))?, run(&|x| composed(x, &mask))?);
                for (f, c) in fused.iter().flatten().zip(composed.iter().flatten()) {
                    assert!((f - c).abs() <= bound, "{mask:?} {dtype:?}: {f} against {c}");
                }
            }
        }
        Ok(())
    }
}
