//! Products by register tiles: each element of the result is a chain of fused multiply-adds over blocks of [`DEPTH`] terms,
//! so that its bits depend neither on the number of threads nor on the instruction set.

use crate::backend::cpu::element::Real;
use crate::backend::cpu::matrix::{Left, Padded, multiply, padded};
use crate::backend::cpu::parallel::par_chunks;
use crate::backend::cpu::product::Matrix;

/// Columns of a panel: four registers of 16 numbers.
pub(crate) const PANEL: usize = 64;
/// Terms that are added in registers. A panel of so many rows fits the L2 cache.
const DEPTH: usize = 512;

/// A right factor `[K, N]` in panels of [`PANEL`] columns, so that a register tile reads it in order.
#[derive(Debug)]
pub(crate) struct Panels<T> {
    /// `[N / PANEL][K][PANEL]`.
    values: Vec<T>,
    columns: usize,
}

impl<T: Real> Panels<T> {
    /// Copies the factor, on all threads.
    pub(super) fn new(b: Matrix<'_, T>) -> Self {
        let mut values = vec![T::zero(); b.columns.div_ceil(PANEL) * b.rows * PANEL];
        par_chunks(&mut values, b.rows * PANEL, &|panel, out| pack(b, panel * PANEL, out));
        Self { values, columns: b.columns }
    }

    /// Writes the product of `a` with this factor to `out`, or adds it; on this thread.
    pub(super) fn multiply(&self, a: Matrix<'_, T>, out: &mut [T], add: bool) {
        multiply_panels(a, (&self.values, self.columns), out, add);
    }
}

/// Writes the product of `a` with the panels `[N / PANEL][K][PANEL]` of a right factor of `n` columns to `out`, or adds it; on
/// this thread.
pub(super) fn multiply_panels<T: Real>(
    a: Matrix<'_, T>,
    (panels, n): (&[T], usize),
    out: &mut [T],
    add: bool,
) {
    let k = a.columns;
    let (mut left, mut edge) = (Vec::new(), Vec::new());
    if k == 0 && !add {
        out.fill(T::zero());
    }
    for from in (0..k).step_by(DEPTH) {
        let depth = DEPTH.min(k - from);
        let left = part(a, from..from + depth, &mut left);
        let add = add || from > 0;
        for (panel, data) in panels.chunks_exact(k * PANEL).enumerate() {
            let right = Padded { data: &data[from * PANEL..][..depth * PANEL], stride: PANEL };
            let column = panel * PANEL;
            let columns = PANEL.min(n - column);
            if padded(columns) == columns {
                let out = Padded { data: &mut out[column..], stride: n };
                multiply(out, columns, add, T::one(), left, right);
                continue;
            }
            // The last columns do not fill a register.
            edge.resize(a.rows * PANEL, T::zero());
            let padded_edge = Padded { data: &mut edge[..], stride: PANEL };
            multiply(padded_edge, columns, false, T::one(), left, right);
            for (out, edge) in out.chunks_exact_mut(n).zip(edge.chunks_exact(PANEL)) {
                for (out, &x) in out[column..].iter_mut().zip(edge) {
                    *out = if add { *out + x } else { x };
                }
            }
        }
    }
}

/// Copies the columns of `b` from `first` on into a panel; those beyond the last one stay as they are.
pub(crate) fn pack<T: Real>(b: Matrix<'_, T>, first: usize, out: &mut [T]) {
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

/// Columns of the left factor. If the elements of a column are contiguous, they are copied, so that a tile reads them in order.
fn part<'a, T: Real>(
    a: Matrix<'a, T>,
    columns: std::ops::Range<usize>,
    buffer: &'a mut Vec<T>,
) -> Left<'a, T> {
    if a.column_stride == 1 {
        let stride = a.row_stride.max(columns.len());
        return Left::new(&a.data[columns.start..], a.rows, columns.len(), stride);
    }
    // A register tile reads at least as many rows as it has.
    let stride = a.rows.next_multiple_of(PANEL);
    buffer.clear();
    buffer.resize(columns.len() * stride, T::zero());
    for (out, p) in buffer.chunks_exact_mut(stride).zip(columns.clone()) {
        out[..a.rows].copy_from_slice(&a.data[p * a.column_stride..][..a.rows]);
    }
    Left::transposed(buffer, columns.len(), a.rows, stride)
}
