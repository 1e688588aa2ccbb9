//! Products in which a task computes some columns of the result.

use super::Matrix;
use super::packed::Multiply;
use super::registers::{PANEL, multiply_panels};
use crate::backend::cpu::matrix::padded;
use crate::backend::cpu::parallel::{column_tasks, par_items, with_scratch};

/// Rows of the left factor that are multiplied by a panel at a time.
const BLOCK_ROWS: usize = 96;

/// The product of `a` `[M, K]`, whose rows are contiguous, with a right factor of `columns` columns, on all threads.
///
/// `pack(i, panel)` writes the columns of the right factor from `i PANEL` on to `panel` `[K][PANEL]`; what it writes behind the
/// last column does not matter. A task packs one panel, which stays in its cache, and multiplies all rows by it: the factor is
/// not copied to memory, and few rows are work for all threads, too.
pub(crate) fn multiply_by_columns<T: Multiply>(
    a: Matrix<'_, T>,
    columns: usize,
    pack: &(dyn Fn(usize, &mut [T]) + Sync),
) -> Vec<T> {
    let mut y = vec![T::zero(); a.rows * columns];
    let tasks = column_tasks(&mut y, columns, PANEL);
    par_items(tasks, &|i, mut out| {
        let width = padded(out.first().map_or(0, |row| row.len()));
        with_scratch(a.columns * PANEL + BLOCK_ROWS * width, |scratch| {
            let (panel, part) = scratch.split_at_mut(a.columns * PANEL);
            pack(i, panel);
            for (block, out) in out.chunks_mut(BLOCK_ROWS).enumerate() {
                let (first, part) = (block * BLOCK_ROWS, &mut part[..out.len() * width]);
                multiply_panels(a.rows(first..first + out.len()), (panel, width), part, false);
                for (out, part) in out.iter_mut().zip(part.chunks_exact(width)) {
                    out.copy_from_slice(&part[..out.len()]);
                }
            }
        });
    });
    y
}
