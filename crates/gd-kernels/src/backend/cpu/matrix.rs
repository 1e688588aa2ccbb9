//! Products of small matrices in slices, on the calling thread.
#![allow(unsafe_code)]

use gemm::{Parallelism, gemm};

use crate::backend::cpu::element::Real;

/// A matrix in a slice, with an arbitrary distance between its rows or between its columns.
#[derive(Clone, Copy)]
pub(crate) struct Matrix<'a, T> {
    data: &'a [T],
    rows: usize,
    columns: usize,
    row_stride: usize,
    column_stride: usize,
}

impl<'a, T> Matrix<'a, T> {
    /// The matrix whose row `r` starts at `r * row_stride`.
    ///
    /// # Panics
    /// If the slice is too short, or rows overlap.
    pub(crate) fn new(data: &'a [T], rows: usize, columns: usize, row_stride: usize) -> Self {
        assert!(columns <= row_stride || rows <= 1);
        assert!(rows == 0 || (rows - 1) * row_stride + columns <= data.len());
        Self { data, rows, columns, row_stride, column_stride: 1 }
    }

    /// The transpose.
    pub(crate) fn t(self) -> Self {
        Self {
            rows: self.columns,
            columns: self.rows,
            row_stride: self.column_stride,
            column_stride: self.row_stride,
            ..self
        }
    }
}

/// Writes `scale a b` to `out`, whose rows are `row_stride` elements apart, or adds it if `add` is set.
///
/// # Panics
/// If the sizes do not agree, or `out` is too short.
pub(crate) fn multiply<T: Real + 'static>(
    out: &mut [T],
    row_stride: usize,
    add: bool,
    scale: T,
    a: Matrix<'_, T>,
    b: Matrix<'_, T>,
) {
    let (m, n, k) = (a.rows, b.columns, a.columns);
    assert_eq!(k, b.rows, "inner sizes of a matrix product");
    if m == 0 || n == 0 {
        return;
    }
    assert!(n <= row_stride && (m - 1) * row_stride + n <= out.len());
    let stride = |n: usize| n as isize;
    // SAFETY: the constructor of `Matrix` and the assertion above bound all elements by the slices. `T` is f32 or f64,
    // the types that implement `Real`.
    unsafe {
        gemm(
            m,
            n,
            k,
            out.as_mut_ptr(),
            1,
            stride(row_stride),
            add,
            a.data.as_ptr(),
            stride(a.column_stride),
            stride(a.row_stride),
            b.data.as_ptr(),
            stride(b.column_stride),
            stride(b.row_stride),
            T::one(),
            scale,
            false,
            false,
            false,
            Parallelism::None,
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn products_of_parts_of_slices_match_their_definition() {
        let value = |i: usize| ((i * 37 % 101) as f64 - 50.0) / 16.0;
        let a: Vec<f64> = (0..200).map(value).collect();
        let b: Vec<f64> = (0..300).map(|i| value(i + 7)).collect();
        for (m, n, k) in [(1, 1, 1), (1, 9, 5), (7, 1, 3), (5, 6, 11), (3, 4, 0), (0, 2, 2)] {
            let (sa, sb) = (k + 2, n + 3);
            for transposed in [false, true] {
                // b as k x n, or as the transpose of n x k.
                let right = match transposed {
                    false => Matrix::new(&b, k, n, sb),
                    true => Matrix::new(&b, n, k, k + 1).t(),
                };
                let at = |i: usize, j: usize| if transposed { b[j * (k + 1) + i] } else { b[i * sb + j] };
                for add in [false, true] {
                    let mut out = vec![1.5; 200];
                    multiply(&mut out, n + 1, add, 2.0, Matrix::new(&a, m, k, sa), right);
                    for (i, &got) in out.iter().enumerate() {
                        let (r, c) = (i / (n + 1), i % (n + 1));
                        let product: f64 = (0..k).map(|x| a[r.min(9) * sa + x] * at(x, c.min(n - 1))).sum();
                        let expected = match (r < m && c < n, add) {
                            (false, _) => 1.5,
                            (true, false) => 2.0 * product,
                            (true, true) => 1.5 + 2.0 * product,
                        };
                        assert!((got - expected).abs() < 1e-12, "{m} {n} {k}, {r} {c}: {got} {expected}");
                    }
                }
            }
        }
    }
}
