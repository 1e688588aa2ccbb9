//! The CPU implementation of [`swiglu`](super::swiglu): one pass forward and one backward.

use candle_core::Tensor;
use num_traits::One;

use crate::backend::cpu::element::{Element, Real, by_float};
use crate::backend::cpu::parallel::{for_chunks, for_chunks2, rows_per_chunk, vectorize};
use crate::backend::cpu::view::Rows;
use crate::backend::graph::{attach2, with_contiguous_rows};
use crate::error::Result;

/// Elements that are computed together.
const LANES: usize = 16;

/// Applies the activation to validated tensors.
pub(super) fn swiglu(gate: &Tensor, up: &Tensor) -> Result<Tensor> {
    let (gate, up) = (with_contiguous_rows(gate)?, with_contiguous_rows(up)?);
    by_float!("swiglu", gate.dtype(), T => {
        let y = {
            let ((g, gl), (u, ul)) = (gate.storage_and_layout(), up.storage_and_layout());
            forward(&Rows::<T>::new(&g, gl)?, &Rows::<T>::new(&u, ul)?)
        };
        Ok(attach2("swiglu", &gate, &up, (y, gate.shape().clone()), backward::<T>)?)
    })
}

#[inline(always)]
fn sigmoid<R: Real>(x: R) -> R {
    (R::one() + (-x).exp_fast()).recip()
}

fn forward<T: Element>(gate: &Rows<T>, up: &Rows<T>) -> Vec<T> {
    let len = gate.len();
    let mut y = vec![T::zero(); gate.count() * len];
    let rows = rows_per_chunk(len);
    for_chunks(&mut y, rows * len, |chunk, y| {
        vectorize(|| {
            for (j, y) in y.chunks_exact_mut(len.max(1)).enumerate() {
                let i = chunk * rows + j;
                row(gate.row(i), up.row(i), y);
            }
        });
    });
    y
}

/// `dgate = dy up s (1 + gate (1 - s))` and `dup = dy gate s`, with `s = sigmoid(gate)`.
fn backward<T: Element>(gate: &Tensor, up: &Tensor, dy: &Tensor) -> candle_core::Result<[Tensor; 2]> {
    let dy = with_contiguous_rows(dy)?;
    let ((g, gl), (u, ul), (d, dl)) =
        (gate.storage_and_layout(), up.storage_and_layout(), dy.storage_and_layout());
    let (g, u, d) = (Rows::<T>::new(&g, gl)?, Rows::<T>::new(&u, ul)?, Rows::<T>::new(&d, dl)?);
    let len = g.len();
    let rows = rows_per_chunk(len);
    let mut dgate = vec![T::zero(); g.count() * len];
    let mut dup = dgate.clone();
    for_chunks2((&mut dgate, rows * len), (&mut dup, rows * len), |chunk, dgate, dup| {
        vectorize(|| {
            let out = dgate.chunks_exact_mut(len.max(1)).zip(dup.chunks_exact_mut(len.max(1)));
            for (j, (dgate, dup)) in out.enumerate() {
                let i = chunk * rows + j;
                row_gradients([g.row(i), u.row(i), d.row(i)], dgate, dup);
            }
        });
    });
    let tensor = |v: Vec<T>| Tensor::from_vec(v, gate.shape(), gate.device());
    Ok([tensor(dgate)?, tensor(dup)?])
}

/// A row of the result.
#[inline(always)]
pub(crate) fn row<T: Element>(gate: &[T], up: &[T], y: &mut [T]) {
    for ((y, &g), &u) in y.iter_mut().zip(gate).zip(up) {
        let g = g.up();
        *y = T::down(g * sigmoid(g) * u.up());
    }
}

/// The gradients of a row of gates and ups.
#[inline(always)]
pub(crate) fn row_gradients<T: Element>([g, u, d]: [&[T]; 3], dgate: &mut [T], dup: &mut [T]) {
    let gradients = |g: T, u: T, d: T| {
        let (g, u, d) = (g.up(), u.up(), d.up());
        let s = sigmoid(g);
        (T::down(d * u * s * (T::Acc::one() + g * (T::Acc::one() - s))), T::down(d * g * s))
    };
    // In local arrays: with two outputs and three inputs, the compiler does not prove that slices do not overlap.
    let (g, g_rest) = g.as_chunks::<LANES>();
    let (u, u_rest) = u.as_chunks::<LANES>();
    let (d, d_rest) = d.as_chunks::<LANES>();
    let (dgate, dgate_rest) = dgate.as_chunks_mut::<LANES>();
    let (dup, dup_rest) = dup.as_chunks_mut::<LANES>();
    for ((dgate, dup), ((g, u), d)) in dgate.iter_mut().zip(dup).zip(g.iter().zip(u).zip(d)) {
        let (mut of_gate, mut of_up) = ([T::zero(); LANES], [T::zero(); LANES]);
        for i in 0..LANES {
            (of_gate[i], of_up[i]) = gradients(g[i], u[i], d[i]);
        }
        (*dgate, *dup) = (of_gate, of_up);
    }
    let rest = g_rest.iter().zip(u_rest).zip(d_rest);
    for ((dgate, dup), ((&g, &u), &d)) in dgate_rest.iter_mut().zip(dup_rest).zip(rest) {
        (*dgate, *dup) = gradients(g, u, d);
    }
}

#[cfg(test)]
mod tests {
    use candle_core::{DType, Result, Tensor};

    use crate::ops::agreement::{agree, noise};
    use crate::swiglu;

    /// The same operator composed of candle operations that have gradients.
    fn composed(gate: &Tensor, up: &Tensor) -> Result<Tensor> {
        gate.silu()? * up
    }

    #[test]
    fn composition_agrees_in_values_and_gradients() -> Result<()> {
        for dtype in [DType::F64, DType::F32, DType::BF16, DType::F16] {
            let inputs = [noise(1, &[3, 5, 37], dtype)?, noise(2, &[3, 5, 37], dtype)?];
            agree(&inputs, |t| Ok(swiglu(&t[0], &t[1])?), |t| composed(&t[0], &t[1]))?;
        }
        Ok(())
    }
}
