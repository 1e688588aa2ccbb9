//! The CPU implementation of [`causal_conv`](super::causal_conv): one pass forward and one backward.

use candle_core::{Shape, Tensor};

use crate::backend::cpu::element::{Element, by_float};
use crate::backend::cpu::parallel::{for_chunks, for_chunks2, rows_per_chunk, sum_rows, vectorize};
use crate::backend::cpu::view::Rows;
use crate::backend::graph::{attach2, with_contiguous_rows};
use crate::error::Result;
use crate::mask::sequence;

/// y from validated x `[B, N, C]`, weight `[C, W]` and the rows before the start `[B, W - 1, C]`.
pub(super) fn convolve(
    x: &Tensor,
    weight: &Tensor,
    past: Tensor,
    boundaries: Option<Vec<Vec<usize>>>,
) -> Result<Tensor> {
    Ok(by_float!("causal_conv", x.dtype(), T => {
        let filter = transposed::<T>(weight)?;
        let y = with_window::<T, _>(x, &past, boundaries.as_deref(), |window| forward(window, &filter))?;
        attach2("causal_conv", x, weight, (y, x.shape().clone()), move |x, weight, dy| {
            backward::<T>(x, weight, &past, boundaries.as_deref(), dy)
        })?
    }))
}

/// The weight transposed to `[W, C]`, so that coefficient `w` of all channels is one row.
fn transposed<T: Element>(weight: &Tensor) -> Result<Vec<T::Acc>> {
    let (channels, width) = weight.dims2()?;
    let (storage, layout) = weight.storage_and_layout();
    let rows = Rows::<T>::new(&storage, layout)?;
    let mut filter = vec![T::Acc::default(); width * channels];
    for c in 0..channels {
        for (w, &value) in rows.row(c).iter().enumerate() {
            filter[w * channels + c] = value.up();
        }
    }
    Ok(filter)
}

/// The input rows x `[B, N, C]`, and the rows before them `[B, W - 1, C]`.
struct Window<'a, T> {
    x: Rows<'a, T>,
    past: Rows<'a, T>,
    boundaries: Option<&'a [Vec<usize>]>,
    n: usize,
    width: usize,
}

impl<'a, T: Element> Window<'a, T> {
    /// The input row that coefficient `w` multiplies for output row `t` of batch entry `b`: row `t - (W - 1) + w`.
    #[inline(always)]
    fn row(&self, b: usize, t: usize, w: usize) -> &'a [T] {
        let before = self.width - 1;
        match (t + w).checked_sub(before) {
            Some(at) => self.x.row(b * self.n + at),
            None => self.past.row(b * before + t + w),
        }
    }

    /// For row `t` of batch entry `b`: the first coefficient whose input row belongs to the same sequence, and the end
    /// of that sequence.
    fn sequence_bounds(&self, b: usize, t: usize) -> (usize, usize) {
        match self.boundaries {
            None => (0, self.n),
            Some(boundaries) => {
                let own = sequence(boundaries, b, t);
                ((self.width - 1).saturating_sub(t - own.start), own.end)
            }
        }
    }
}

fn with_window<T: Element, R>(
    x: &Tensor,
    past: &Tensor,
    boundaries: Option<&[Vec<usize>]>,
    f: impl FnOnce(&Window<T>) -> R,
) -> candle_core::Result<R> {
    let (xs, xl) = x.storage_and_layout();
    let (ps, pl) = past.storage_and_layout();
    let (n, width) = (x.dim(1)?, past.dim(1)? + 1);
    Ok(f(&Window { x: Rows::new(&xs, xl)?, past: Rows::new(&ps, pl)?, boundaries, n, width }))
}

fn forward<T: Element>(window: &Window<T>, filter: &[T::Acc]) -> Vec<T> {
    let channels = window.x.len();
    let mut y = vec![T::zero(); window.x.count() * channels];
    let rows = rows_per_chunk(channels);
    for_chunks(&mut y, rows * channels, |chunk, y| {
        let mut sum = vec![T::Acc::default(); channels];
        vectorize(|| {
            for (j, y) in y.chunks_exact_mut(channels).enumerate() {
                let (b, t) = ((chunk * rows + j) / window.n, (chunk * rows + j) % window.n);
                sum.fill(T::Acc::default());
                let (first, _) = window.sequence_bounds(b, t);
                for (w, coefficients) in filter.chunks_exact(channels).enumerate().skip(first) {
                    for ((s, &x), &c) in sum.iter_mut().zip(window.row(b, t, w)).zip(coefficients) {
                        *s += x.up() * c;
                    }
                }
                y.iter_mut().zip(&sum).for_each(|(y, &s)| *y = T::down(s));
            }
        });
    });
    y
}

/// `dx[t] = sum_w weight[w] * dy[t + W-1 - w]` and `dweight[w] = sum over b, t of dy[t] * input(t, w)`.
/// Each chunk of rows adds up its own dweight; the chunks are then added in order.
fn backward<T: Element>(
    x: &Tensor,
    weight: &Tensor,
    past: &Tensor,
    boundaries: Option<&[Vec<usize>]>,
    dy: &Tensor,
) -> candle_core::Result<[Tensor; 2]> {
    let (_, n, channels) = x.dims3()?;
    let width = weight.dim(1)?;
    let dy = with_contiguous_rows(dy)?;
    let (ds, dl) = dy.storage_and_layout();
    let dy_rows = Rows::<T>::new(&ds, dl)?;
    let filter = transposed::<T>(weight)?;
    let rows = rows_per_chunk(channels);
    let mut dx = vec![T::zero(); dy_rows.count() * channels];
    let mut parts = vec![T::Acc::default(); dy_rows.count().div_ceil(rows) * width * channels];
    with_window::<T, _>(x, past, boundaries, |window| {
        for_chunks2((&mut dx, rows * channels), (&mut parts, width * channels), |chunk, dx, dw| {
            let mut sum = vec![T::Acc::default(); channels];
            vectorize(|| {
                for (j, dx) in dx.chunks_exact_mut(channels).enumerate() {
                    let (b, t) = ((chunk * rows + j) / n, (chunk * rows + j) % n);
                    let dy_t = dy_rows.row(b * n + t);
                    sum.fill(T::Acc::default());
                    let (first, end) = window.sequence_bounds(b, t);
                    let both = filter.chunks_exact(channels).zip(dw.chunks_exact_mut(channels));
                    for (w, (coefficients, dw)) in both.enumerate() {
                        if w >= first {
                            for ((dw, &x), &dy) in dw.iter_mut().zip(window.row(b, t, w)).zip(dy_t) {
                                *dw += x.up() * dy.up();
                            }
                        }
                        let later = t + width - 1 - w;
                        if later < end {
                            let dy = dy_rows.row(b * n + later);
                            for ((s, &dy), &c) in sum.iter_mut().zip(dy).zip(coefficients) {
                                *s += dy.up() * c;
                            }
                        }
                    }
                    dx.iter_mut().zip(&sum).for_each(|(dx, &s)| *dx = T::down(s));
                }
            });
        });
    })?;
    let dw_transposed = sum_rows(&parts, width * channels);
    let dw: Vec<T> =
        (0..channels * width).map(|i| T::down(dw_transposed[i % width * channels + i / width])).collect();
    let shape = Shape::from((channels, width));
    Ok([Tensor::from_vec(dx, x.shape(), x.device())?, Tensor::from_vec(dw, shape, x.device())?])
}
