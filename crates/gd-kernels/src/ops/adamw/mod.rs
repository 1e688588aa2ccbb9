//! AdamW (Loshchilov and Hutter, arXiv 1711.05101) and the norm of gradients by which it is clipped.
//!
//! [`State`] holds the moments of one parameter, and the f32 master weight of an f16 or bf16 parameter;
//! [`State::update`] updates the parameter in place. [`GradientSquares`] sums up the squares of all gradients. On a GPU
//! its [`verdict`](GradientSquares::verdict) is the scale of an update, or that it is skipped. It is computed and read
//! there, without a copy to the host: [`Scale::of_verdict`].

mod cpu;
#[cfg(feature = "gpu")]
pub(crate) mod gpu;
mod gradient_norm;

use candle_core::{DType, Device, Tensor, Var};

pub use self::gradient_norm::{GradientSquares, Limits, PendingVerdict, Verdict};
use crate::backend::cpu::element::acc_dtype;
use crate::backend::dispatch::{on_cpu, on_gpu, refused};
use crate::backend::span::{Pass, operator_span};
use crate::error::{Error, Result};

/// The settings of an optimizer for one update of one parameter.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Step {
    /// The number of this update of the parameter, from 1, for the bias correction of the moments.
    pub number: u32,
    /// Learning rate.
    pub lr: f64,
    /// Decay of the first moment, in [0, 1).
    pub beta1: f64,
    /// Decay of the second moment, in [0, 1).
    pub beta2: f64,
    /// Added to the square root of the second moment.
    pub eps: f64,
    /// Decoupled weight decay: a weight is multiplied by `1 - lr * weight_decay`.
    pub weight_decay: f64,
}

impl Step {
    /// The learning rate with the bias correction of the first moment after `t` updates.
    fn step_size(&self, t: u32) -> f64 {
        self.lr / (1.0 - self.beta1.powf(f64::from(t)))
    }

    /// The factor of the root of the second moment that corrects its bias after `t` updates.
    fn root_scale(&self, t: u32) -> f64 {
        (1.0 - self.beta2.powf(f64::from(t))).sqrt().recip()
    }

    /// The factor of a weight by its decay.
    fn weight_scale(&self) -> f64 {
        1.0 - self.lr * self.weight_decay
    }
}

/// The factor of the gradients of an update.
#[derive(Debug, Clone)]
pub struct Scale(ScaleOf);

#[derive(Debug, Clone)]
enum ScaleOf {
    Host(f64),
    Verdict { verdict: Tensor, previous: Option<Tensor> },
}

impl Scale {
    /// A factor that is given on the host, for parameters on `device`.
    ///
    /// # Errors
    /// Errors of the device.
    pub fn new(factor: f64, device: &Device) -> Result<Self> {
        Ok(Self(match on_cpu(device) {
            true => ScaleOf::Host(factor),
            // A verdict of loss 0 and norm 0.
            false => ScaleOf::Verdict {
                verdict: Tensor::new(&[0f32, 0.0, factor as f32], device)?,
                previous: None,
            },
        }))
    }

    /// The factor of a verdict in GPU memory, a [`PendingVerdict::tensor`], by which the update may also be skipped.
    ///
    /// `previous` is the verdict on the update of the parameter before this one, where the host has not read it yet. If
    /// that update was skipped, the number of this one is one less than [`Step::number`].
    pub fn of_verdict(verdict: &Tensor, previous: Option<&Tensor>) -> Self {
        Self(ScaleOf::Verdict { verdict: verdict.clone(), previous: previous.cloned() })
    }
}

/// The moments of one parameter, and its master weight.
///
/// Moments are f32 (f64 for an f64 parameter). An f16 or bf16 parameter is the
/// rounding of an f32 master weight, so that updates below its resolution add up.
#[derive(Debug)]
pub struct State(StateOf);

#[derive(Debug)]
enum StateOf {
    Cpu(cpu::State),
    /// f32 tensors on the parameter's device.
    Gpu {
        m: Tensor,
        v: Tensor,
        master: Option<Tensor>,
    },
}

/// A [`State`] as tensors on the CPU, in the shape of the parameter.
#[derive(Debug, Clone)]
pub struct SavedState {
    /// The first moment, f32 (f64 for an f64 parameter).
    pub m: Tensor,
    /// The second moment, in the same dtype.
    pub v: Tensor,
    /// The master weight of an f16 or bf16 parameter, f32.
    pub master: Option<Tensor>,
}

impl State {
    /// Moments of zero for a parameter in f32, f16 or bf16, or f64 on the CPU.
    ///
    /// # Errors
    /// Another dtype, and errors of the device.
    pub fn new(parameter: &Var) -> Result<Self> {
        if on_cpu(parameter.device()) {
            return Ok(Self(StateOf::Cpu(cpu::State::new(parameter)?)));
        }
        if parameter.dtype() == DType::F64 {
            let device = parameter.device().location();
            return Err(Error::Unsupported(format!(
                "AdamW on {device:?} updates f32, f16 and bf16, not f64"
            )));
        }
        let zeros = || Tensor::zeros(parameter.shape(), DType::F32, parameter.device());
        let half = parameter.dtype() != DType::F32;
        let master = half.then(|| parameter.as_detached_tensor().to_dtype(DType::F32)).transpose()?;
        Ok(Self(StateOf::Gpu { m: zeros()?, v: zeros()?, master }))
    }

