//! Few rows of activations: one pass over the weights as they are stored.
//!
//! The time is that of reading the weights. A task reads a contiguous range of them, in order, and prefetches what follows.

use std::array;

use crate::backend::cpu::isa::Isa;
use crate::backend::cpu::lanes::{Lanes, WithLanes, fastest_isa, with_lanes};
use crate::backend::cpu::parallel::{column_tasks, par_items};
use crate::backend::cpu::stored::{Stored, row_products};
use crate::backend::cpu::view::Rows;

/// Rows of activations that are multiplied by a row of weights together.
const MAX_GROUP_ROWS: usize = 4;
/// Bytes of the weights of a task.
const TASK_BYTES: usize = 1 << 17;

/// y `[rows of x, rows of weight]`; every weight is read once from memory.
pub(super) fn multiply<T: Stored>(x: &Rows<f32>, weight: &Rows<T>) -> Vec<f32> {
    multiply_with(fastest_isa(), x, weight)
}

/// The same with a given instruction set.
fn multiply_with<T: Stored>(isa: Isa, x: &Rows<f32>, weight: &Rows<T>) -> Vec<f32> {
    let (rows, outputs) = (x.count(), weight.count());
    let mut y = vec![0f32; rows * outputs];
    if y.is_empty() {
        return y;
    }
    let task_outputs = (TASK_BYTES / (weight.len() * size_of::<T>()).max(1)).max(1);
    let tasks = column_tasks(&mut y, outputs, task_outputs);
    let run = |i: usize, mut out: Vec<&mut [f32]>| {
        with_lanes(isa, Task { x, weight, first: i * task_outputs, out: &mut out });
    };
    match tasks.len() {
        1 => tasks.into_iter().for_each(|task| run(0, task)),
        _ => par_items(tasks, &run),
    }
    y
}

/// The products of all rows of x with some rows of the weights.
struct Task<'a, 'y, T> {
    x: &'a Rows<'a, f32>,
    weight: &'a Rows<'a, T>,
    /// The first row of the weights.
    first: usize,
    /// For each row of x, one element for each row of the weights.
    out: &'a mut [&'y mut [f32]],
}

impl<T: Stored> WithLanes for Task<'_, '_, T> {
    type Output = ();

    #[inline(always)]
    fn with_lanes<V: Lanes>(mut self) {
        for row in (0..self.out.len()).step_by(MAX_GROUP_ROWS) {
            match self.out.len() - row {
                1 => self.group::<V, 1, 4>(row),
                2 => self.group::<V, 2, 2>(row),
                3 => self.group::<V, 3, 1>(row),
                _ => self.group::<V, MAX_GROUP_ROWS, 1>(row),
            }
        }
    }
}

impl<T: Stored> Task<'_, '_, T> {
    /// `R` rows of x from `row` on, `W` rows of weights at a time.
    #[inline(always)]
    fn group<V: Lanes, const R: usize, const W: usize>(&mut self, row: usize) {
        let x: [&[f32]; R] = array::from_fn(|r| self.x.row(row + r));
        let outputs = self.out[row].len();
        let whole = outputs / W * W;
        for j in (0..whole).step_by(W) {
            self.products::<V, R, W>(x, row, j);
        }
        for j in whole..outputs {
            self.products::<V, R, 1>(x, row, j);
        }
    }

    /// The products of `R` rows of x from `row` on with `W` rows of weights from the `j`th on.
    #[inline(always)]
    fn products<V: Lanes, const R: usize, const W: usize>(&mut self, x: [&[f32]; R], row: usize, j: usize) {
        let products = row_products::<V, T, R, W>(x, array::from_fn(|w| self.weight.row(self.first + j + w)));
        for (r, products) in products.into_iter().enumerate() {
            self.out[row + r][j..j + W].copy_from_slice(&products);
        }
    }
}

#[cfg(test)]
mod tests {
    use candle_core::{DType, Result, Tensor};

    use super::*;
    use crate::backend::cpu::element::{Bf16, F16, add_up};
    use crate::backend::cpu::stored::STEP;
    use crate::backend::cpu::view::cpu_slice;
    use crate::ops::agreement::noise;

    fn bits<T: Stored>(isa: Isa, x: &Tensor, weight: &Tensor) -> Result<Vec<u32>> {
        let ((xs, xl), (ws, wl)) = (x.storage_and_layout(), weight.storage_and_layout());
        let y = multiply_with(isa, &Rows::new(&xs, xl)?, &Rows::<T>::new(&ws, wl)?);
        Ok(y.into_iter().map(f32::to_bits).collect())
    }

    /// The sums of both registers of a step and the rest, as the order of the additions has them.
    fn expected<T: Stored>(x: &Tensor, weight: &Tensor) -> Result<Vec<u32>> {
        let ((xs, _), (ws, _)) = (x.storage_and_layout(), weight.storage_and_layout());
        let (x, w, inputs) = (cpu_slice::<f32>(&xs)?, cpu_slice::<T>(&ws)?, weight.dim(1)?);
        let product = |x: &[f32], w: &[T]| {
            let (mut lanes, mut tail) = ([0f32; STEP], 0f32);
            let whole = inputs / STEP * STEP;
            for i in 0..inputs {
                let product = x[i] * w[i].up();
                if i < whole { lanes[i % STEP] += product } else { tail += product }
            }
            (add_up(lanes) + tail).to_bits()
        };
        let rows = x.chunks_exact(inputs).flat_map(|x| w.chunks_exact(inputs).map(move |w| (x, w)));
        Ok(rows.map(|(x, w)| product(x, w)).collect())
    }

    /// With tasks of any number on any number of threads.
    #[test]
    fn all_instruction_sets_and_numbers_of_threads_give_the_same_bits() -> Result<()> {
        for (rows, inputs, outputs) in [(1, 576, 1537), (2, 7, 3), (3, 33, 40), (6, 100, 2000), (8, 64, 65)] {
            let x = noise(1, &[rows, inputs], DType::F32)?;
            let weight = |dtype| noise(2, &[outputs, inputs], dtype);
            let [w32, w16, wb16] = [weight(DType::F32)?, weight(DType::F16)?, weight(DType::BF16)?];
            let all = |isa| -> Result<_> {
                Ok([bits::<f32>(isa, &x, &w32)?, bits::<F16>(isa, &x, &w16)?, bits::<Bf16>(isa, &x, &wb16)?])
            };
            let expected =
                [expected::<f32>(&x, &w32)?, expected::<F16>(&x, &w16)?, expected::<Bf16>(&x, &wb16)?];
            for isa in Isa::available() {
                for threads in [1, 3] {
                    let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build();
                    let got = pool.map_err(candle_core::Error::wrap)?.install(|| all(isa))?;
                    assert!(got == expected, "{isa:?}, {threads} threads: {rows} x {inputs} x {outputs}");
                }
            }
        }
        Ok(())
    }
}
