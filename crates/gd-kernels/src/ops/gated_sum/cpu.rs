//! The CPU implementation of [`gated_sum`](super::gated_sum): one pass forward and one backward.

use candle_core::Tensor;
use num_traits::Float;

use crate::backend::cpu::element::{Element, Real, by_float, sum2};
use crate::backend::cpu::parallel::{for_chunks, for_chunks2, rows_per_chunk, vectorize};
use crate::backend::cpu::view::Rows;
use crate::backend::graph::{attach3, with_contiguous_rows};
use crate::error::Result;

/// The sum of validated tensors.
pub(super) fn gated_sum([averages, gate, y]: [&Tensor; 3], heads: usize) -> Result<Tensor> {
    let (averages, gate, y) =
        (with_contiguous_rows(averages)?, with_contiguous_rows(gate)?, with_contiguous_rows(y)?);
    by_float!("gated_sum", averages.dtype(), T => {
        let (b, _, n, d) = averages.dims4()?;
        let sum = with_inputs::<T, _>([&averages, &gate, &y], heads, |inputs| forward(&inputs))?;
        Ok(attach3("gated_sum", [&averages, &gate, &y], (sum, (b, heads, n, d).into()), move |inputs, _, dy| {
            backward::<T>(inputs, heads, dy)
        })?)
    })
}

struct Inputs<'a, T> {
    averages: Rows<'a, T>,
    gate: Rows<'a, T>,
    y: Rows<'a, T>,
    /// H, R, N and the heads of y.
    heads: usize,
    per_head: usize,
    rows: usize,
    y_heads: usize,
}

fn with_inputs<T: Element, R>(
    [averages, gate, y]: [&Tensor; 3],
    heads: usize,
    f: impl FnOnce(Inputs<'_, T>) -> R,
) -> candle_core::Result<R> {
    let ((a, al), (g, gl), (ys, yl)) =
        (averages.storage_and_layout(), gate.storage_and_layout(), y.storage_and_layout());
    Ok(f(Inputs {
        averages: Rows::new(&a, al)?,
        gate: Rows::new(&g, gl)?,
        y: Rows::new(&ys, yl)?,
        heads,
        per_head: averages.dim(1)? / heads,
        rows: averages.dim(2)?,
        y_heads: y.dim(1)?,
    }))
}

impl<T: Element> Inputs<'_, T> {
    /// Batch entry, head and row of row `i` of the result.
    #[inline(always)]
    fn position(&self, i: usize) -> (usize, usize, usize) {
        (i / (self.heads * self.rows), i / self.rows % self.heads, i % self.rows)
    }

    /// The gate of average `r` of this head and row.
    #[inline(always)]
    fn sigmoid(&self, b: usize, average: usize, n: usize) -> T::Acc {
        let logit = self.gate.row(b * self.heads * self.per_head + average)[n].up();
        (T::Acc::of(1.0) + (-logit).exp_fast()).recip()
    }

    /// The row of y that belongs to a row of the result.
    #[inline(always)]
    fn y_row(&self, b: usize, h: usize, n: usize) -> Option<usize> {
        (h < self.y_heads).then(|| (b * self.y_heads + h) * self.rows + n)
    }

    /// The row of an average.
    #[inline(always)]
    fn average(&self, b: usize, average: usize, n: usize) -> usize {
        (b * self.heads * self.per_head + average) * self.rows + n
    }
}

fn forward<T: Element>(inputs: &Inputs<'_, T>) -> Vec<T> {
    let d = inputs.averages.len();
    let mut out = vec![T::zero(); inputs.averages.count() / inputs.per_head * d];
    let rows = rows_per_chunk(d);
    for_chunks(&mut out, rows * d, |chunk, out| {
        let mut sum = vec![T::Acc::default(); d];
        vectorize(|| {
            for (j, out) in out.chunks_exact_mut(d).enumerate() {
                let (b, h, n) = inputs.position(chunk * rows + j);
                match inputs.y_row(b, h, n) {
                    Some(i) => sum.iter_mut().zip(inputs.y.row(i)).for_each(|(sum, y)| *sum = y.up()),
                    None => sum.fill(T::Acc::default()),
                }
                for average in h * inputs.per_head..(h + 1) * inputs.per_head {
                    let gate = inputs.sigmoid(b, average, n);
                    let row = inputs.averages.row(inputs.average(b, average, n));
                    sum.iter_mut().zip(row).for_each(|(sum, m)| *sum += gate * m.up());
                }
                out.iter_mut().zip(&sum).for_each(|(out, &sum)| *out = T::down(sum));
            }
        });
    });
    out
}

