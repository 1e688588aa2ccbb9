//! Depthwise causal convolution: `y[b,t,c] = sum_w weight[c,w] * x[b, t-W+1+w, c]`.
//!
//! x and y `[B, N, C]`, weight `[C, W]`; weight `[.., W-1]` meets the present row. Rows before the
//! start come from the state `[B, W-1, C]`, or are 0. The returned state is the last W-1 rows of
//! state and x together, so that a sequence may be given in pieces, down to single rows. Or x holds
//! several packed sequences, each of which starts with rows of 0 before it.

#[cfg(feature = "gpu")]
pub(crate) mod gpu;

use candle_core::{Shape, Tensor};

use crate::backend::cpu::element::Element;
use crate::backend::cpu::parallel::{for_chunks, for_chunks2, rows_per_chunk, sum_rows, vectorize};
use crate::backend::cpu::view::Rows;
use crate::backend::dispatch::{on_cpu, on_gpu};
use crate::backend::graph::{attach2, with_contiguous_rows};
use crate::backend::support::require_device;
use crate::by_float;
use crate::error::{Error, Result};
use crate::mask::{check_boundaries, sequence};

/// Convolves every channel of `x` with its own filter: `y[b,t,c] = sum_w weight[c,w] x[b,t-W+1+w,c]`.
///
/// * `x`: `[B, N, C]`; `weight`: `[C, W]` of the same dtype (f64, f32, f16 or bf16 on the CPU; f32, f16 or bf16 on a GPU).
/// * `state`: the last W - 1 rows of an earlier call `[B, W-1, C]`; without it the rows before the start are 0.
///
/// Returns y `[B, N, C]` and the new state, so that a sequence may be given in chunks, down to single rows. x and weight
/// get gradients. The state is a constant: no gradient flows into `state`, and the returned state is detached.
///
/// # Errors
/// [`Error::Invalid`] for shapes or dtypes that do not fit, [`Error::Unsupported`] for a device without kernels in this
/// build.
///
/// # Examples
/// ```
/// use candle_core::{Device, Tensor};
/// use gd_kernels::causal_conv;
///
/// let weight = Tensor::new(&[[1f32, 10.0]], &Device::Cpu)?;
/// let x = Tensor::new(&[[[1f32], [2.0], [3.0]]], &Device::Cpu)?;
/// let (y, _) = causal_conv(&x, &weight, None)?;
/// assert_eq!(y.flatten_all()?.to_vec1::<f32>()?, [10.0, 21.0, 32.0]);
///
/// // The same in two chunks.
/// let (_, state) = causal_conv(&x.narrow(1, 0, 2)?, &weight, None)?;
/// let (y, _) = causal_conv(&x.narrow(1, 2, 1)?, &weight, Some(&state))?;
/// assert_eq!(y.flatten_all()?.to_vec1::<f32>()?, [32.0]);
/// # Ok::<(), gd_kernels::Error>(())
/// ```
pub fn causal_conv(x: &Tensor, weight: &Tensor, state: Option<&Tensor>) -> Result<(Tensor, Tensor)> {
    let (batch, _, channels, width) = validate(x, weight, state)?;
    let past = match state {
        Some(state) => state.detach().contiguous()?,
        None => Tensor::zeros((batch, width - 1, channels), x.dtype(), x.device())?,
    };
    let x = with_contiguous_rows(x)?;
    let next = next_state(&past, &x.detach(), width - 1)?;
    Ok((convolve(&x, weight, past, None)?, next))
}

/// The same for packed sequences: none of them sees rows of another. `boundaries` holds, per batch
/// entry (or once for all), the places `[0, e1, e2, .., N]` where they start and end, as in
/// [`Mask::packed`](crate::Mask::packed).
///
/// # Errors
/// As [`causal_conv`], and boundaries that do not rise from 0 to N.
pub fn packed_causal_conv(x: &Tensor, weight: &Tensor, boundaries: &[Vec<usize>]) -> Result<Tensor> {
    let (batch, n, channels, width) = validate(x, weight, None)?;
    check_boundaries(boundaries, batch, n)?;
    let past = Tensor::zeros((batch, width - 1, channels), x.dtype(), x.device())?;
    convolve(&with_contiguous_rows(x)?, weight, past, Some(boundaries.to_vec()))
}

