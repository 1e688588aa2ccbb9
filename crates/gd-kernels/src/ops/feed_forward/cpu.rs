//! [`feed_forward`](super::feed_forward) as one operator, for trainings in f32 and f64 on the CPU.
//!
//! Rows are processed in blocks, so that what lies between x and y stays in the cache. The graph holds x alone: the backward
//! pass computes a block again, which takes less time than reading it from memory, and adds its part to the gradients of the
//! parameters before it goes on to the next one.

use candle_core::{DType, Device, Result, Tensor};

use crate::backend::cpu::parallel::{par_chunks, par_items, sum_rows, vectorize, with_scratch};
use crate::backend::cpu::product::{
    BLOCK_ROWS, MatmulPrecision, Matrix, Multiply, TASK_ROWS, with_matmul_precision,
};
use crate::backend::cpu::view::with_slices;
use crate::backend::graph::attach3;
use crate::backend::span::{Pass, operator_span};
use crate::ops::rms_norm::cpu::{normalize_row, row_gradients as norm_gradients};
use crate::ops::swiglu::cpu::{row as swiglu_row, row_gradients as swiglu_gradients};

/// The name of the operator in candle's graph.
const NAME: &str = "feed_forward";

/// The block for tensors of one dtype, which have been validated.
pub(super) fn feed_forward(
    x: &Tensor,
    (norm, eps): (&Tensor, f64),
    [gate, up, down]: [&Tensor; 3],
) -> Result<Tensor> {
    // An operator of candle has at most three arguments: x, the parameters with rows of C elements, and down.
    let inner = Tensor::cat(&[gate, up, &norm.unsqueeze(0)?], 0)?;
    match x.dtype() {
        DType::F64 => fused::<f64>(x, &inner, down, eps),
        _ => fused::<f32>(x, &inner, down, eps),
    }
}

fn fused<T: Multiply>(x: &Tensor, inner: &Tensor, down: &Tensor, eps: f64) -> Result<Tensor> {
    let span = operator_span(NAME, Pass::Forward);
    let precision = MatmulPrecision::current();
    let y =
        with_slices::<T, _, _>([x, inner, down], |[x, inner, down]| Block::new(inner, down, eps).forward(x))?;
    drop(span);
    attach3(NAME, [x, inner, down], (y, x.shape().clone()), move |[x, inner, down], _, dy| {
        let (shapes, device) = ([x.shape(), inner.shape(), down.shape()], &Device::Cpu);
        let is_trained = inner.track_op() || down.track_op();
        let (dx, parameters) = with_slices::<T, _, _>([x, inner, down, dy], |[x, inner, down, dy]| {
            with_matmul_precision(precision, || Block::new(inner, down, eps).backward(x, dy, is_trained))
        })?;
        let dx = Some(Tensor::from_vec(dx, shapes[0], device)?);
        let Some([dinner, ddown]) = parameters else { return Ok([dx, None, None]) };
        Ok([
            dx,
            Some(Tensor::from_vec(dinner, shapes[1], device)?),
            Some(Tensor::from_vec(ddown, shapes[2], device)?),
        ])
    })
}

/// The parameters.
struct Block<'a, T: Multiply> {
    /// Gate and up `[2 F, C]`, and the normalisation's weight `[C]`.
    gate_up: Matrix<'a, T>,
    norm: &'a [T],
    eps: f64,
    down: Matrix<'a, T>,
    /// `[C, 2 F]`.
    gate_up_t: T::Packed,
    channels: usize,
    width: usize,
}

impl<'a, T: Multiply> Block<'a, T> {
    fn new(inner: &'a [T], down: &'a [T], eps: f64) -> Self {
        // inner has (2 F + 1) C elements, down has F C.
        let channels = inner.len() - 2 * down.len();
        let (gate_up, norm) = inner.split_at(2 * down.len());
        let width = down.len() / channels;
        let (gate_up, down) = (Matrix::of_rows(gate_up, channels), Matrix::of_rows(down, width));
        Self { gate_up, norm, eps, down, gate_up_t: T::pack(gate_up.t()), channels, width }
    }

