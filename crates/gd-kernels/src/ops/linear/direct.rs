//! Few rows of activations: one pass over the weights as they are stored.
//!
//! The time is that of reading the weights. A task reads a contiguous range of them, in order, and prefetches what follows.

use std::array;

use candle_core::{DType, Layout, Storage};

use crate::backend::cpu::element::{Bf16, F16};
use crate::backend::cpu::isa::Isa;
use crate::backend::cpu::lanes::{Lanes, WithLanes, fastest_isa, with_lanes};
use crate::backend::cpu::parallel::{column_tasks, par_items};
use crate::backend::cpu::stored::{Stored, row_products};
use crate::backend::cpu::view::Rows;

/// Rows of activations that are multiplied by a row of weights together.
const MAX_GROUP_ROWS: usize = 4;
/// Bytes of the weights of a task.
const TASK_BYTES: usize = 1 << 17;

/// The rows of weights in the type in which they are stored.
pub(super) enum Weights<'a> {
    F32(Rows<'a, f32>),
    F16(Rows<'a, F16>),
    Bf16(Rows<'a, Bf16>),
}

impl<'a> Weights<'a> {
    /// Reads `storage` through `layout`, whose last dimension is contiguous.
    pub(super) fn new(storage: &'a Storage, layout: &Layout) -> candle_core::Result<Self> {
        match storage.dtype() {
            DType::F16 => Ok(Self::F16(Rows::new(storage, layout)?)),
            DType::BF16 => Ok(Self::Bf16(Rows::new(storage, layout)?)),
            _ => Ok(Self::F32(Rows::new(storage, layout)?)),
        }
    }

    /// The number of rows, and the bytes of each.
    fn sizes(&self) -> [usize; 2] {
        match self {
            Self::F32(rows) => [rows.count(), rows.len() * size_of::<f32>()],
            Self::F16(rows) => [rows.count(), rows.len() * size_of::<F16>()],
            Self::Bf16(rows) => [rows.count(), rows.len() * size_of::<Bf16>()],
        }
    }
}

/// For each of the weights, y `[rows of x, rows of weights]`, in one parallel loop; every weight is read once from memory.
pub(super) fn multiply(x: &Rows<f32>, weights: &[Weights<'_>]) -> Vec<Vec<f32>> {
    multiply_with(fastest_isa(), x, weights)
}

/// The same with a given instruction set.
fn multiply_with(isa: Isa, x: &Rows<f32>, weights: &[Weights<'_>]) -> Vec<Vec<f32>> {
    let rows = x.count();
    let mut products: Vec<_> = weights.iter().map(|w| vec![0f32; rows * w.sizes()[0]]).collect();
    let mut tasks = Vec::new();
    for (weights, y) in weights.iter().zip(&mut products) {
        let [outputs, row_bytes] = weights.sizes();
        let task_outputs = (TASK_BYTES / row_bytes.max(1)).max(1);
        let parts = column_tasks(y, outputs, task_outputs).into_iter().enumerate();
        tasks.extend(parts.map(|(i, out)| (weights, i * task_outputs, out)));
    }
    let run = |(weights, first, mut out): (&Weights<'_>, usize, Vec<&mut [f32]>)| {
        let out = &mut out;
        match weights {
            Weights::F32(weight) => with_lanes(isa, Task { x, weight, first, out }),
            Weights::F16(weight) => with_lanes(isa, Task { x, weight, first, out }),
            Weights::Bf16(weight) => with_lanes(isa, Task { x, weight, first, out }),
        }
    };
    match tasks.len() {
        1 => tasks.into_iter().for_each(run),
        _ => par_items(tasks, &|_, task| run(task)),
    }
    products
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
            // As many rows of weights as there are registers for the sums of.
            match self.out.len() - row {
                1 if V::HAS_MANY_REGISTERS => self.group::<V, 1, 4>(row),
                1 => self.group::<V, 1, 2>(row),
                2 if V::HAS_MANY_REGISTERS => self.group::<V, 2, 2>(row),
                2 => self.group::<V, 2, 1>(row),
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

    /// The products with all weights.
    fn bits(isa: Isa, x: &Tensor, weights: &[Tensor]) -> Result<Vec<Vec<u32>>> {
        let (xs, xl) = x.storage_and_layout();
        let stored: Vec<_> = weights.iter().map(Tensor::storage_and_layout).collect();
        let weights = stored.iter().map(|(storage, layout)| Weights::new(storage, layout));
        let products = multiply_with(isa, &Rows::new(&xs, xl)?, &weights.collect::<Result<Vec<_>>>()?);
        Ok(products.into_iter().map(|y| y.into_iter().map(f32::to_bits).collect()).collect())
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

    /// With tasks of any number on any number of threads, alone and together with other weights.
    #[test]
    fn all_instruction_sets_and_numbers_of_threads_give_the_same_bits() -> Result<()> {
        for (rows, inputs, outputs) in [(1, 576, 1537), (2, 7, 3), (3, 33, 40), (6, 100, 2000), (8, 64, 65)] {
            let x = noise(1, &[rows, inputs], DType::F32)?;
            let weight = |dtype, outputs| noise(2, &[outputs, inputs], dtype);
            let weights =
                [weight(DType::F32, outputs)?, weight(DType::F16, 3)?, weight(DType::BF16, outputs)?];
            let expected = vec![
                expected::<f32>(&x, &weights[0])?,
                expected::<F16>(&x, &weights[1])?,
                expected::<Bf16>(&x, &weights[2])?,
            ];
            for isa in Isa::available() {
                for threads in [1, 3] {
                    let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build();
                    let pool = pool.map_err(candle_core::Error::wrap)?;
                    let case = format!("{isa:?}, {threads} threads: {rows} x {inputs} x {outputs}");
                    assert!(pool.install(|| bits(isa, &x, &weights))? == expected, "{case}");
                    for (weight, expected) in weights.iter().zip(&expected) {
                        let alone = pool.install(|| bits(isa, &x, std::slice::from_ref(weight)))?;
                        assert!(alone == [expected.clone()], "{case}, alone");
                    }
                }
            }
        }
        Ok(())
    }
}
