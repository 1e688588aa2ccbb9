//! The projection of heads.

use candle_core::{DType, Device, Tensor};

use super::Sizes;
use crate::backend::cpu::parallel::{par_chunks, with_scratch};
use crate::backend::cpu::product::{
    BLOCK_ROWS, MatmulPrecision, Matrix, Multiply, TASK_ROWS, with_matmul_precision,
};
use crate::backend::cpu::view::{Rows, with_slices};
use crate::backend::graph::{attach2, with_contiguous_rows};
use crate::backend::span::{Pass, operator_span};
use crate::error::Result;

/// The name of the operator in candle's graph.
const NAME: &str = "project_from_heads";

/// [`crate::project_from_heads`] for validated tensors of one dtype.
pub(crate) fn project_from_heads(y: &Tensor, weight: &Tensor) -> Result<Tensor> {
    let y = with_contiguous_rows(y)?;
    Ok(match y.dtype() {
        DType::F64 => fused::<f64>(&y, weight)?,
        _ => fused::<f32>(&y, weight)?,
    })
}

fn fused<T: Multiply>(y: &Tensor, weight: &Tensor) -> candle_core::Result<Tensor> {
    let span = operator_span(NAME, Pass::Forward);
    let precision = MatmulPrecision::current();
    let (batch, heads, rows, head_dim) = y.dims4()?;
    let sizes = Sizes { batch, heads, rows, head_dim };
    let outputs = weight.dim(0)?;
    let out = {
        let (storage, layout) = y.storage_and_layout();
        let y = Rows::<T>::new(&storage, layout)?;
        with_slices::<T, _, _>([weight], |[weight]| {
            forward(sizes, &y, Matrix::of_rows(weight, sizes.width()))
        })?
    };
    drop(span);
    attach2(NAME, y, weight, (out, (batch, rows, outputs).into()), move |y, weight, dy| {
        let is_trained = weight.track_op();
        let (dheads, dweight) = {
            let (storage, layout) = y.storage_and_layout();
            let y = Rows::<T>::new(&storage, layout)?;
            with_slices::<T, _, _>([weight, dy], |[weight, dy]| {
                let (weight, dy) = (Matrix::of_rows(weight, sizes.width()), Matrix::of_rows(dy, outputs));
                with_matmul_precision(precision, || backward(sizes, &y, weight, dy, is_trained))
            })?
        };
        let dweight = dweight.map(|values| Tensor::from_vec(values, weight.shape(), &Device::Cpu));
        Ok([Some(Tensor::from_vec(dheads, y.shape(), &Device::Cpu)?), dweight.transpose()?])
    })
}

/// Copies rows of `[B N, H D]` from `first` on.
fn side_by_side<T: Multiply>(sizes: Sizes, y: &Rows<'_, T>, first: usize, out: &mut [T]) {
    for (n, out) in out.chunks_exact_mut(sizes.width()).enumerate() {
        for (h, out) in out.chunks_exact_mut(sizes.head_dim).enumerate() {
            out.copy_from_slice(y.row(sizes.row(first + n, h)));
        }
    }
}

fn forward<T: Multiply>(sizes: Sizes, y: &Rows<'_, T>, weight: Matrix<'_, T>) -> Vec<T> {
    let packed = T::pack(weight.t());
    let outputs = weight.row_count();
    let mut out = vec![T::zero(); sizes.batch * sizes.rows * outputs];
    par_chunks(&mut out, TASK_ROWS * outputs, &|task, out| {
        with_scratch(out.len() / outputs * sizes.width(), |rows| {
            side_by_side(sizes, y, task * TASK_ROWS, rows);
            T::multiply(Matrix::of_rows(rows, sizes.width()), &packed, out, false);
        });
    });
    out
}

/// The gradients of the heads `[B, H, N, D]` and, where it is trained, of the weight.
fn backward<T: Multiply>(
    sizes: Sizes,
    y: &Rows<'_, T>,
    weight: Matrix<'_, T>,
    dy: Matrix<'_, T>,
    is_trained: bool,
) -> (Vec<T>, Option<Vec<T>>) {
    let (width, d) = (sizes.width(), sizes.head_dim);
    let packed = T::pack(weight);
    let mut dheads = vec![T::zero(); sizes.len()];
    sizes.for_head_rows(&mut dheads, &|(b, first, mut heads)| {
        let (rows, m) = (heads[0].len() / d, b * sizes.rows + first);
        with_scratch(rows * width, |drows| {
            T::multiply(dy.rows(m..m + rows), &packed, drows, false);
            for (n, drow) in drows.chunks_exact(width).enumerate() {
                for (drow, head) in drow.chunks_exact(d).zip(&mut heads) {
                    head[n * d..][..d].copy_from_slice(drow);
                }
            }
        });
    });
    if !is_trained {
        return (dheads, None);
    }
    let all = sizes.batch * sizes.rows;
    let mut dweight = vec![T::zero(); weight.row_count() * width];
    let mut rows = vec![T::zero(); BLOCK_ROWS.min(all) * width];
    for first in (0..all).step_by(BLOCK_ROWS) {
        let count = BLOCK_ROWS.min(all - first);
        let rows = &mut rows[..count * width];
        par_chunks(rows, TASK_ROWS * width, &|task, rows| {
            side_by_side(sizes, y, first + task * TASK_ROWS, rows);
        });
        let dy = dy.rows(first..first + count);
        T::multiply_all(dy.t(), &T::pack(Matrix::of_rows(rows, width)), &mut dweight, true);
    }
    (dheads, Some(dweight))
}