/// With `s = sigmoid(gate)`: `daverages = s dy`, `dgate = s (1 - s) <dy, averages>`, and the gradient of y is that of its
/// heads.
fn backward<T: Element>(
    [averages, gate, y]: [&Tensor; 3],
    heads: usize,
    dy: &Tensor,
) -> candle_core::Result<[Tensor; 3]> {
    let dy = with_contiguous_rows(dy)?;
    let (daverages, dgate) = {
        let (storage, layout) = dy.storage_and_layout();
        let dy = Rows::<T>::new(&storage, layout)?;
        with_inputs::<T, _>([averages, gate, y], heads, |inputs| gradients(&inputs, &dy))?
    };
    Ok([
        Tensor::from_vec(daverages, averages.shape(), averages.device())?,
        Tensor::from_vec(dgate, gate.shape(), gate.device())?,
        dy.narrow(1, 0, y.dim(1)?)?,
    ])
}

/// The gradients of averages and gates.
fn gradients<T: Element>(inputs: &Inputs<'_, T>, dy: &Rows<'_, T>) -> (Vec<T>, Vec<T>) {
    let d = dy.len();
    let mut daverages = vec![T::zero(); inputs.averages.count() * d];
    let mut dgate = vec![T::zero(); inputs.averages.count()];
    let rows = rows_per_chunk(d);
    for_chunks2((&mut daverages, rows * d), (&mut dgate, rows), |chunk, daverages, dgate| {
        vectorize(|| {
            for (j, (daverages, dgate)) in daverages.chunks_exact_mut(d).zip(dgate).enumerate() {
                // Row (b, average, n) of the averages.
                let i = chunk * rows + j;
                let (n, at) = (i % inputs.rows, i / inputs.rows);
                let (average, b) =
                    (at % (inputs.heads * inputs.per_head), at / (inputs.heads * inputs.per_head));
                let dy = dy.row((b * inputs.heads + average / inputs.per_head) * inputs.rows + n);
                let gate = inputs.sigmoid(b, average, n);
                daverages.iter_mut().zip(dy).for_each(|(da, &dy)| *da = T::down(gate * dy.up()));
                let product = sum2(dy, inputs.averages.row(i), |dy: T, m: T| dy.up() * m.up());
                *dgate = T::down(gate * (T::Acc::of(1.0) - gate) * product);
            }
        });
    });
    (daverages, dgate)
}

#[cfg(test)]
mod tests {
    use candle_core::{DType, Result, Tensor};

    use crate::gated_sum;
    use crate::ops::agreement::{agree, noise};

    #[test]
    fn the_operator_agrees_with_its_composition() -> Result<()> {
        let (b, heads, r, n, d) = (2, 3, 2, 5, 7);
        for dtype in [DType::F64, DType::F32, DType::BF16, DType::F16] {
            for y_heads in [1, 3] {
                let inputs = [
                    noise(1, &[b, heads * r, n, d], dtype)?,
                    noise(2, &[b, heads * r, n], dtype)?,
                    noise(3, &[b, n, y_heads, d], dtype)?,
                ];
                let composed = |t: &[Tensor]| {
                    let wide =
                        |t: &Tensor| t.to_dtype(if dtype == DType::F64 { DType::F64 } else { DType::F32 });
                    let gate = sigmoid(&wide(&t[1])?)?.unsqueeze(3)?;
                    let sum = wide(&t[0])?.broadcast_mul(&gate)?.reshape((b, heads, r, n, d))?.sum(2)?;
                    let y = wide(&t[2])?.transpose(1, 2)?.pad_with_zeros(1, 0, heads - y_heads)?;
                    (sum + y)?.to_dtype(dtype)
                };
                agree(&inputs, |t| Ok(gated_sum(&t[0], &t[1], &t[2].transpose(1, 2)?, heads)?), composed)?;
            }
        }
        Ok(())
    }

    fn sigmoid(t: &Tensor) -> Result<Tensor> {
        (t.neg()?.exp()? + 1.0)?.recip()
    }

    #[test]
    fn shapes_that_do_not_fit_are_errors() -> Result<()> {
        let t = |shape: &[usize]| noise(1, shape, DType::F32);
        let error = gated_sum(&t(&[1, 4, 2, 3])?, &t(&[1, 4, 2])?, &t(&[1, 3, 2, 3])?, 2);
        assert!(error.unwrap_err().to_string().contains("[1, 3, 2, 3]"));
        Ok(())
    }
}
