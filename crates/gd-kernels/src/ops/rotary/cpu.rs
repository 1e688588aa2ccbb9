//! The CPU implementation of [`rotary`](super::rotary): one pass. The backward pass is the same with negative angles.

use candle_core::{Shape, Tensor};

use crate::backend::cpu::element::{Element, Real, acc_dtype, by_float};
use crate::backend::cpu::parallel::{for_chunks, rows_per_chunk, vectorize};
use crate::backend::cpu::view::Rows;
use crate::backend::graph::{attach1, with_contiguous_rows};
use crate::error::{Error, Result};

/// Whether a pass rotates by the angles or by their negatives.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Direction {
    Forward,
    Backward,
}

/// Rotates validated tensors.
pub(super) fn rotary(x: &Tensor, [cos, sin]: [&Tensor; 2], offsets: &[usize]) -> Result<Tensor> {
    let wide = acc_dtype(x.dtype());
    if cos.dtype() != wide || sin.dtype() != wide {
        return Err(Error::Invalid(format!(
            "rotary: x is {:?}, cos {:?} and sin {:?}; angles in {wide:?} expected",
            x.dtype(),
            cos.dtype(),
            sin.dtype()
        )));
    }
    let angles = [cos.detach().contiguous()?, sin.detach().contiguous()?];
    let offsets = offsets.to_vec();
    let x = with_contiguous_rows(x)?;
    by_float!("rotary", x.dtype(), T => {
        let y = rotate::<T>(&x, &angles, &offsets, Direction::Forward)?;
        Ok(attach1("rotary", &x, y, move |_, _, dy| {
            let (dx, shape) = rotate::<T>(dy, &angles, &offsets, Direction::Backward)?;
            Tensor::from_vec(dx, shape, dy.device())
        })?)
    })
}

/// The rows of `x` rotated by the angles of their positions, and their shape.
fn rotate<T: Element>(
    x: &Tensor,
    [cos, sin]: &[Tensor; 2],
    offsets: &[usize],
    direction: Direction,
) -> candle_core::Result<(Vec<T>, Shape)> {
    let x = with_contiguous_rows(x)?;
    let shape = x.shape().clone();
    let (_, h, n, d) = x.dims4()?;
    let ((xs, xl), (cs, cl), (ss, sl)) =
        (x.storage_and_layout(), cos.storage_and_layout(), sin.storage_and_layout());
    let input = Rows::<T>::new(&xs, xl)?;
    let (cos, sin) = (Rows::<T::Acc>::new(&cs, cl)?, Rows::<T::Acc>::new(&ss, sl)?);
    let mut y = vec![T::zero(); input.count() * d];
    let rows = rows_per_chunk(d);
    for_chunks(&mut y, rows * d, |chunk, y| {
        vectorize(|| {
            for (j, y) in y.chunks_exact_mut(d).enumerate() {
                let i = chunk * rows + j;
                let offset = if let [offset] = offsets { *offset } else { offsets[i / (h * n)] };
                let position = offset + i % n;
                let (cos, sin) = (cos.row(position), sin.row(position));
                rotate_row(input.row(i), (cos, sin), y, direction);
            }
        });
    });
    Ok((y, shape))
}

/// A row rotated by the angles with these cosines and sines.
#[inline(always)]
pub(crate) fn rotate_row<T: Element>(
    x: &[T],
    (cos, sin): (&[T::Acc], &[T::Acc]),
    y: &mut [T],
    direction: Direction,
) {
    let (x1, x2) = x.split_at(x.len() / 2);
    let (y1, y2) = y.split_at_mut(x.len() / 2);
    let out = y1.iter_mut().zip(y2);
    for ((((y1, y2), &x1), &x2), (&c, &s)) in out.zip(x1).zip(x2).zip(cos.iter().zip(sin)) {
        let s = if direction == Direction::Backward { -s } else { s };
        let (x1, x2) = (x1.up(), x2.up());
        *y1 = T::down(x1 * c - x2 * s);
        *y2 = T::down(x2 * c + x1 * s);
    }
}

/// The elements of cosines and sines of the first `positions` positions.
///
/// # Errors
/// Angles in another type than `T`, or fewer positions.
pub(crate) fn angles<T: Real>(
    cos: &Tensor,
    sin: &Tensor,
    positions: usize,
) -> candle_core::Result<[Vec<T>; 2]> {
    let values = |t: &Tensor| t.detach().narrow(0, 0, positions)?.flatten_all()?.to_vec1::<T>();
    Ok([values(cos)?, values(sin)?])
}

#[cfg(test)]
mod tests {
    use candle_core::{D, DType, Device, Result, Tensor};

    use crate::ops::agreement::{agree, noise};
    use crate::rotary;

    /// The same operator composed of candle operations that have gradients; cos and sin `[1 or B, 1, N, D / 2]`.
    fn composed(x: &Tensor, cos: &Tensor, sin: &Tensor) -> Result<Tensor> {
        let half = x.dim(D::Minus1)? / 2;
        let wide = x.to_dtype(cos.dtype())?;
        let (x1, x2) = (wide.narrow(D::Minus1, 0, half)?, wide.narrow(D::Minus1, half, half)?);
        let y1 = (x1.broadcast_mul(cos)? - x2.broadcast_mul(sin)?)?;
        let y2 = (x2.broadcast_mul(cos)? + x1.broadcast_mul(sin)?)?;
        Tensor::cat(&[y1, y2], D::Minus1)?.to_dtype(x.dtype())
    }

    #[test]
    fn composition_agrees_in_values_and_gradients() -> Result<()> {
        for dtype in [DType::F64, DType::F32, DType::BF16, DType::F16] {
            let wide = if dtype == DType::F64 { DType::F64 } else { DType::F32 };
            let angle = |at: u32| f64::from(at / 8) * 1e4f64.powf(-f64::from(at % 8) / 8.0);
            let table = |f: fn(f64) -> f64| -> Result<Tensor> {
                let table: Vec<f64> = (0..40 * 8).map(|at| f(angle(at))).collect();
                Tensor::from_vec(table, (40, 8), &Device::Cpu)?.to_dtype(wide)
            };
            let (cos, sin) = (table(f64::cos)?, table(f64::sin)?);
            // [1 or B, 1, N, D / 2]
            let rows = |table: &Tensor, offsets: &[usize]| -> Result<Tensor> {
                let rows = offsets.iter().map(|&offset| table.narrow(0, offset, 33)?.unsqueeze(0));
                Tensor::stack(&rows.collect::<Result<Vec<_>>>()?, 0)
            };
            let x = noise(1, &[2, 33, 3, 16], dtype)?;
            for offsets in [&[3][..], &[7, 0]] {
                agree(
                    std::slice::from_ref(&x),
                    |t| Ok(rotary(&t[0].transpose(1, 2)?, &cos, &sin, offsets)?),
                    |t| composed(&t[0].transpose(1, 2)?, &rows(&cos, offsets)?, &rows(&sin, offsets)?),
                )?;
            }
        }
        Ok(())
    }
}
