//! The product of two large matrices, on all threads.
//!
//! The right factor is copied into panels of [`PANEL`] columns, so that a register tile reads it in order. Each element of
//! the result is a chain of fused multiply-adds over blocks of [`DEPTH`] terms, so that the result depends neither on the
//! number of threads nor on the instruction set.

use candle_core::{DType, Device, Layout, Tensor};

use crate::backend::cpu::element::Real;
use crate::backend::cpu::matrix::{Left, Padded, multiply, padded};
use crate::backend::cpu::parallel::par_chunks;
use crate::backend::cpu::view::cpu_slice;
use crate::backend::dispatch::on_cpu;

/// Columns of a panel: four registers of 16 numbers.
const PANEL: usize = 64;
/// Terms that are added in registers. A panel of so many rows fits the L2 cache.
const DEPTH: usize = 512;
/// Rows of a task, a multiple of the rows of a register tile.
const TASK_ROWS: usize = 96;
/// With fewer rows, copying the right factor would take too large a part of the time.
const MIN_ROWS: usize = 32;

/// Whether products with so many rows of this dtype are computed here.
pub(crate) fn computes(rows: usize, dtype: DType, device: &Device) -> bool {
    rows >= MIN_ROWS && matches!(dtype, DType::F32 | DType::F64) && on_cpu(device)
}

/// `a b` for `a: [M, K]` and `b: [K, N]` of one dtype and any strides, without a graph: computed here if [`computes`] says
/// so, else by candle.
///
/// # Errors
/// As candle's matrix product.
pub(crate) fn product(a: &Tensor, b: &Tensor) -> candle_core::Result<Tensor> {
    let (a, b) = (a.detach(), b.detach());
    let fits = a.rank() == 2 && b.rank() == 2 && a.dim(1)? == b.dim(0)? && a.dtype() == b.dtype();
    if !fits || !computes(a.dim(0)?, a.dtype(), a.device()) {
        return a.matmul(&b);
    }
    let shape = (a.dim(0)?, b.dim(1)?);
    match a.dtype() {
        DType::F64 => Tensor::from_vec(product_values::<f64>(&a, &b)?, shape, &Device::Cpu),
        _ => Tensor::from_vec(product_values::<f32>(&a, &b)?, shape, &Device::Cpu),
    }
}

/// The elements of `a b` for `a: [M, K]` and `b: [K, N]` of type `T` on the CPU, of any strides.
///
/// # Errors
/// Another dtype, rank or device.
pub(crate) fn product_values<T: Real>(a: &Tensor, b: &Tensor) -> candle_core::Result<Vec<T>> {
    let (a, b) = (with_contiguous_dimension(a)?, with_contiguous_dimension(b)?);
    let ((a_storage, a_layout), (b_storage, b_layout)) = (a.storage_and_layout(), b.storage_and_layout());
    let matrix = |data, layout: &Layout| {
        let (dims, strides) = (layout.dims(), layout.stride());
        let (rows, columns, row_stride, column_stride) = (dims[0], dims[1], strides[0], strides[1]);
        Matrix { data, rows, columns, row_stride, column_stride }
    };
    let left = matrix(&cpu_slice::<T>(&a_storage)?[a_layout.start_offset()..], a_layout);
    let right = matrix(&cpu_slice::<T>(&b_storage)?[b_layout.start_offset()..], b_layout);
    Ok(multiplied(left, right))
}

/// A matrix with one contiguous dimension.
#[derive(Clone, Copy)]
struct Matrix<'a, T> {
    data: &'a [T],
    rows: usize,
    columns: usize,
    row_stride: usize,
    column_stride: usize,
}

/// `t` itself if its rows or its columns are contiguous and do not overlap, or else a contiguous copy.
fn with_contiguous_dimension(t: &Tensor) -> candle_core::Result<Tensor> {
    let ((rows, columns), strides) = (t.dims2()?, t.stride());
    let by_rows = strides[1] == 1 && strides[0] >= columns;
    let by_columns = strides[0] == 1 && strides[1] >= rows;
    if by_rows || by_columns { Ok(t.clone()) } else { t.contiguous() }
}

