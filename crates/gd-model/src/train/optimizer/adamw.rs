//! AdamW (Loshchilov and Hutter, arXiv 1711.05101) over named parameters; the update of one parameter is
//! [`gd_kernels::adamw`].
//!
//! Moments are f32, or f64 for f64 parameters. A bf16 or f16 parameter is the rounding of an f32 master weight, so that
//! updates below its resolution add up.

use std::collections::BTreeMap;

use candle_core::backprop::GradStore;
use candle_core::{DType, Device, Tensor, Var};
use gd_kernels::adamw::{SavedState, Scale, State, Step};

use super::groups::Group;
use super::parameter::{check_gradient, check_step, named, nothing_left, take, wide_dtype};
use crate::config::AdamWConfig;
use crate::error::Result;

/// The indices of the parameters that an update changed, for [`AdamW::undo_step`].
#[derive(Debug, Clone, Default)]
pub struct Updated(Vec<usize>);

/// The verdicts by which a GPU scales or skips an update, see [`gd_kernels::adamw::Verdict`].
#[derive(Debug, Clone, Copy)]
pub struct DeviceVerdict<'a> {
    /// The verdict on this update.
    pub verdict: &'a Tensor,
    /// The verdict on the update before and the parameters that it changed, if the host has not read it yet.
    pub previous: Option<(&'a Tensor, &'a Updated)>,
}

#[derive(Debug)]
struct Parameter {
    name: String,
    var: Var,
    decays: bool,
    /// The number of updates of this parameter. It is counted per parameter, because a parameter without a gradient is
    /// skipped and the bias correction of its first gradient must be that of a first step.
    step: u32,
    state: State,
}

/// Adam with decoupled weight decay.
#[derive(Debug)]
pub struct AdamW {
    config: AdamWConfig,
    /// Sorted by name.
    parameters: Vec<Parameter>,
}

impl AdamW {
    /// An optimizer over named parameters in f32, f64, bf16 or f16.
    ///
    /// # Errors
    /// A setting outside its range, a duplicate name, or another dtype.
    pub fn new(vars: Vec<(String, Var)>, config: AdamWConfig) -> Result<Self> {
        config.validate()?;
        let parameter = |(name, var): (String, Var)| {
            let decays = Group::of(&name, var.rank()).decays();
            Ok(Parameter { state: State::new(&var)?, step: 0, decays, name, var })
        };
        Ok(Self { config, parameters: named(vars)?.into_iter().map(parameter).collect::<Result<_>>()? })
    }

    /// Updates every parameter that has a gradient, with the gradients times `scale` (for clipping and averaging) at the
    /// learning rate `lr`.
    ///
    /// # Errors
    /// A rate or scale that is not finite, or a gradient of another shape or dtype than its parameter.
    pub fn step(&mut self, grads: &GradStore, lr: f64, scale: f64) -> Result<()> {
        check_step(lr, scale)?;
        let Some(first) = self.parameters.first() else { return Ok(()) };
        let scale = Scale::new(scale, first.var.device())?;
        for parameter in &mut self.parameters {
            if let Some(grad) = grads.get(&parameter.var) {
                parameter.update(grad, &self.config, lr, &scale)?;
            }
        }
        Ok(())
    }

    /// Whether [`AdamW::step_by_verdict`] can update the parameters: all of them are on a GPU.
    pub fn takes_verdicts(&self) -> bool {
        self.parameters.iter().all(|parameter| parameter.state.takes_verdict())
    }

    /// As [`AdamW::step`] on a GPU, with a scale that the host has not read yet: the verdict holds the factor of the
    /// gradients, or skips the update. When the host reads a verdict that skipped the update, it calls
    /// [`AdamW::undo_step`].
    ///
    /// # Errors
    /// A rate that is not finite, parameters on the CPU, or a gradient of another shape or dtype than its parameter.
    pub fn step_by_verdict(
        &mut self,
        grads: &GradStore,
        lr: f64,
        verdict: &DeviceVerdict<'_>,
    ) -> Result<Updated> {
        check_step(lr, 1.0)?;
        let mut updated = Updated::default();
        for (at, parameter) in self.parameters.iter_mut().enumerate() {
            if let Some(grad) = grads.get(&parameter.var) {
                let previous = verdict.previous.filter(|(_, updated)| updated.0.binary_search(&at).is_ok());
                let scale = Scale::of_verdict(verdict.verdict, previous.map(|(verdict, _)| verdict));
                parameter.update(grad, &self.config, lr, &scale)?;
                updated.0.push(at);
            }
        }
        Ok(updated)
    }