    /// Whether [`State::update`] can take the scale of a verdict in GPU memory ([`Scale::of_verdict`]): for a parameter
    /// on a GPU.
    pub fn takes_verdict(&self) -> bool {
        matches!(self.0, StateOf::Gpu { .. })
    }

    /// A copy of the state as tensors on the CPU.
    ///
    /// # Errors
    /// Errors of the device.
    pub fn save(&self, parameter: &Var) -> Result<SavedState> {
        match &self.0 {
            StateOf::Cpu(state) => Ok(state.save(parameter.shape())?),
            // Later updates change the tensors in place.
            StateOf::Gpu { m, v, master } => {
                let copy = |t: &Tensor| copied(t, &Device::Cpu);
                Ok(SavedState { m: copy(m)?, v: copy(v)?, master: master.as_ref().map(copy).transpose()? })
            }
        }
    }

    /// The state of `parameter` that [`State::save`] gave.
    ///
    /// # Errors
    /// Tensors of another shape or dtype, and errors of the device.
    pub fn restore(parameter: &Var, saved: &SavedState) -> Result<Self> {
        let (device, wide) = (parameter.device(), acc_dtype(parameter.dtype()));
        for t in [Some(&saved.m), Some(&saved.v), saved.master.as_ref()].into_iter().flatten() {
            if t.dims() != parameter.dims() || t.dtype() != wide {
                return Err(Error::Invalid(format!(
                    "adamw: a state {:?} {:?} for a parameter {:?} {:?}; the same shape in {wide:?} expected",
                    t.dtype(),
                    t.dims(),
                    parameter.dtype(),
                    parameter.dims()
                )));
            }
        }
        if saved.master.is_some() != (parameter.dtype() != wide) {
            return Err(Error::Invalid(format!(
                "adamw: a state {} a master weight for a parameter {:?}",
                if saved.master.is_some() { "with" } else { "without" },
                parameter.dtype()
            )));
        }
        if on_cpu(device) {
            return Ok(Self(StateOf::Cpu(cpu::State::restore(parameter, saved)?)));
        }
        let copy = |t: &Tensor| copied(t, device);
        let master = saved.master.as_ref().map(copy).transpose()?;
        Ok(Self(StateOf::Gpu { m: copy(&saved.m)?, v: copy(&saved.v)?, master }))
    }

    /// One update of `parameter` in place, with its gradient times `scale`:
    ///
    /// `m = beta1 m + (1 - beta1) g`, `v = beta2 v + (1 - beta2) g^2` and
    /// `w = (1 - lr decay) w - lr m' / (sqrt(v') + eps)` with the bias-corrected moments m' and v'.
    ///
    /// On the CPU one pass, in parallel over chunks of a fixed size, so that the result has the same bits for any
    /// number of threads; on a GPU one launch.
    ///
    /// # Errors
    /// [`Error::Invalid`] for a gradient of another shape or dtype than the parameter, or the scale of another device.
    #[cfg_attr(not(feature = "gpu"), allow(unused_variables, reason = "only a GPU reads verdicts"))]
    pub fn update(&mut self, parameter: &Var, gradient: &Tensor, step: &Step, scale: &Scale) -> Result<()> {
        let _span = operator_span("adamw", Pass::Forward);
        if gradient.dims() != parameter.dims() || gradient.dtype() != parameter.dtype() {
            return Err(Error::Invalid(format!(
                "adamw: the gradient is {:?} {:?}, the parameter {:?} {:?}",
                gradient.dtype(),
                gradient.dims(),
                parameter.dtype(),
                parameter.dims()
            )));
        }
        match (&mut self.0, &scale.0) {
            (StateOf::Cpu(state), ScaleOf::Host(factor)) => state.update(parameter, gradient, step, *factor),
            (StateOf::Gpu { m, v, master }, ScaleOf::Verdict { verdict, previous }) => {
                let parameter = parameter.as_detached_tensor();
                on_gpu!(parameter.device(), G => {
                    let tensors = gpu::tensors::Tensors {
                        parameter: &parameter,
                        gradient,
                        m,
                        v,
                        master: master.as_ref(),
                    };
                    gpu::tensors::update::<G>(step, (verdict, previous.as_ref()), &tensors)
                });
                refused("adamw", &parameter)
            }
            (StateOf::Cpu(_), ScaleOf::Verdict { .. }) => {
                Err(Error::Invalid("adamw: the parameter is on the CPU, the scale on a GPU".into()))
            }
            (StateOf::Gpu { .. }, ScaleOf::Host(_)) => {
                Err(Error::Invalid("adamw: the parameter is on a GPU, the scale on the CPU".into()))
            }
        }
    }
}

/// A copy on `device` with memory of its own, which updates in place do not change.
fn copied(t: &Tensor, device: &Device) -> candle_core::Result<Tensor> {
    if t.device().same_device(device) { t.copy() } else { t.to_device(device) }
}
