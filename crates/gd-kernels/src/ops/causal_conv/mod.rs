//! Depthwise causal convolution: `y[b,t,c] = sum_w weight[c,w] * x[b, t-W+1+w, c]`.

mod cpu;
#[cfg(feature = "gpu")]
pub(crate) mod gpu;

use candle_core::Tensor;

use crate::backend::dispatch::{on_cpu, on_gpu};
use crate::backend::graph::with_contiguous_rows;
use crate::backend::span::{Pass, operator_span};
use crate::backend::support::require_device;
use crate::error::{Error, Result};
use crate::mask::check_boundaries;

/// Convolves each channel of `x` with its own causal filter: `y[b,t,c] = sum_w weight[c,w] x[b,t-W+1+w,c]`.
///
/// * `x`: `[B, N, C]`; `weight`: `[C, W]` of the same dtype (f64, f32, f16 or bf16 on the CPU; f32, f16 or bf16 on a
///   GPU).
/// * `state`: the last W - 1 rows of an earlier call `[B, W-1, C]`; without it the rows before the start are 0.
///
/// Returns y `[B, N, C]` and the new state, with which the next call continues the sequence; chunks of a sequence may
/// be as short as one row. x and weight get gradients. The state is a constant: no gradient flows into `state`, and the
/// returned state is detached.
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
    let _span = operator_span("causal_conv", Pass::Forward);
    let (batch, _, channels, width) = validate(x, weight, state)?;
    let past = match state {
        Some(state) => state.detach().contiguous()?,
        None => Tensor::zeros((batch, width - 1, channels), x.dtype(), x.device())?,
    };
    let x = with_contiguous_rows(x)?;
    let next = next_state(&past, &x.detach(), width - 1)?;
    Ok((convolve(&x, weight, past, None)?, next))
}

/// [`causal_conv`] of packed sequences: the rows before the start of each sequence count as 0.
///
/// * `x`: `[B, N, C]`; `weight`: `[C, W]`, as for [`causal_conv`].
/// * `boundaries`: the rows `[0, e1, e2, .., N]` where the sequences start and end, one list for all batch entries or
///   one for each, as in [`Mask::packed`](crate::Mask::packed).
///
/// Returns y `[B, N, C]`. x and weight get gradients.
///
/// # Errors
/// As [`causal_conv`], and [`Error::Invalid`] for boundaries that do not rise from 0 to N.
pub fn packed_causal_conv(x: &Tensor, weight: &Tensor, boundaries: &[Vec<usize>]) -> Result<Tensor> {
    let _span = operator_span("causal_conv", Pass::Forward);
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
        gpu::tensors::convolve::<G>(x, &weight, &past, boundaries.as_deref())
    });
    cpu::convolve(x, &weight, past, boundaries)
}

/// Checks the arguments; returns (B, N, C, W).
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
        // The state would have no elements, and candle has no empty tensors on a GPU.
        return Err(Error::Unsupported("causal_conv of width 1 on a GPU; 2 or more is supported".into()));
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
