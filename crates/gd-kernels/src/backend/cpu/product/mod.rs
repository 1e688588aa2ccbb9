//! The product of two large matrices, on all threads: in f32 and f64 with the same bits for every instruction set and
//! number of threads, or of f32 matrices rounded to bf16.

mod columns;
mod packed;
mod precision;
mod registers;
#[cfg(target_arch = "x86_64")]
mod tiles;

pub(crate) use columns::multiply_by_columns;
pub(crate) use packed::Multiply;
pub use precision::{MatmulPrecision, with_matmul_precision};
pub(crate) use registers::{PANEL, pack};

use candle_core::{DType, Device, Layout, Tensor};

use crate::backend::cpu::view::cpu_slice;
use crate::backend::dispatch::on_cpu;

/// With fewer rows, copying the right factor would take too large a part of the time.
const MIN_ROWS: usize = 32;

/// Rows of a task of an operator that computes several products with the same rows.
pub(crate) const TASK_ROWS: usize = 64;
/// Rows whose part of the gradients of the parameters such an operator computes at once, a multiple of the rows of a task.
pub(crate) const BLOCK_ROWS: usize = 512;

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

/// The elements of `a b` for `a: [M, K]` and `b: [K, N]` of type `T` on the CPU, of any strides; in f32 in the current
/// [`MatmulPrecision`].
///
/// # Errors
/// Another dtype, rank or device.
pub(crate) fn product_values<T: Multiply>(a: &Tensor, b: &Tensor) -> candle_core::Result<Vec<T>> {
    let (a, b) = (with_contiguous_dimension(a)?, with_contiguous_dimension(b)?);
    let ((a_storage, a_layout), (b_storage, b_layout)) = (a.storage_and_layout(), b.storage_and_layout());
    let left = Matrix::new(cpu_slice::<T>(&a_storage)?, a_layout);
    let right = Matrix::new(cpu_slice::<T>(&b_storage)?, b_layout);
    if left.column_stride == 1 && T::is_exact() {
        return Ok(multiply_by_columns(left, right.columns, &|i, panel| pack(right, i * PANEL, panel)));
    }
    let mut out = vec![T::zero(); left.rows * right.columns];
    T::multiply_all(left, &T::pack(right), &mut out, false);
    Ok(out)
}

/// A matrix with one contiguous dimension.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Matrix<'a, T> {
    data: &'a [T],
    rows: usize,
    columns: usize,
    row_stride: usize,
    column_stride: usize,
}

impl<'a, T> Matrix<'a, T> {
    /// The matrix with this layout in a storage.
    pub(crate) fn new(storage: &'a [T], layout: &Layout) -> Self {
        let (dims, strides) = (layout.dims(), layout.stride());
        let (rows, columns, row_stride, column_stride) = (dims[0], dims[1], strides[0], strides[1]);
        let data = &storage[layout.start_offset()..];
        Self { data, rows, columns, row_stride, column_stride }.trimmed()
    }

    /// Without the elements behind the last one.
    fn trimmed(self) -> Self {
        let len = match self.rows * self.columns {
            0 => 0,
            _ => (self.rows - 1) * self.row_stride + (self.columns - 1) * self.column_stride + 1,
        };
        Self { data: &self.data[..len], ..self }
    }

    /// The contiguous rows of `columns` elements.
    pub(crate) fn of_rows(data: &'a [T], columns: usize) -> Self {
        let rows = data.len() / columns.max(1);
        Self { data, rows, columns, row_stride: columns, column_stride: 1 }
    }

    /// The transpose.
    pub(crate) fn t(self) -> Self {
        let Self { data, rows, columns, row_stride, column_stride } = self;
        Self { data, rows: columns, columns: rows, row_stride: column_stride, column_stride: row_stride }
    }

    /// The number of rows.
    pub(crate) fn row_count(&self) -> usize {
        self.rows
    }

    /// Some of the rows.
    pub(crate) fn rows(self, range: std::ops::Range<usize>) -> Self {
        Self { data: &self.data[range.start * self.row_stride..], rows: range.len(), ..self }.trimmed()
    }
}

/// `t` itself if its rows or its columns are contiguous and do not overlap, or else a contiguous copy.
fn with_contiguous_dimension(t: &Tensor) -> candle_core::Result<Tensor> {
    let ((rows, columns), strides) = (t.dims2()?, t.stride());
    let by_rows = strides[1] == 1 && strides[0] >= columns;
    let by_columns = strides[0] == 1 && strides[1] >= rows;
    if by_rows || by_columns { Ok(t.clone()) } else { t.contiguous() }
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
