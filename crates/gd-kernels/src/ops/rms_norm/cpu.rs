//! The CPU implementation of [`rms_norm`](super::rms_norm): one pass forward and one backward.

use candle_core::Tensor;
use num_traits::Float;

use crate::backend::cpu::element::{Element, Real, by_float, sum2, sum3};
use crate::backend::cpu::parallel::{for_chunks, for_chunks2, rows_per_chunk, sum_rows, vectorize};
use crate::backend::cpu::view::Rows;
use crate::backend::graph::{attach2, with_contiguous_rows};
use crate::error::Result;

/// Normalises validated tensors.
pub(super) fn rms_norm(x: &Tensor, weight: &Tensor, eps: f64) -> Result<Tensor> {
    let x = with_contiguous_rows(x)?;
    let weight = weight.contiguous()?;
    by_float!("rms_norm", x.dtype(), T => {
        let y = {
            let (x, layout) = x.storage_and_layout();
            let rows = Rows::<T>::new(&x, layout)?;
            forward(&rows, &widened::<T>(&weight)?, eps)
        };
        Ok(attach2("rms_norm", &x, &weight, (y, x.shape().clone()), move |x, weight, dy| {
            backward::<T>(x, weight, dy, eps)
        })?)
    })
}

/// The weight in the accumulator type.
fn widened<T: Element>(weight: &Tensor) -> candle_core::Result<Vec<T::Acc>> {
    let (w, layout) = weight.storage_and_layout();
    Ok(Rows::<T>::new(&w, layout)?.row(0).iter().map(|w| w.up()).collect())
}

/// `1 / sqrt(mean(x^2) + eps)` of one row.
#[inline(always)]
fn inverse_rms<T: Element>(x: &[T], eps: f64) -> T::Acc {
    let squares = sum2(x, x, |a: T, b: T| a.up() * b.up());
    (squares / T::Acc::of(x.len() as f64) + T::Acc::of(eps)).sqrt().recip()
}

fn forward<T: Element>(x: &Rows<T>, weight: &[T::Acc], eps: f64) -> Vec<T> {
    let len = x.len();
    let mut y = vec![T::zero(); x.count() * len];
    let rows = rows_per_chunk(len);
    for_chunks(&mut y, rows * len, |chunk, y| {
        vectorize(|| {
            for (j, y) in y.chunks_exact_mut(len).enumerate() {
                let x = x.row(chunk * rows + j);
                normalize_row((x, weight), eps, y);
            }
        });
    });
    y
}

/// A row of the result.
#[inline(always)]
pub(crate) fn normalize_row<T: Element>((x, weight): (&[T], &[T::Acc]), eps: f64, y: &mut [T]) {
    let r = inverse_rms(x, eps);
    for ((y, &x), &w) in y.iter_mut().zip(x).zip(weight) {
        *y = T::down(x.up() * r * w);
    }
}

/// With `r = 1 / rms`: `dx = r (w dy - x r^2 mean(w dy x))` and `dw = sum over rows of dy x r`. Each chunk of rows
/// adds up its own `dw`; the sums of the chunks are then added in order.
fn backward<T: Element>(
    x: &Tensor,
    weight: &Tensor,
    dy: &Tensor,
    eps: f64,
) -> candle_core::Result<[Tensor; 2]> {
    let dy = with_contiguous_rows(dy)?;
    let w = widened::<T>(weight)?;
    let (xs, xl) = x.storage_and_layout();
    let (ds, dl) = dy.storage_and_layout();
    let (x_rows, dy_rows) = (Rows::<T>::new(&xs, xl)?, Rows::<T>::new(&ds, dl)?);
    let (len, count) = (x_rows.len(), x_rows.count());
    let rows = rows_per_chunk(len);
    let mut dx = vec![T::zero(); count * len];
    let mut partial_dw = vec![T::Acc::default(); count.div_ceil(rows) * len];
    for_chunks2((&mut dx, rows * len), (&mut partial_dw, len), |chunk, dx, dw| {
        vectorize(|| {
            for (j, dx) in dx.chunks_exact_mut(len).enumerate() {
                let (x, dy) = (x_rows.row(chunk * rows + j), dy_rows.row(chunk * rows + j));
                row_gradients((x, &w, dy), eps, dx, dw);
            }
        });
    });
    let dw: Vec<T> = sum_rows(&partial_dw, len).into_iter().map(T::down).collect();
    Ok([Tensor::from_vec(dx, x.shape(), x.device())?, Tensor::from_vec(dw, len, x.device())?])
}

/// The gradient of a row, and its part of that of the weight, which is added to `dw`.
#[inline(always)]
pub(crate) fn row_gradients<T: Element>(
    (x, w, dy): (&[T], &[T::Acc], &[T]),
    eps: f64,
    dx: &mut [T],
    dw: &mut [T::Acc],
) {
    let r = inverse_rms(x, eps);
    let projection = sum3(x, dy, w, |x: T, dy: T, w| x.up() * dy.up() * w);
    let scale = projection * r * r / T::Acc::of(x.len() as f64);
    for ((((dx, dw), &x), &dy), &w) in dx.iter_mut().zip(dw.iter_mut()).zip(x).zip(dy).zip(w) {
        let (x, dy) = (x.up(), dy.up());
        *dx = T::down(r * (w * dy - x * scale));
        *dw += dy * x * r;
    }
}

#[cfg(test)]
mod tests {
    use candle_core::{DType, Result, Tensor};

    use crate::ops::agreement::{agree, noise};
    use crate::rms_norm;

    /// The same operator composed of candle operations that have gradients.
    fn composed(x: &Tensor, weight: &Tensor, eps: f64) -> Result<Tensor> {
        let wide = if x.dtype() == DType::F64 { DType::F64 } else { DType::F32 };
        let xw = x.to_dtype(wide)?;
        let scale = ((xw.sqr()?.mean_keepdim(candle_core::D::Minus1)? + eps)?).sqrt()?;
        xw.broadcast_div(&scale)?.broadcast_mul(&weight.to_dtype(wide)?)?.to_dtype(x.dtype())
    }

    #[test]
    fn composition_agrees_in_values_and_gradients() -> Result<()> {
        for dtype in [DType::F64, DType::F32, DType::BF16, DType::F16] {
            let inputs = [noise(1, &[3, 5, 37], dtype)?, noise(2, &[37], dtype)?];
            agree(&inputs, |t| Ok(rms_norm(&t[0], &t[1], 1e-5)?), |t| composed(&t[0], &t[1], 1e-5))?;
        }
        Ok(())
    }
}