    /// Of some rows: the normalised ones `[rows, C]`, their gates and ups `[rows, 2 F]`, and the activations `[rows, F]`.
    fn activate(&self, x: &[T], normed: &mut [T], gate_up: &mut [T], hidden: &mut [T]) {
        let (c, f) = (self.channels, self.width);
        vectorize(
            #[inline(always)]
            || {
                for (x, normed) in x.chunks_exact(c).zip(normed.chunks_exact_mut(c)) {
                    normalize_row((x, self.norm), self.eps, normed);
                }
            },
        );
        T::multiply(Matrix::of_rows(normed, c), &self.gate_up_t, gate_up, false);
        vectorize(
            #[inline(always)]
            || {
                for (gate_up, hidden) in gate_up.chunks_exact(2 * f).zip(hidden.chunks_exact_mut(f)) {
                    let (gate, up) = gate_up.split_at(f);
                    swiglu_row(gate, up, hidden);
                }
            },
        );
    }

    fn forward(&self, x: &[T]) -> Vec<T> {
        let (c, f) = (self.channels, self.width);
        let down = T::pack(self.down.t());
        let mut y = vec![T::zero(); x.len()];
        par_chunks(&mut y, TASK_ROWS * c, &|task, y| {
            let x = &x[task * TASK_ROWS * c..][..y.len()];
            let rows = y.len() / c;
            with_scratch(rows * (c + 3 * f), |scratch| {
                let (normed, rest) = scratch.split_at_mut(rows * c);
                let (gate_up, hidden) = rest.split_at_mut(rows * 2 * f);
                self.activate(x, normed, gate_up, hidden);
                T::multiply(Matrix::of_rows(hidden, f), &down, y, false);
            });
            y.iter_mut().zip(x).for_each(|(y, &x)| *y += x);
        });
        y
    }

    /// The gradients of x, and where the parameters are trained those of gate, up and the weight of the normalisation, and of
    /// down.
    fn backward(&self, x: &[T], dy: &[T], is_trained: bool) -> (Vec<T>, Option<[Vec<T>; 2]>) {
        let (c, f) = (self.channels, self.width);
        let (gate_up, down) = (T::pack(self.gate_up), T::pack(self.down));
        let zeros = |len| vec![T::zero(); len];
        let mut dx = zeros(x.len());
        let mut parameters = is_trained.then(|| [zeros(2 * f * c), zeros(c * f)]);
        let mut dnorm = zeros((x.len() / c).div_ceil(TASK_ROWS) * c);
        let block_rows = BLOCK_ROWS.min(x.len() / c);
        let (mut normed, mut hidden) = (zeros(block_rows * c), zeros(block_rows * f));
        let mut dprojected = zeros(block_rows * 2 * f);
        let blocks =
            x.chunks(BLOCK_ROWS * c).zip(dy.chunks(BLOCK_ROWS * c)).zip(dx.chunks_mut(BLOCK_ROWS * c));
        for (((x, dy), dx), dnorm) in blocks.zip(dnorm.chunks_mut(BLOCK_ROWS / TASK_ROWS * c)) {
            let rows = x.len() / c;
            let tasks: Vec<_> = x
                .chunks(TASK_ROWS * c)
                .zip(dy.chunks(TASK_ROWS * c))
                .zip(dx.chunks_mut(TASK_ROWS * c).zip(dnorm.chunks_mut(c)))
                .zip(normed.chunks_mut(TASK_ROWS * c).zip(hidden.chunks_mut(TASK_ROWS * f)))
                .zip(dprojected.chunks_mut(TASK_ROWS * 2 * f))
                .collect();
            par_items(tasks, &|_, ((((x, dy), (dx, dnorm)), (normed, hidden)), dprojected)| {
                let rows = x.len() / c;
                let (normed, hidden) = (&mut normed[..rows * c], &mut hidden[..rows * f]);
                let dprojected = &mut dprojected[..rows * 2 * f];
                self.row_gradients([x, dy], [&gate_up, &down], [normed, hidden, dprojected, dx, dnorm]);
            });
            let Some([dgate_up, ddown]) = &mut parameters else { continue };
            let (normed, hidden) = (&normed[..rows * c], &hidden[..rows * f]);
            let dprojected = Matrix::of_rows(&dprojected[..rows * 2 * f], 2 * f);
            T::multiply_all(dprojected.t(), &T::pack(Matrix::of_rows(normed, c)), dgate_up, true);
            let hidden = T::pack(Matrix::of_rows(hidden, f));
            T::multiply_all(Matrix::of_rows(dy, c).t(), &hidden, ddown, true);
        }
        if let Some([dgate_up, _]) = &mut parameters {
            dgate_up.extend(sum_rows(&dnorm, c));
        }
        (dx, parameters)
    }

