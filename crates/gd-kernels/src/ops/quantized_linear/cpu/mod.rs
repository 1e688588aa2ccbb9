//! The products on the CPU.

mod tile;

use self::tile::{Dequantize, Multiply};
use super::blocks::GROUP;
use super::matrix::{QuantizedMatrix, TILE};
use super::rows::Rows16;
use crate::backend::cpu::isa::Isa;
use crate::backend::cpu::lanes::{fastest_isa, with_integer_lanes, with_lanes};
use crate::backend::cpu::parallel::{par_chunks, par_items};
use crate::backend::cpu::product::{Matrix, PANEL, multiply_by_columns};

/// Weights of a task.
const TASK_WEIGHTS: usize = 1 << 16;
/// Products below which the work stays on the calling thread.
const MIN_PARALLEL_PRODUCTS: usize = 1 << 17;
/// Rows of activations from which on dequantising the weights costs less than the slower products of integers. Measured for
/// Q4_1, Q8_0 and Q4_K: the integers are quicker with 32 rows, and slower with 40.
pub(super) const MIN_DEQUANTIZED_ROWS: usize = 40;
/// Rows whose results for one output are a cache line.
const ROWS_PER_LINE: usize = 16;

/// For each of the weights, y `[rows, outputs]` by products of integers, in one parallel loop; every weight is read once.
pub(super) fn multiply(rows: &Rows16, weights: &[&QuantizedMatrix]) -> Vec<Vec<f32>> {
    multiply_by(fastest_isa(), rows, weights)
}

/// The same with a given instruction set.
fn multiply_by(isa: Isa, rows: &Rows16, weights: &[&QuantizedMatrix]) -> Vec<Vec<f32>> {
    let count = rows.count;
    // Transposed, so that the results of a tile are contiguous.
    let mut transposed: Vec<_> = weights.iter().map(|weight| vec![0f32; weight.dims()[0] * count]).collect();
    let mut tasks = Vec::new();
    for (weight, out) in weights.iter().zip(&mut transposed) {
        let tiles_per_task = (TASK_WEIGHTS / (weight.dims()[1] * TILE)).max(1);
        let parts = out.chunks_mut((tiles_per_task * TILE * count).max(1)).enumerate();
        tasks.extend(parts.map(|(i, out)| (*weight, i * tiles_per_task, out)));
    }
    let run = |(weight, first, out): (&QuantizedMatrix, usize, &mut [f32])| {
        for (i, out) in out.chunks_mut(TILE * count).enumerate() {
            with_integer_lanes(
                isa,
                Multiply { format: weight.format, tile: weight.tile(first + i), rows, out },
            );
        }
    };
    let products: usize = weights.iter().map(|weight| weight.dims().iter().product::<usize>() * count).sum();
    match products < MIN_PARALLEL_PRODUCTS {
        true => tasks.into_iter().for_each(run),
        false => par_items(tasks, &|_, task| run(task)),
    }
    let outputs = weights.iter().map(|weight| weight.dims()[0]);
    transposed.into_iter().zip(outputs).map(|(values, outputs)| transpose(values, outputs, count)).collect()
}

/// `[rows, outputs]` from `[outputs, rows]`.
fn transpose(transposed: Vec<f32>, outputs: usize, rows: usize) -> Vec<f32> {
    if rows <= 1 {
        return transposed;
    }
    let mut y = vec![0f32; outputs * rows];
    // A block of rows is a cache line of every output.
    par_chunks(&mut y, ROWS_PER_LINE * outputs, &|block, y| {
        let first = block * ROWS_PER_LINE;
        for (output, values) in transposed.chunks_exact(rows).enumerate() {
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

/// The same with a given instruction set.
fn dequantized_by(isa: Isa, x: &[f32], weight: &QuantizedMatrix) -> Vec<f32> {
    let [outputs, inputs] = weight.dims();
    multiply_by_columns(Matrix::of_rows(x, inputs), outputs, &|i, panel| {
        let first = i * (PANEL / TILE);
        for tile in first..outputs.div_ceil(TILE).min(first + PANEL / TILE) {
            for (group, out) in panel.chunks_exact_mut(GROUP * PANEL).enumerate() {
                let (format, out) = (weight.format, &mut out[(tile - first) * TILE..]);
                with_lanes(isa, Dequantize { format, tile: weight.tile(tile), group, out, stride: PANEL });
            }
        }
    })
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
                let products = multiply_by(isa, &rows, &[&matrix]).concat();
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
