//! Products of f32 matrices that are rounded to bf16, with sums in f32: by AMX where the processor has it. Elsewhere the
//! rounded matrices are multiplied in f32, which gives the same products but adds them in another order.

use half::bf16;

use crate::backend::cpu::parallel::par_chunks;
use crate::backend::cpu::product::{Matrix, registers};

/// The elements of `a b`, both rounded.
pub(super) fn multiplied(a: Matrix<'_, f32>, b: Matrix<'_, f32>) -> Vec<f32> {
    #[cfg(target_arch = "x86_64")]
    if crate::backend::cpu::amx::available() {
        return tiles::multiplied(a, b);
    }
    in_f32(a, b)
}

/// As [`multiplied`], on any machine.
fn in_f32(a: Matrix<'_, f32>, b: Matrix<'_, f32>) -> Vec<f32> {
    let (a_values, b_values) = (rounded(a.data), rounded(b.data));
    registers::multiplied(Matrix { data: &a_values, ..a }, Matrix { data: &b_values, ..b })
}

fn rounded(data: &[f32]) -> Vec<f32> {
    /// Elements of a task.
    const CHUNK: usize = 1 << 15;
    let mut out = data.to_vec();
    par_chunks(&mut out, CHUNK, &|_, out| out.iter_mut().for_each(|x| *x = bf16::from_f32(*x).to_f32()));
    out
}

#[cfg(target_arch = "x86_64")]
mod tiles {
    use crate::backend::cpu::aligned::AlignedVec;
    use crate::backend::cpu::amx::bf16::{Lines, STRIP, Side, Sums, TILE_TERMS, Tiles, pack, strip_len};
    use crate::backend::cpu::parallel::{par_chunks, vectorize};
    use crate::backend::cpu::product::Matrix;

    /// Rows of a task.
    const TASK_ROWS: usize = 4 * STRIP;
    /// Tiles of a strip of the right factor that are used for all rows of a task in turn: they fit the L1 cache.
    const BLOCK_STEPS: usize = 16;

    pub(super) fn multiplied(a: Matrix<'_, f32>, b: Matrix<'_, f32>) -> Vec<f32> {
        let (m, n, k) = (a.rows, b.columns, a.columns);
        let mut out = vec![0f32; m * n];
        if out.is_empty() || k == 0 {
            return out;
        }
        let (rows, columns) = (
            Lines {
                data: a.data,
                lines: m,
                terms: k,
                line_stride: a.row_stride,
                term_stride: a.column_stride,
            },
            Lines {
                data: b.data,
                lines: n,
                terms: k,
                line_stride: b.column_stride,
                term_stride: b.row_stride,
            },
        );
        let strip = strip_len(k);
        let mut right = AlignedVec::zeros(n.div_ceil(STRIP) * strip);
        par_chunks(&mut right, strip, &|i, out| pack(columns, Side::Right, i * STRIP, out));
        par_chunks(&mut out, TASK_ROWS * n, &|task, out| {
            let strips = (out.len() / n).div_ceil(STRIP);
            let mut left = AlignedVec::zeros(strips * strip);
            for (i, left) in left.chunks_exact_mut(strip).enumerate() {
                pack(rows, Side::Left, task * TASK_ROWS + i * STRIP, left);
            }
            multiply_strips(&left, &right, k, out, n);
        });
        out
    }

    /// The product of some strips of the left factor with all strips of the right one.
    fn multiply_strips(left: &[u16], right: &[u16], k: usize, out: &mut [f32], n: usize) {
        let tiles = Tiles::new();
        let (strip, steps) = (strip_len(k), k.div_ceil(TILE_TERMS));
        let mut sums = Sums::ZERO;
        for from in (0..steps).step_by(BLOCK_STEPS) {
            let block = from..steps.min(from + BLOCK_STEPS);
            for (j, right) in right.chunks_exact(strip).enumerate() {
                for (left, out) in left.chunks_exact(strip).zip(out.chunks_mut(STRIP * n)) {
                    tiles.multiply(left, right, block.clone(), &mut sums);
                    store(&sums, from > 0, out, n, j * STRIP);
                }
            }
        }
    }

    /// Writes sums to rows of `n` elements from column `first` on, as far as there are rows and columns; adds them if `add` is
    /// set.
    fn store(sums: &Sums, add: bool, out: &mut [f32], n: usize, first: usize) {
        vectorize(
            #[inline(always)]
            || {
                for (out, sums) in out.chunks_exact_mut(n).zip(&sums.0) {
                    let out = &mut out[first..];
                    let columns = out.len().min(STRIP);
                    match (out.first_chunk_mut::<STRIP>(), add) {
                        (Some(out), false) => *out = *sums,
                        (Some(out), true) => out.iter_mut().zip(sums).for_each(|(out, x)| *out += x),
                        (None, false) => out.copy_from_slice(&sums[..columns]),
                        (None, true) => out.iter_mut().zip(sums).for_each(|(out, x)| *out += x),
                    }
                }
            },
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Against sums in f64 of the rounded elements, for all orders of the dimensions, parts of tiles, strips and blocks.
    #[test]
    fn products_are_those_of_rounded_elements() {
        let implementations: &[fn(Matrix<'_, f32>, Matrix<'_, f32>) -> Vec<f32>] = &[
            in_f32,
            #[cfg(target_arch = "x86_64")]
            tiles::multiplied,
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
        for (m, n, k) in
            [(1, 1, 1), (33, 31, 1), (32, 64, 31), (130, 70, 33), (97, 33, 560), (32, 17, 1100), (5, 64, 48)]
        {
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
                for (which, multiplied) in implementations.iter().enumerate().take(count) {
                    let got = multiplied(left, right);
                    assert_eq!(got.len(), m * n);
                    for (i, got) in got.iter().enumerate() {
                        let (r, c) = (i / n, i % n);
                        let expected: f64 = (0..k).map(|p| at(left, r, p) * at(right, p, c)).sum();
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
    fn values_that_are_not_finite_are_kept() {
        let (m, n, k) = (40, 35, 33);
        let (mut a, b) = (vec![1f32; m * k], vec![1f32; k * n]);
        (a[39 * k + 32], a[2 * k]) = (f32::NAN, f32::INFINITY);
        let a = Matrix { data: &a, rows: m, columns: k, row_stride: k, column_stride: 1 };
        let b = Matrix { data: &b, rows: k, columns: n, row_stride: n, column_stride: 1 };
        for (i, x) in multiplied(a, b).into_iter().enumerate() {
            match i / n {
                39 => assert!(x.is_nan(), "{i}: {x}"),
                2 => assert_eq!(x, f32::INFINITY, "{i}"),
                _ => assert_eq!(x, k as f32, "{i}"),
            }
        }
    }
}
