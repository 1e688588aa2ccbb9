//! The products on the CPU.

mod tile;

use self::tile::{Dequantize, Multiply};
use super::blocks::GROUP;
use super::matrix::{QuantizedMatrix, TILE};
use super::rows::Rows16;
use crate::backend::cpu::isa::Isa;
use crate::backend::cpu::lanes::{fastest_isa, with_lanes};
use crate::backend::cpu::parallel::{column_tasks, par_chunks, par_items, with_scratch};
use crate::backend::cpu::product::{Matrix, PANEL, multiply_panels};

/// Weights of a task.
const TASK_WEIGHTS: usize = 1 << 16;
/// Products below which the work stays on the calling thread.
const MIN_PARALLEL_PRODUCTS: usize = 1 << 17;
/// Rows of activations from which on dequantising the weights costs less than the slower products of integers. Measured for
/// Q4_1, Q8_0 and Q4_K: the integers are quicker with 32 rows, and slower with 40.
pub(super) const MIN_DEQUANTIZED_ROWS: usize = 40;
/// Rows of activations that are multiplied by dequantised weights at a time.
const DEQUANTIZED_TASK_ROWS: usize = 96;
/// Rows whose results for one output are a cache line.
const ROWS_PER_LINE: usize = 16;

/// y `[rows, outputs]` by products of integers; every weight is read once.
pub(super) fn multiply(rows: &Rows16, weight: &QuantizedMatrix) -> Vec<f32> {
    multiply_by(fastest_isa(), rows, weight)
}

/// The same with a given instruction set.
fn multiply_by(isa: Isa, rows: &Rows16, weight: &QuantizedMatrix) -> Vec<f32> {
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
            let tile = weight.tile(at * tiles_per_task + i);
            with_lanes(isa, Multiply { format: weight.format, tile, rows, out });
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
    dequantized_by(fastest_isa(), x, weight)
}

/// The same with a given instruction set. A task dequantises the weights of some outputs in the layout of the products, in
/// which they stay in the cache, and multiplies all rows by them.
fn dequantized_by(isa: Isa, x: &[f32], weight: &QuantizedMatrix) -> Vec<f32> {
    let [outputs, inputs] = weight.dims();
    let rows = Matrix::of_rows(x, inputs);
    let mut y = vec![0f32; outputs * rows.row_count()];
    let tasks = column_tasks(&mut y, outputs, PANEL);
    par_items(tasks, &|panel, mut out| {
        let tiles = out.first().map_or(0, |out| out.len().div_ceil(TILE));
        let width = tiles * TILE;
        with_scratch(inputs * PANEL + DEQUANTIZED_TASK_ROWS * width, |scratch| {
            let (weights, part) = scratch.split_at_mut(inputs * PANEL);
            for i in 0..tiles {
                let tile = weight.tile(panel * (PANEL / TILE) + i);
                for (group, out) in weights.chunks_exact_mut(GROUP * PANEL).enumerate() {
                    let (format, out) = (weight.format, &mut out[i * TILE..]);
                    with_lanes(isa, Dequantize { format, tile, group, out, stride: PANEL });
                }
            }
            for (block, out) in out.chunks_mut(DEQUANTIZED_TASK_ROWS).enumerate() {
                let (first, part) = (block * DEQUANTIZED_TASK_ROWS, &mut part[..out.len() * width]);
                multiply_panels(rows.rows(first..first + out.len()), (weights, width), part, false);
                for (out, part) in out.iter_mut().zip(part.chunks_exact(width)) {
                    out.copy_from_slice(&part[..out.len()]);
                }
            }
        });
    });
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
        for dtype in [Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q4K, Q5K, Q6K] {
            let dims = [21, 512];
            let stored = QTensor::quantize(&noise(1, &dims, DType::F32)?, dtype)?;
            let matrix = QuantizedMatrix::new(dtype, dims, &stored.data()?)?;
            let x = noise(2, &[6, dims[1]], DType::F32)?;
            let (storage, layout) = x.storage_and_layout();
            let rows = Rows16::new(&storage, layout)?;
            let values = x.flatten_all()?.to_vec1::<f32>()?;
            let bits = |isa| -> Vec<u32> {
                let products = multiply_by(isa, &rows, &matrix);
                products.iter().chain(&dequantized_by(isa, &values, &matrix)).map(|y| y.to_bits()).collect()
            };
            let expected = bits(Isa::Portable);
            for isa in Isa::available() {
                assert_eq!(bits(isa), expected, "{dtype:?} {isa:?}");
            }
        }
        Ok(())
    }
}