fn convolve(
    x: &Tensor,
    weight: &Tensor,
    past: Tensor,
    boundaries: Option<Vec<Vec<usize>>>,
) -> Result<Tensor> {
    let weight = weight.contiguous()?;
    on_gpu!(x.device(), G => {
        crate::ops::causal_conv::gpu::tensors::convolve::<G>(x, &weight, &past, boundaries.as_deref())
    });
    Ok(by_float!("causal_conv", x.dtype(), T => {
        let taps = taps::<T>(&weight)?;
        let y = with_window::<T, _>(x, &past, boundaries.as_deref(), |window| forward(window, &taps))?;
        attach2("causal_conv", x, &weight, (y, x.shape().clone()), move |x, weight, dy| {
            backward::<T>(x, weight, &past, boundaries.as_deref(), dy)
        })?
    }))
}

/// (B, N, C, W), or what does not fit.
fn validate(x: &Tensor, weight: &Tensor, state: Option<&Tensor>) -> Result<(usize, usize, usize, usize)> {
    let ([batch, n, channels], [rows, width]) = (x.dims(), weight.dims()) else {
        return Err(Error::Invalid(format!(
            "causal_conv: x {:?} and weight {:?}; [B, N, C] and [C, W] expected",
            x.dims(),
            weight.dims()
        )));
    };
    if rows != channels || *width == 0 || *channels == 0 || *n == 0 || *batch == 0 {
        return Err(Error::Invalid(format!(
            "causal_conv: weight {:?} does not fit x {:?} (its rows are the channels; no size may be 0)",
            weight.dims(),
            x.dims()
        )));
    }
    if *width == 1 && !on_cpu(x.device()) {
        // The state has no elements then, and candle holds no such tensor there.
        return Err(Error::Unsupported("causal_conv of width 1 on a GPU; 2 or more is".into()));
    }
    if weight.dtype() != x.dtype() {
        return Err(Error::Invalid(format!(
            "causal_conv: weight is {:?}, x is {:?}",
            weight.dtype(),
            x.dtype()
        )));
    }
    if let Some(s) = state {
        let want = [*batch, width - 1, *channels];
        if s.dims() != want || s.dtype() != x.dtype() {
            return Err(Error::Invalid(format!(
                "causal_conv: state {:?} {:?}, {want:?} {:?} expected",
                s.dims(),
                s.dtype(),
                x.dtype()
            )));
        }
    }
    require_device("causal_conv", x.device())?;
    for t in [Some(weight), state].into_iter().flatten() {
        if !t.device().same_device(x.device()) {
            return Err(Error::Invalid("causal_conv: x, weight and state are on different devices".into()));
        }
    }
    Ok((*batch, *n, *channels, *width))
}

/// The last `keep` rows of `past` followed by `x`.
fn next_state(past: &Tensor, x: &Tensor, keep: usize) -> Result<Tensor> {
    let n = x.dim(1)?;
    if n >= keep {
        // A copy: a view would keep the whole of x alive.
        return Ok(x.narrow(1, n - keep, keep)?.force_contiguous()?);
    }
    Ok(Tensor::cat(&[&past.narrow(1, n, keep - n)?, x], 1)?)
}

/// The weight as `[W, C]`, so that one tap of all channels is one row.
fn taps<T: Element>(weight: &Tensor) -> Result<Vec<T::Acc>> {
    let (channels, width) = weight.dims2()?;
    let (storage, layout) = weight.storage_and_layout();
    let rows = Rows::<T>::new(&storage, layout)?;
    let mut taps = vec![T::Acc::default(); width * channels];
    for c in 0..channels {
        for (w, &value) in rows.row(c).iter().enumerate() {
            taps[w * channels + c] = value.up();
        }
    }
    Ok(taps)
}

