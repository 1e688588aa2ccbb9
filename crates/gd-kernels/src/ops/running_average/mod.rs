//! Gated running average of the values, the memory of a Beacon.
//!
//! With `a_t = sigmoid(decay_t)`: `n_t = a_t n_(t-1) + e^(write_t) v_t`, `d_t = a_t d_(t-1) + e^(write_t)` and
//! `m_t = n_t / d_t`. Neither n, d nor `e^write` is ever computed, since they may leave the range of their type: with
//! `log d_t = logaddexp(log a_t + log d_(t-1), write_t)` and the share of the present value
//! `g_t = e^(write_t - log d_t)` in [0, 1], `m_t = m_(t-1) + g_t (v_t - m_(t-1))`.
//!
//! The scalars of a head are computed sequentially over the whole sequence. The value rows are computed in blocks of
//! fixed length in parallel, with a sequential carry between the blocks, so that results have the same bits for any
//! number of threads.

mod cpu;
#[cfg(feature = "gpu")]
pub(crate) mod gpu;

use candle_core::{DType, Tensor};

use crate::backend::cpu::element::acc_dtype;
use crate::backend::dispatch::on_gpu;
use crate::backend::graph::with_contiguous_rows;
use crate::backend::span::{Pass, operator_span};
use crate::backend::support::require_device;
use crate::error::{Error, Result};

/// The state of a [`running_average`] after a part of a sequence, with which the next call continues it. In f32 (f64
/// for f64 input), without gradient.
#[derive(Debug, Clone)]
pub struct AverageState {
    /// The last average `[B, H, D]`.
    pub mean: Tensor,
    /// `log d` `[B, H]`, the logarithm of the denominator; minus infinity at the start of a sequence.
    pub log_weight: Tensor,
}

/// The sizes of a running average.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[cfg_attr(
    not(feature = "gpu"),
    allow(unreachable_pub, reason = "builds for a GPU export it to tests of launches")
)]
pub struct Sizes {
    /// B.
    pub batch: usize,
    /// H, a multiple of Hk.
    pub heads: usize,
    /// Hk.
    pub value_heads: usize,
    /// N.
    pub rows: usize,
    /// D.
    pub dim: usize,
    /// The dtype of all tensors but the states.
    pub dtype: DType,
}

impl Sizes {
    /// The number of independent recurrences, B * H.
    pub(crate) fn sequences(&self) -> usize {
        self.batch * self.heads
    }

    /// The number of averages that share a value head, H / Hk.
    pub(crate) fn group(&self) -> usize {
        self.heads / self.value_heads
    }

    /// The value sequence that sequence `s` averages.
    pub(crate) fn values_of(&self, s: usize) -> usize {
        s / self.heads * self.value_heads + s % self.heads / self.group()
    }
}