    /// Takes an update that the device skipped out of the update counts.
    pub fn undo_step(&mut self, updated: &Updated) {
        for &at in &updated.0 {
            self.parameters[at].step -= 1;
        }
    }

    /// The moments (in their own dtype), update counts and master weights, as `NAME.exp_avg`, `NAME.exp_avg_sq`,
    /// `NAME.step` (u32 scalar) and, for bf16 and f16, `NAME.master`. With the parameters they are all that an exact
    /// continuation needs.
    ///
    /// # Errors
    /// An error of the device.
    pub fn state(&self) -> Result<BTreeMap<String, Tensor>> {
        let mut state = BTreeMap::new();
        for Parameter { name, var, step, state: moments, .. } in &self.parameters {
            let SavedState { m, v, master } = moments.save(var)?;
            state.insert(format!("{name}.exp_avg"), m);
            state.insert(format!("{name}.exp_avg_sq"), v);
            state.insert(format!("{name}.step"), Tensor::new(*step, &Device::Cpu)?);
            state.extend(master.map(|w| (format!("{name}.master"), w)));
        }
        Ok(state)
    }

    /// Restores the result of [`AdamW::state`] for the same parameters. After an error the state is unchanged.
    ///
    /// # Errors
    /// Names the tensor that is missing, superfluous, or of another shape or dtype.
    pub fn load_state(&mut self, state: &BTreeMap<String, Tensor>) -> Result<()> {
        let loaded = self.read(state.clone())?;
        self.adopt(loaded);
        Ok(())
    }

    /// Checks the result of [`AdamW::state`] for the same parameters.
    ///
    /// # Errors
    /// Names the tensor that is missing, superfluous, or of another shape or dtype.
    pub(super) fn read(&self, mut state: BTreeMap<String, Tensor>) -> Result<Loaded> {
        let mut loaded = Vec::with_capacity(self.parameters.len());
        for Parameter { name, var, .. } in &self.parameters {
            let wide = wide_dtype(var);
            let m = take(&mut state, name, "exp_avg", wide, var.dims())?;
            let v = take(&mut state, name, "exp_avg_sq", wide, var.dims())?;
            let step = take(&mut state, name, "step", DType::U32, &[])?.to_scalar::<u32>()?;
            let master = match var.dtype() == wide {
                true => None,
                false => Some(take(&mut state, name, "master", wide, var.dims())?),
            };
            loaded.push((step, State::restore(var, &SavedState { m, v, master })?));
        }
        nothing_left(&state)?;
        Ok(loaded)
    }

    /// Replaces the state by the result of [`AdamW::read`].
    pub(super) fn adopt(&mut self, loaded: Loaded) {
        for (parameter, (step, state)) in self.parameters.iter_mut().zip(loaded) {
            (parameter.step, parameter.state) = (step, state);
        }
    }
}

/// The update count and the moments of every parameter.
type Loaded = Vec<(u32, State)>;

impl Parameter {
    fn update(&mut self, grad: &Tensor, config: &AdamWConfig, lr: f64, scale: &Scale) -> Result<()> {
        check_gradient(&self.name, &self.var, grad)?;
        let step = Step {
            number: self.step + 1,
            lr,
            beta1: config.beta1,
            beta2: config.beta2,
            eps: config.eps,
            weight_decay: if self.decays { config.weight_decay } else { 0.0 },
        };
        self.state.update(&self.var, grad, &step, scale)?;
        self.step += 1;
        Ok(())
    }
}