/// x with the rows before it.
struct Window<'a, T> {
    x: Rows<'a, T>,
    past: Rows<'a, T>,
    boundaries: Option<&'a [Vec<usize>]>,
    n: usize,
    width: usize,
}

impl<'a, T: Element> Window<'a, T> {
    /// The input of tap `w` for row `t` of batch entry `b`: row `t - (W - 1) + w`.
    #[inline(always)]
    fn row(&self, b: usize, t: usize, w: usize) -> &'a [T] {
        let before = self.width - 1;
        match (t + w).checked_sub(before) {
            Some(at) => self.x.row(b * self.n + at),
            None => self.past.row(b * before + t + w),
        }
    }

    /// For row `t` of batch entry `b` the first tap that meets a row of its sequence, and the end of the
    /// sequence.
    fn reach(&self, b: usize, t: usize) -> (usize, usize) {
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

fn forward<T: Element>(window: &Window<T>, taps: &[T::Acc]) -> Vec<T> {
    let channels = window.x.len();
    let mut y = vec![T::zero(); window.x.count() * channels];
    let rows = rows_per_chunk(channels);
    for_chunks(&mut y, rows * channels, |chunk, y| {
        let mut sum = vec![T::Acc::default(); channels];
        vectorize(|| {
            for (j, y) in y.chunks_exact_mut(channels).enumerate() {
                let (b, t) = ((chunk * rows + j) / window.n, (chunk * rows + j) % window.n);
                sum.fill(T::Acc::default());
                let (first, _) = window.reach(b, t);
                for (w, tap) in taps.chunks_exact(channels).enumerate().skip(first) {
                    for ((s, &x), &tap) in sum.iter_mut().zip(window.row(b, t, w)).zip(tap) {
                        *s += x.up() * tap;
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
    let taps = taps::<T>(weight)?;
    let rows = rows_per_chunk(channels);
    let mut dx = vec![T::zero(); dy_rows.count() * channels];
    let mut parts = vec![T::Acc::default(); dy_rows.count().div_ceil(rows) * width * channels];
    with_window::<T, _>(x, past, boundaries, |window| {
        for_chunks2((&mut dx, rows * channels), (&mut parts, width * channels), |chunk, dx, dw| {
            let mut sum = vec![T::Acc::default(); channels];
            vectorize(|| {
                for (j, dx) in dx.chunks_exact_mut(channels).enumerate() {
                    let (b, t) = ((chunk * rows + j) / n, (chunk * rows + j) % n);
                    let present = dy_rows.row(b * n + t);
                    sum.fill(T::Acc::default());
                    let (first, end) = window.reach(b, t);
                    let both = taps.chunks_exact(channels).zip(dw.chunks_exact_mut(channels));
                    for (w, (tap, dw)) in both.enumerate() {
                        if w >= first {
                            for ((dw, &x), &dy) in dw.iter_mut().zip(window.row(b, t, w)).zip(present) {
                                *dw += x.up() * dy.up();
                            }
                        }
                        let later = t + width - 1 - w;
                        if later < end {
                            let dy = dy_rows.row(b * n + later);
                            for ((s, &dy), &tap) in sum.iter_mut().zip(dy).zip(tap) {
                                *s += dy.up() * tap;
                            }
                        }
                    }
                    dx.iter_mut().zip(&sum).for_each(|(dx, &s)| *dx = T::down(s));
                }
            });
        });
    })?;
    let by_tap = sum_rows(&parts, width * channels);
    let dw: Vec<T> =
        (0..channels * width).map(|i| T::down(by_tap[i % width * channels + i / width])).collect();
    let shape = Shape::from((channels, width));
    Ok([Tensor::from_vec(dx, x.shape(), x.device())?, Tensor::from_vec(dw, shape, x.device())?])
}
