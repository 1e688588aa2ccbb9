//! Gated running average of the values: the memory beside the selection.
//!
//! With `a_t = sigmoid(decay_t)`: `n_t = a_t n_(t-1) + e^(write_t) v_t`,
//! `d_t = a_t d_(t-1) + e^(write_t)`, `m_t = n_t / d_t`. Neither n, d nor `e^write` is ever formed:
//! with `log d_t = logaddexp(log a_t + log d_(t-1), write_t)` and the share of the present value
//! `g_t = e^(write_t - log d_t)` in [0, 1], `m_t = m_(t-1) + g_t (v_t - m_(t-1))`.
//!
//! decay, write `[B, H, N]`, v `[B, Hk, N, D]`, m `[B, H, N, D]`; head h reads values h / (H / Hk).
//!
//! The scalars of a head (`weights`) run over the whole sequence; the value rows (`blocks`) run in
//! blocks of fixed length, all at once, with an ordered carry between them.

pub(crate) mod cpu;
#[cfg(feature = "gpu")]
pub(crate) mod gpu;

use candle_core::{DType, Tensor};

use crate::backend::cpu::element::Element;
use crate::backend::cpu::view::{Rows, cpu_slice};
use crate::backend::dispatch::on_gpu;
use crate::backend::graph::{attach3, with_contiguous_rows};
use crate::backend::support::require_device;
use crate::by_float;
use crate::error::{Error, Result};

/// What [`running_average`] carries from one piece of a sequence to the next. Constants, without
/// gradient, in f32 (f64 for f64 input).
#[derive(Debug, Clone)]
pub struct AverageState {
    /// The last average `[B, H, D]`.
    pub mean: Tensor,
    /// `log d` `[B, H]`: minus infinity before anything was written.
    pub log_weight: Tensor,
}

/// Sizes of one call.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Sizes {
    batch: usize,
    heads: usize,
    value_heads: usize,
    n: usize,
    d: usize,
}

impl Sizes {
    /// Independent recurrences, B * H.
    fn sequences(&self) -> usize {
        self.batch * self.heads
    }

    /// Averages that share one value head.
    fn group(&self) -> usize {
        self.heads / self.value_heads
    }

    /// The value sequence that sequence `s` averages.
    fn values_of(&self, s: usize) -> usize {
        s / self.heads * self.value_heads + s % self.heads / self.group()
    }
}

/// Gated running averages of the values, `m_t = n_t / d_t` with `n_t = a_t n_(t-1) + e^(write_t) v_t`,
/// `d_t = a_t d_(t-1) + e^(write_t)` and `a_t = sigmoid(decay_t)`.
///
/// * `decay`, `write`: logits `[B, H, N]`; `v`: `[B, Hk, N, D]`, all of one dtype (f64, f32, f16 or bf16 on the CPU; f32,
///   f16 or bf16 on a GPU). H is a multiple of Hk; average h reads value head `h / (H / Hk)`.
/// * `state`: what an earlier call returned, to continue its sequence; none at the start.
///
/// Returns m `[B, H, N, D]` and the state after the last row. decay, write and v get gradients; `state` and the
/// returned state are constants. A decay of minus infinity discards everything before (a sequence boundary); a write
/// weight of minus infinity leaves the average unchanged. No other input gives NaN, as long as it is finite.
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
    let sizes = validate(decay, write, v, state)?;
    let (decay, write, v) = (decay.contiguous()?, write.contiguous()?, with_contiguous_rows(v)?);
    on_gpu!(v.device(), G => {
        crate::ops::running_average::gpu::tensors::running_average::<G>([&decay, &write, &v], state)
    });
    by_float!("running_average", v.dtype(), T => average::<T>(sizes, [&decay, &write, &v], state))
}

fn average<T: Element>(
    sizes: Sizes,
    inputs: [&Tensor; 3],
    state: Option<&AverageState>,
) -> Result<(Tensor, AverageState)> {
    let [_, _, v] = inputs;
    let device = v.device();
    let start_log = state.map(|s| flat::<T::Acc>(&s.log_weight)).transpose()?;
    let start_mean = state.map(|s| flat::<T::Acc>(&s.mean)).transpose()?;
    let (weights, log) = with_rows::<T, _>(inputs, |[decay, write, _]| {
        cpu::weights::forward(sizes, decay, write, start_log.as_deref())
    })?;
    let (m, mean) = with_rows::<T, _>(inputs, |[_, _, v]| {
        cpu::blocks::forward(sizes, v, &weights, start_mean.as_deref())
    })?;
    let state = AverageState {
        mean: Tensor::from_vec(mean, (sizes.batch, sizes.heads, sizes.d), device)?,
        log_weight: Tensor::from_vec(log, (sizes.batch, sizes.heads), device)?,
    };
    let shape = (sizes.batch, sizes.heads, sizes.n, sizes.d).into();
    let m = attach3("running_average", inputs, (m, shape), move |inputs, m, dm| {
        let dm = with_contiguous_rows(dm)?;
        let (ms, ml) = m.storage_and_layout();
        let (ds, dl) = dm.storage_and_layout();
        let (m, dm) = (Rows::<T>::new(&ms, ml)?, Rows::<T>::new(&ds, dl)?);
        let (dv, dtake) = with_rows::<T, _>(inputs, |[_, _, v]| {
            cpu::blocks::backward(sizes, v, &m, &dm, &weights, start_mean.as_deref())
        })?;
        let (ddecay, dwrite) = with_rows::<T, _>(inputs, |[decay, _, _]| {
            cpu::weights::backward::<T>(sizes, decay, &weights, &dtake)
        })?;
        let [decay, write, v] = inputs;
        Ok([
            Tensor::from_vec(ddecay, decay.shape(), decay.device())?,
            Tensor::from_vec(dwrite, write.shape(), write.device())?,
            Tensor::from_vec(dv, v.shape(), v.device())?,
        ])
    })?;
    Ok((m, state))
}

fn with_rows<T: Element, R>(
    [a, b, c]: [&Tensor; 3],
    f: impl FnOnce([&Rows<T>; 3]) -> R,
) -> candle_core::Result<R> {
    let ((a, al), (b, bl), (c, cl)) =
        (a.storage_and_layout(), b.storage_and_layout(), c.storage_and_layout());
    Ok(f([&Rows::new(&a, al)?, &Rows::new(&b, bl)?, &Rows::new(&c, cl)?]))
}

/// The elements of a small tensor.
fn flat<T: Element>(t: &Tensor) -> candle_core::Result<Vec<T>> {
    let t = t.contiguous()?;
    let (storage, layout) = t.storage_and_layout();
    let start = layout.start_offset();
    Ok(cpu_slice::<T>(&storage)?[start..start + t.elem_count()].to_vec())
}

fn validate(decay: &Tensor, write: &Tensor, v: &Tensor, state: Option<&AverageState>) -> Result<Sizes> {
    let ([batch, heads, n], [vb, value_heads, vn, d]) = (decay.dims(), v.dims()) else {
        return Err(Error::Invalid(format!(
            "running_average: decay {:?} and v {:?}; [B, H, N] and [B, Hk, N, D] expected",
            decay.dims(),
            v.dims()
        )));
    };
    let sizes = Sizes { batch: *batch, heads: *heads, value_heads: *value_heads, n: *n, d: *d };
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
        let wide = if v.dtype() == DType::F64 { DType::F64 } else { DType::F32 };
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
