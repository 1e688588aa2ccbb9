//! The products on the CPU.

mod lanes;
mod tile;
#[cfg(target_arch = "x86_64")]
mod x86;

use super::blocks::GROUP;
use super::matrix::{QuantizedMatrix, TILE};
use super::rows::Rows16;
use crate::backend::cpu::isa::Isa;
use crate::backend::cpu::parallel::par_chunks;

/// Weights of a task.
const TASK_WEIGHTS: usize = 1 << 16;
/// Products below which the work stays on the calling thread.
const MIN_PARALLEL_PRODUCTS: usize = 1 << 17;

/// y `[rows, outputs]`; every weight is read once.
pub(super) fn multiply(rows: &Rows16, weight: &QuantizedMatrix) -> Vec<f32> {
    multiply_by(tile::kernel(), rows, weight)
}

/// The same by a given kernel.
fn multiply_by(kernel: tile::Kernel, rows: &Rows16, weight: &QuantizedMatrix) -> Vec<f32> {
    let ([outputs, inputs], count) = (weight.dims(), rows.count);
    // Transposed, so that the results of a tile are contiguous.
    let mut transposed = vec![0f32; outputs * count];
    if transposed.is_empty() {
        return transposed;
    }
    let tiles_per_task = match outputs * inputs * count < MIN_PARALLEL_PRODUCTS {
        true => outputs,
        false => (TASK_WEIGHTS / (inputs * TILE)).max(1),
    };
    let task = |at: usize, out: &mut [f32]| {
        for (i, out) in out.chunks_mut(TILE * count).enumerate() {
            kernel(weight.format, weight.tile(at * tiles_per_task + i), rows, out);
        }
    };
    match transposed.len() <= tiles_per_task * TILE * count {
        true => task(0, &mut transposed),
        false => par_chunks(&mut transposed, tiles_per_task * TILE * count, &task),
    }
    if count == 1 {
        return transposed;
    }
    (0..count).flat_map(|r| transposed.iter().skip(r).step_by(count).copied()).collect()
}