fn multiplied<T: Real>(a: Matrix<'_, T>, b: Matrix<'_, T>) -> Vec<T> {
    let (m, n, k) = (a.rows, b.columns, a.columns);
    let panels = n.div_ceil(PANEL);
    let mut right = vec![T::zero(); panels * k * PANEL];
    par_chunks(&mut right, k * PANEL, &|panel, out| pack(b, panel * PANEL, out));
    let mut out = vec![T::zero(); m * n];
    if out.is_empty() {
        return out;
    }
    par_chunks(&mut out, TASK_ROWS * n, &|task, out| {
        let rows = out.len() / n;
        let first = task * TASK_ROWS;
        let (mut left, mut edge) = (Vec::new(), vec![T::zero(); rows * PANEL]);
        for from in (0..k).step_by(DEPTH) {
            let depth = DEPTH.min(k - from);
            let left = part(a, first..first + rows, from..from + depth, &mut left);
            for panel in 0..panels {
                let data = &right[(panel * k + from) * PANEL..][..depth * PANEL];
                let (right, column) = (Padded { data, stride: PANEL }, panel * PANEL);
                let columns = PANEL.min(n - column);
                if padded(columns) == columns {
                    let out = Padded { data: &mut out[column..], stride: n };
                    multiply(out, columns, from > 0, T::one(), left, right);
                    continue;
                }
                // The last columns do not fill a register.
                multiply(
                    Padded { data: &mut edge[..], stride: PANEL },
                    columns,
                    false,
                    T::one(),
                    left,
                    right,
                );
                for (out, edge) in out.chunks_exact_mut(n).zip(edge.chunks_exact(PANEL)) {
                    out[column..].iter_mut().zip(edge).for_each(|(out, &x)| *out += x);
                }
            }
        }
    });
    out
}

/// Copies the columns of `b` from `first` on into a panel; those beyond the last one stay as they are.
fn pack<T: Real>(b: Matrix<'_, T>, first: usize, out: &mut [T]) {
    /// Rows that are copied together, so that columns are read and the panel is written by whole cache lines.
    const ROWS: usize = 16;
    let columns = PANEL.min(b.columns - first);
    if b.column_stride == 1 {
        for (p, out) in out.chunks_exact_mut(PANEL).enumerate() {
            out[..columns].copy_from_slice(&b.data[p * b.row_stride + first..][..columns]);
        }
        return;
    }
    for (i, out) in out.chunks_mut(ROWS * PANEL).enumerate() {
        let rows = out.len() / PANEL;
        for c in 0..columns {
            let column = &b.data[(first + c) * b.column_stride + i * ROWS..][..rows];
            out[c..].iter_mut().step_by(PANEL).zip(column).for_each(|(out, &x)| *out = x);
        }
    }
}

/// A part of the left factor. If its columns are contiguous, they are copied, so that a tile reads them in order.
fn part<'a, T: Real>(
    a: Matrix<'a, T>,
    rows: std::ops::Range<usize>,
    columns: std::ops::Range<usize>,
    buffer: &'a mut Vec<T>,
) -> Left<'a, T> {
    if a.column_stride == 1 {
        let data = &a.data[rows.start * a.row_stride + columns.start..];
        return Left::new(data, rows.len(), columns.len(), a.row_stride.max(columns.len()));
    }
    buffer.clear();
    buffer.resize(columns.len() * TASK_ROWS, T::zero());
    for (out, p) in buffer.chunks_exact_mut(TASK_ROWS).zip(columns.clone()) {
        out[..rows.len()].copy_from_slice(&a.data[p * a.column_stride + rows.start..][..rows.len()]);
    }
    Left::transposed(buffer, columns.len(), rows.len(), TASK_ROWS)
}

#[cfg(test)]
mod tests {
    use candle_core::Result;

    use super::*;
    use crate::ops::agreement::noise;

    /// Against candle's product, for all orders of the dimensions, parts of blocks and edges.
    #[test]
    fn products_are_those_of_candle() -> Result<()> {
        for (m, n, k) in
            [(32, 64, 16), (97, 70, 5), (200, 1, 33), (33, 130, 1100), (101, 48, 513), (96, 31, 1)]
        {
            for (dtype, bound) in [(DType::F64, 1e-12), (DType::F32, 2e-5)] {
                for transposed in 0..4 {
                    let (a, b) = match transposed {
                        0 => (noise(1, &[m, k], dtype)?, noise(2, &[k, n], dtype)?),
                        1 => (noise(1, &[k, m], dtype)?.t()?, noise(2, &[k, n], dtype)?),
                        2 => (noise(1, &[m, k], dtype)?, noise(2, &[n, k], dtype)?.t()?),
                        _ => (
                            noise(1, &[k, m + 3], dtype)?.narrow(1, 2, m)?.t()?,
                            noise(2, &[n + 1, k], dtype)?.narrow(0, 1, n)?.t()?,
                        ),
                    };
                    let expected = a.contiguous()?.matmul(&b.contiguous()?)?;
                    let scale = (k as f64).sqrt();
                    let worst = (product(&a, &b)? - expected)?.abs()?.max_all()?.to_dtype(DType::F64)?;
                    let worst = worst.to_scalar::<f64>()?;
                    assert!(worst <= bound * scale, "{m} {n} {k} {dtype:?} {transposed}: {worst}");
                }
            }
        }
        Ok(())
    }
}