/// Gated running averages of the values, `m_t = n_t / d_t` with `n_t = a_t n_(t-1) + e^(write_t) v_t`,
/// `d_t = a_t d_(t-1) + e^(write_t)` and `a_t = sigmoid(decay_t)`.
///
/// * `decay`, `write`: logits `[B, H, N]`; `v`: `[B, Hk, N, D]`, all of one dtype (f64, f32, f16 or bf16 on the CPU;
///   f32, f16 or bf16 on a GPU). H is a multiple of Hk; average h reads value head `h / (H / Hk)`.
/// * `state`: the state that the call for the preceding part of the sequence returned; none at the start.
///
/// Returns m `[B, H, N, D]` and the state after the last row. decay, write and v get gradients; `state` and the
/// returned state are constants. A decay of minus infinity discards everything before (a sequence boundary); a write
/// weight of minus infinity leaves the average unchanged. Finite inputs never give NaN.
///
/// # Errors
/// [`Error::Invalid`] for shapes or dtypes that do not fit, [`Error::Unsupported`] for a device without kernels in this
/// build.
///
/// # Examples
/// ```
/// use candle_core::{Device, Tensor};
/// use gd_kernels::running_average;
///
/// // A decay logit of 0 halves the weight of the past, a write logit of 0 gives a row weight 1.
/// let zeros = Tensor::new(&[[[0f32, 0.0]]], &Device::Cpu)?;
/// let v = Tensor::new(&[[[[3f32], [6.0]]]], &Device::Cpu)?;
/// let (m, _) = running_average(&zeros, &zeros, &v, None)?;
/// let m = m.flatten_all()?.to_vec1::<f32>()?;
/// assert_eq!(m[0], 3.0);
/// assert!((m[1] - (0.5 * 3.0 + 6.0) / 1.5).abs() < 1e-5);
/// # Ok::<(), gd_kernels::Error>(())
/// ```
pub fn running_average(
    decay: &Tensor,
    write: &Tensor,
    v: &Tensor,
    state: Option<&AverageState>,
) -> Result<(Tensor, AverageState)> {
    let _span = operator_span("running_average", Pass::Forward);
    let sizes = validate(decay, write, v, state)?;
    let (decay, write, v) = (decay.contiguous()?, write.contiguous()?, with_contiguous_rows(v)?);
    on_gpu!(v.device(), G => gpu::tensors::running_average::<G>(sizes, [&decay, &write, &v], state));
    cpu::running_average(sizes, [&decay, &write, &v], state)
}

/// Checks shapes, dtypes and devices; returns the sizes.
fn validate(decay: &Tensor, write: &Tensor, v: &Tensor, state: Option<&AverageState>) -> Result<Sizes> {
    let ([batch, heads, n], [vb, value_heads, vn, d]) = (decay.dims(), v.dims()) else {
        return Err(Error::Invalid(format!(
            "running_average: decay {:?} and v {:?}; [B, H, N] and [B, Hk, N, D] expected",
            decay.dims(),
            v.dims()
        )));
    };
    let sizes = Sizes {
        batch: *batch,
        heads: *heads,
        value_heads: *value_heads,
        rows: *n,
        dim: *d,
        dtype: v.dtype(),
    };
    if decay.dims() != write.dims() || batch != vb || n != vn {
        return Err(Error::Invalid(format!(
            "running_average: decay {:?}, write {:?} and v {:?} differ in B, H or N",
            decay.dims(),
            write.dims(),
            v.dims()
        )));
    }
    if decay.elem_count() == 0 || v.elem_count() == 0 || !heads.is_multiple_of(*value_heads) {
        return Err(Error::Invalid(format!(
            "running_average: {heads} heads over {value_heads} value heads with v {:?}; no size may be 0 and H must be a multiple of Hk",
            v.dims()
        )));
    }
    if decay.dtype() != v.dtype() || write.dtype() != v.dtype() {
        return Err(Error::Invalid(format!(
            "running_average: decay is {:?}, write {:?}, v {:?}",
            decay.dtype(),
            write.dtype(),
            v.dtype()
        )));
    }
    if let Some(AverageState { mean, log_weight }) = state {
        let wide = acc_dtype(v.dtype());
        let fits = mean.dims() == [*batch, *heads, *d] && log_weight.dims() == [*batch, *heads];
        if !fits || mean.dtype() != wide || log_weight.dtype() != wide {
            return Err(Error::Invalid(format!(
                "running_average: state mean {:?} {:?} and log_weight {:?} {:?}; {:?} and {:?} in {wide:?} expected",
                mean.dims(),
                mean.dtype(),
                log_weight.dims(),
                log_weight.dtype(),
                [*batch, *heads, *d],
                [*batch, *heads]
            )));
        }
    }
    let states = state.map(|s| [&s.mean, &s.log_weight]);
    require_device("running_average", v.device())?;
    for t in [decay, write].into_iter().chain(states.into_iter().flatten()) {
        if !t.device().same_device(v.device()) {
            return Err(Error::Invalid("running_average: tensors on different devices".into()));
        }
    }
    Ok(sizes)
}
