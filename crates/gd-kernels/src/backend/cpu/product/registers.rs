//! Products by register tiles, with the bits of a chain of fused multiply-adds over blocks of [`DEPTH`] terms for each
//! element of the result.

use crate::backend::cpu::element::Real;
use crate::backend::cpu::matrix::{Left, Padded, multiply, padded};
use crate::backend::cpu::parallel::par_chunks;
use crate::backend::cpu::product::Matrix;

/// Columns of a panel: four registers of 16 numbers.
const PANEL: usize = 64;
/// Terms that are added in registers. A panel of so many rows fits the L2 cache.
const DEPTH: usize = 512;
/// Rows of a task, a multiple of the rows of a register tile.
const TASK_ROWS: usize = 96;

/// The elements of `a b`.
pub(super) fn multiplied<T: Real>(a: Matrix<'_, T>, b: Matrix<'_, T>) -> Vec<T> {
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