    /// Of some rows: the normalised ones, the activations, the gradients of gates and ups, those of x, and the part of that
    /// of the weight of the normalisation, which is added to zeros.
    fn row_gradients(
        &self,
        [x, dy]: [&[T]; 2],
        [gate_up, down]: [&T::Packed; 2],
        [normed, hidden, dprojected, dx, dnorm]: [&mut [T]; 5],
    ) {
        let (c, f) = (self.channels, self.width);
        let rows = x.len() / c;
        with_scratch(rows * (c + 3 * f), |scratch| {
            let (dnormed, rest) = scratch.split_at_mut(rows * c);
            let (projected, dhidden) = rest.split_at_mut(rows * 2 * f);
            self.activate(x, normed, projected, hidden);
            T::multiply(Matrix::of_rows(dy, c), down, dhidden, false);
            vectorize(
                #[inline(always)]
                || {
                    let rows = projected.chunks_exact(2 * f).zip(dhidden.chunks_exact(f));
                    for ((projected, dhidden), out) in rows.zip(dprojected.chunks_exact_mut(2 * f)) {
                        let ((gate, up), (dgate, dup)) = (projected.split_at(f), out.split_at_mut(f));
                        swiglu_gradients([gate, up, dhidden], dgate, dup);
                    }
                },
            );
            T::multiply(Matrix::of_rows(dprojected, 2 * f), gate_up, dnormed, false);
            vectorize(
                #[inline(always)]
                || {
                    let rows = x.chunks_exact(c).zip(dnormed.chunks_exact(c)).zip(dy.chunks_exact(c));
                    for (((x, dnormed), dy), dx) in rows.zip(dx.chunks_exact_mut(c)) {
                        norm_gradients((x, self.norm, dnormed), self.eps, dx, dnorm);
                        dx.iter_mut().zip(dy).for_each(|(dx, &dy)| *dx += dy);
                    }
                },
            );
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::agreement::{agree, noise};
    use crate::{feed_forward, rms_norm, swiglu};

    #[test]
    fn the_operator_agrees_with_its_composition() -> Result<()> {
        let composed = |t: &[Tensor]| {
            let n = rms_norm(&t[0], &t[1], 1e-3)?;
            let (gate, up) = (n.broadcast_matmul(&t[2].t()?)?, n.broadcast_matmul(&t[3].t()?)?);
            &t[0] + swiglu(&gate, &up)?.broadcast_matmul(&t[4].t()?)?
        };
        for lead in [&[40][..], &[3, 17], &[2, 3], &[600]] {
            let dtype = DType::F64;
            let x = noise(1, &[lead, &[10]].concat(), dtype)?;
            let weights =
                [noise(3, &[13, 10], dtype)?, noise(4, &[13, 10], dtype)?, noise(5, &[10, 13], dtype)?];
            let inputs = [&[x, noise(2, &[10], dtype)?][..], &weights].concat();
            agree(&inputs, |t| Ok(feed_forward(&t[0], (&t[1], 1e-3), [&t[2], &t[3], &t[4]])?), composed)?;
        }
        Ok(())
    }

    #[test]
    fn shapes_that_do_not_fit_are_errors() -> Result<()> {
        let t = |shape: &[usize]| noise(1, shape, DType::F32);
        let error = feed_forward(&t(&[2, 4])?, (&t(&[4])?, 1e-6), [&t(&[6, 4])?, &t(&[5, 4])?, &t(&[4, 6])?]);
        let error = error.unwrap_err().to_string();
        assert!(error.contains("[6, 4]") && error.contains("[5, 4]"), "{error}");
        Ok(())
    }
}
