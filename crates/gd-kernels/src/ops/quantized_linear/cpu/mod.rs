//! The products on the CPU.

mod lanes;
mod tile;
#[cfg(target_arch = "x86_64")]
mod x86;

use self::tile::Kernel;
use super::blocks::GROUP;
use super::matrix::{QuantizedMatrix, TILE};
use super::rows::Rows16;
use crate::backend::cpu::isa::Isa;
use crate::backend::cpu::parallel::par_chunks;
use crate::backend::cpu::product::{Matrix, Multiply};

/// Weights of a task.
const TASK_WEIGHTS: usize = 1 << 16;
/// Products below which the work stays on the calling thread.
const MIN_PARALLEL_PRODUCTS: usize = 1 << 17;
/// Rows of activations from which on dequantising the weights costs less than the slower products of integers.
pub(super) const MIN_DEQUANTIZED_ROWS: usize = 64;
/// Weights that are dequantised at a time.
const DEQUANTIZED_WEIGHTS: usize = 1 << 20;
/// Rows whose results for one output are a cache line.
const ROWS_PER_LINE: usize = 16;

/// y `[rows, outputs]` by products of integers; every weight is read once.
pub(super) fn multiply(rows: &Rows16, weight: &QuantizedMatrix) -> Vec<f32> {
    multiply_by(tile::kernel(), rows, weight)
}

/// The same by a given kernel.
fn multiply_by(kernel: Kernel, rows: &Rows16, weight: &QuantizedMatrix) -> Vec<f32> {
    let ([outputs, inputs], count) = (weight.dims(), rows.count);
    // Transposed, so that the results of a tile are contiguous.
    let mut transposed = vec![0f32; outputs * count];
    if transposed.is_empty() {
        return transposed;
    }
    let tiles_per_task = match outputs * inputs * count < MIN_PARALLEL_PRODUCTS {
        true => outputs.div_ceil(TILE),
        false => (TASK_WEIGHTS / (inputs * TILE)).max(1),
    };
    let task = |at: usize, out: &mut [f32]| {
        for (i, out) in out.chunks_mut(TILE * count).enumerate() {
            (kernel.multiply)(weight.format, weight.tile(at * tiles_per_task + i), rows, out);
        }
    };
    match transposed.len() <= tiles_per_task * TILE * count {
        true => task(0, &mut transposed),
        false => par_chunks(&mut transposed, tiles_per_task * TILE * count, &task),
    }
    if count == 1 {
        return transposed;
    }
    let mut y = vec![0f32; outputs * count];
    // A block of rows is a cache line of every output.
    par_chunks(&mut y, ROWS_PER_LINE * outputs, &|block, y| {
        let first = block * ROWS_PER_LINE;
        for (output, values) in transposed.chunks_exact(count).enumerate() {
            for (row, value) in y.chunks_exact_mut(outputs).zip(&values[first..]) {
                row[output] = *value;
            }
        }
    });
    y
}

/// y `[rows, outputs]` for x `[rows, inputs]` by products in f32, with blocks of dequantised weights.
pub(super) fn multiply_dequantized(x: &[f32], weight: &QuantizedMatrix) -> Vec<f32> {
    dequantized_by(tile::kernel(), x, weight)
}

/// The same by a given kernel.
fn dequantized_by(kernel: Kernel, x: &[f32], weight: &QuantizedMatrix) -> Vec<f32> {
    let [outputs, inputs] = weight.dims();
    let rows = Matrix::of_rows(x, inputs);
    let count = rows.row_count();
    let mut y = vec![0f32; outputs * count];
    let total = outputs.div_ceil(TILE);
    let blocks = (total * TILE * inputs).div_ceil(DEQUANTIZED_WEIGHTS).max(1);
    let tiles_per_block = total.div_ceil(blocks).max(1);
    let len = tiles_per_block * TILE;
    let (mut weights, mut part) = (vec![0f32; inputs * len], vec![0f32; count * len]);
    for first in (0..total).step_by(tiles_per_block) {
        let tiles = tiles_per_block.min(total - first);
        let width = tiles * TILE;
        let (weights, part) = (&mut weights[..inputs * width], &mut part[..count * width]);
        par_chunks(weights, GROUP * width, &|group, out| {
            for i in 0..tiles {
                let tile = weight.tile(first + i);
                (kernel.dequantize)(weight.format, tile, group, &mut out[i * TILE..], width);
            }
        });
        f32::multiply_all(rows, &f32::pack(Matrix::of_rows(weights, width)), part, false);
        let from = first * TILE;
        let used = (outputs - from).min(width);
        for (y, part) in y.chunks_exact_mut(outputs).zip(part.chunks_exact(width)) {
            y[from..from + used].copy_from_slice(&part[..used]);
        }
    }
    y
}

#[cfg(test)]
mod tests {
    use candle_core::quantized::{GgmlDType, QTensor};
    use candle_core::{DType, Result};

    use super::*;
    use crate::ops::agreement::noise;

    #[test]
    fn all_instruction_sets_give_the_same_bits() -> Result<()> {
        use GgmlDType::*;
        let kernels: Vec<_> = Isa::available().into_iter().map(|isa| (isa, tile::kernel_of(isa))).collect();
        for dtype in [Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q4K, Q5K, Q6K] {
            let dims = [21, 512];
            let stored = QTensor::quantize(&noise(1, &dims, DType::F32)?, dtype)?;
            let matrix = QuantizedMatrix::new(dtype, dims, &stored.data()?)?;
            let x = noise(2, &[6, dims[1]], DType::F32)?;
            let (storage, layout) = x.storage_and_layout();
            let rows = Rows16::new(&storage, layout)?;
            let values = x.flatten_all()?.to_vec1::<f32>()?;
            let bits = |kernel| -> Vec<u32> {
                let products = multiply_by(kernel, &rows, &matrix);
                products
                    .iter()
                    .chain(&dequantized_by(kernel, &values, &matrix))
                    .map(|y| y.to_bits())
                    .collect()
            };
            // The last one is portable.
            let expected = bits(kernels[kernels.len() - 1].1);
            for (isa, kernel) in &kernels {
                assert_eq!(bits(*kernel), expected, "{dtype:?} {isa:?}");
            }
        }
        Ok(())
    }
}
