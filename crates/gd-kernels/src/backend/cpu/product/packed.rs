//! The types whose matrices are multiplied here, and their right factors in the layout of the products.

use half::bf16;

#[cfg(target_arch = "x86_64")]
use super::tiles::Strips;
use super::{MatmulPrecision, Matrix, registers::Panels};
use crate::backend::cpu::element::Real;
use crate::backend::cpu::parallel::par_chunks;

/// Rows of a task.
const TASK_ROWS: usize = 96;

/// A type whose matrices are multiplied here.
pub(crate) trait Multiply: Real + bytemuck::Pod {
    /// A right factor, copied once for products with many blocks of rows.
    type Packed: Send + Sync;

    /// Whether products in the current [`MatmulPrecision`] are those of the elements as they are.
    fn is_exact() -> bool;

    /// Copies a right factor, on all threads; for products in the current [`MatmulPrecision`].
    fn pack(b: Matrix<'_, Self>) -> Self::Packed;

    /// Writes the product of the rows `a` with `b` to `out`, or adds it; on this thread. An element of a product has the same
    /// bits in whichever block its row is.
    fn multiply(a: Matrix<'_, Self>, b: &Self::Packed, out: &mut [Self], add: bool);

    /// Writes the product of `a` with `b`, which has `columns` columns, to `out`, or adds it; on all threads.
    fn multiply_all(a: Matrix<'_, Self>, b: &Self::Packed, out: &mut [Self], add: bool) {
        let columns = out.len() / a.rows.max(1);
        par_chunks(out, TASK_ROWS * columns, &|task, out| {
            let first = task * TASK_ROWS;
            Self::multiply(a.rows(first..first + out.len() / columns), b, out, add);
        });
    }
}

impl Multiply for f64 {
    type Packed = Panels<f64>;

    fn is_exact() -> bool {
        true
    }

    fn pack(b: Matrix<'_, Self>) -> Self::Packed {
        Panels::new(b)
    }

    fn multiply(a: Matrix<'_, Self>, b: &Self::Packed, out: &mut [Self], add: bool) {
        b.multiply(a, out, add);
    }
}

/// A right factor in f32.
#[derive(Debug)]
pub(crate) enum PackedF32 {
    /// As it is.
    F32(Panels<f32>),
    /// Rounded to bf16, for AMX.
    #[cfg(target_arch = "x86_64")]
    Strips(Strips),
    /// Rounded to bf16, for products in f32 of matrices that are rounded: the products are the same as with AMX, and are
    /// added in another order.
    Rounded(Panels<f32>),
}

impl Multiply for f32 {
    type Packed = PackedF32;

    fn is_exact() -> bool {
        MatmulPrecision::current() == MatmulPrecision::F32
    }

    fn pack(b: Matrix<'_, Self>) -> PackedF32 {
        match MatmulPrecision::current() {
            MatmulPrecision::F32 => PackedF32::F32(Panels::new(b)),
            #[cfg(target_arch = "x86_64")]
            MatmulPrecision::Bf16 if crate::backend::cpu::amx::available() => {
                PackedF32::Strips(Strips::new(b))
            }
            MatmulPrecision::Bf16 => rounded_panels(b),
        }
    }

    fn multiply(a: Matrix<'_, Self>, b: &PackedF32, out: &mut [f32], add: bool) {
        match b {
            PackedF32::F32(b) => b.multiply(a, out, add),
            #[cfg(target_arch = "x86_64")]
            PackedF32::Strips(b) => b.multiply(a, out, add),
            PackedF32::Rounded(b) => b.multiply(Matrix { data: &rounded(a.data), ..a }, out, add),
        }
    }
}

fn rounded_panels(b: Matrix<'_, f32>) -> PackedF32 {
    PackedF32::Rounded(Panels::new(Matrix { data: &rounded(b.data), ..b }))
}

fn rounded(data: &[f32]) -> Vec<f32> {
    data.iter().map(|&x| bf16::from_f32(x).to_f32()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::with_matmul_precision;

    /// Against sums in f64 of the rounded elements, for all orders of the dimensions, parts of tiles, strips and blocks.
    #[test]
    fn products_are_those_of_rounded_elements() {
        type Pack = fn(Matrix<'_, f32>) -> PackedF32;
        let implementations: &[Pack] = &[
            rounded_panels,
            #[cfg(target_arch = "x86_64")]
            |b| PackedF32::Strips(Strips::new(b)),
        ];
        let count = if cfg!(target_arch = "x86_64") && !crate::backend::cpu::amx::available() {
            eprintln!("no AMX on this machine; the tile code is not run");
            1
        } else {
            implementations.len()
        };
        let values = |seed: usize, len: usize| -> Vec<f32> {
            (0..len)
                .map(|i| ((i + seed).wrapping_mul(2_654_435_761) >> 9) as u16 as f32 / 32768.0 - 1.0)
                .collect()
        };
        let round = |x: f32| f64::from(bf16::from_f32(x).to_f32());
        for (m, n, k) in [
            (1, 1, 1),
            (33, 31, 1),
            (32, 64, 31),
            (130, 70, 33),
            (97, 33, 560),
            (32, 17, 1100),
            (5, 64, 48),
            (200, 40, 7),
        ] {
            for order in 0..4 {
                let (a, b) = (values(1, (m + 3) * (k + 3)), values(2, (n + 3) * (k + 3)));
                let strides =
                    |rows, columns, transposed| if transposed { (1, rows + 3) } else { (columns + 3, 1) };
                let matrix = |data, rows, columns, transposed| {
                    let (row_stride, column_stride) = strides(rows, columns, transposed);
                    Matrix { data, rows, columns, row_stride, column_stride }
                };
                let (left, right) = (matrix(&a, m, k, order % 2 == 1), matrix(&b, k, n, order / 2 == 1));
                let at = |x: Matrix<'_, f32>, i, j| round(x.data[i * x.row_stride + j * x.column_stride]);
                for (which, pack) in implementations.iter().enumerate().take(count) {
                    // What is there before is replaced, and then added to.
                    let (packed, mut got) = (pack(right), vec![7f32; m * n]);
                    f32::multiply_all(left, &packed, &mut got, false);
                    f32::multiply_all(left, &packed, &mut got, true);
                    for (i, got) in got.iter().enumerate() {
                        let (r, c) = (i / n, i % n);
                        let product: f64 = (0..k).map(|p| at(left, r, p) * at(right, p, c)).sum();
                        let expected = 2.0 * product;
                        let error = (f64::from(*got) - expected).abs();
                        assert!(
                            error < 2e-6 * (k + 1) as f64,
                            "{which}: {m} {n} {k}, order {order}, {r} {c}: {got} {expected}"
                        );
                    }
                }
            }
        }
    }

    /// A NaN or an infinity stays in its row and column, also in the last rows and columns of a tile.
    #[test]
    fn values_that_are_not_finite_stay_in_their_rows() {
        let (m, n, k) = (40, 35, 33);
        let (mut a, b) = (vec![1f32; m * k], vec![1f32; k * n]);
        (a[39 * k + 32], a[2 * k]) = (f32::NAN, f32::INFINITY);
        let a = Matrix { data: &a, rows: m, columns: k, row_stride: k, column_stride: 1 };
        let b = Matrix { data: &b, rows: k, columns: n, row_stride: n, column_stride: 1 };
        let mut out = vec![0f32; m * n];
        with_matmul_precision(MatmulPrecision::Bf16, || f32::multiply_all(a, &f32::pack(b), &mut out, false));
        for (i, x) in out.into_iter().enumerate() {
            match i / n {
                39 => assert!(x.is_nan(), "{i}: {x}"),
                2 => assert_eq!(x, f32::INFINITY, "{i}"),
                _ => assert_eq!(x, k as f32, "{i}"),
            }
        }
    }
}
