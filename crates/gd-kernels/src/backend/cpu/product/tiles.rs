//! Products of f32 matrices that are rounded to bf16, with AMX.

use crate::backend::cpu::amx::bf16::{Lines, STRIP, Side, Sums, TILE_TERMS, Tiles, pack, strip_len};
use crate::backend::cpu::cache_line::AlignedVec;
use crate::backend::cpu::parallel::{par_chunks, vectorize, with_scratch};
use crate::backend::cpu::product::Matrix;

/// Tiles of a strip of the right factor that are used for all rows in turn: they fit the L1 cache.
const BLOCK_STEPS: usize = 16;

/// A right factor `[K, N]`, rounded, in strips of [`STRIP`] columns.
#[derive(Debug)]
pub(crate) struct Strips {
    values: AlignedVec<u16>,
    rows: usize,
    columns: usize,
}

impl Strips {
    /// Copies the factor, on all threads.
    pub(super) fn new(b: Matrix<'_, f32>) -> Self {
        let columns = lines(b.t());
        let strip = strip_len(b.rows);
        let mut values = AlignedVec::zeros(b.columns.div_ceil(STRIP) * strip);
        par_chunks(&mut values, strip, &|i, out| pack(columns, Side::Right, i * STRIP, out));
        Self { values, rows: b.rows, columns: b.columns }
    }

    /// Writes the product of `a`, rounded, with this factor to `out`, or adds it; on this thread.
    pub(super) fn multiply(&self, a: Matrix<'_, f32>, out: &mut [f32], add: bool) {
        if self.rows == 0 && !add {
            out.fill(0.0);
        }
        let strip = strip_len(self.rows);
        let rows = lines(a);
        with_scratch(a.rows.div_ceil(STRIP) * strip, |left| {
            for (i, left) in left.chunks_exact_mut(strip.max(1)).enumerate() {
                pack(rows, Side::Left, i * STRIP, left);
            }
            self.multiply_strips(left, out, add);
        });
    }

    /// Writes the product of packed rows with this factor to `out`, or adds it.
    fn multiply_strips(&self, left: &[u16], out: &mut [f32], add: bool) {
        let (strip, steps) = (strip_len(self.rows), self.rows.div_ceil(TILE_TERMS));
        let (tiles, mut sums) = (Tiles::new(), Sums::ZERO);
        for from in (0..steps).step_by(BLOCK_STEPS) {
            let block = from..steps.min(from + BLOCK_STEPS);
            for (j, right) in self.values.chunks_exact(strip).enumerate() {
                for (left, out) in left.chunks_exact(strip).zip(out.chunks_mut(STRIP * self.columns)) {
                    tiles.multiply(left, right, block.clone(), &mut sums);
                    store(&sums, add || from > 0, out, self.columns, j * STRIP);
                }
            }
        }
    }
}

/// The rows of a matrix as those of a left factor.
fn lines(m: Matrix<'_, f32>) -> Lines<'_> {
    let Matrix { data, rows, columns, row_stride, column_stride } = m;
    Lines { data, lines: rows, terms: columns, line_stride: row_stride, term_stride: column_stride }
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
                    (Some(out), true) => {
                        let mut row = *out;
                        row.iter_mut().zip(sums).for_each(|(x, sum)| *x += sum);
                        *out = row;
                    }
                    (None, false) => out.copy_from_slice(&sums[..columns]),
                    (None, true) => out.iter_mut().zip(sums).for_each(|(out, x)| *out += x),
                }
            }
        },
    );
}
