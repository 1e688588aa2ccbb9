//! Muon (Jordan et al., 2024) for the matrices of the blocks: orthogonalized momentum.
//!
//! The update is approximately the orthogonal factor `U Vᵀ` of the Nesterov momentum `U S Vᵀ`
//! ([`gd_kernels::newton_schulz`]) times `0.2 sqrt(max(rows, columns))` (Liu et al., Muon is scalable for LLM training,
//! arXiv 2502.16982). Its root mean square is that of a usual AdamW update, so that both optimizers share the learning
//! rate and the weight decay.

use std::collections::BTreeMap;

use candle_core::backprop::GradStore;
use candle_core::{Tensor, Var};
use gd_kernels::newton_schulz;

use super::parameter::{
    check_gradient, check_step, named, nothing_left, set_wide, take, wide_dtype, wide_weight,
};
use crate::config::MuonConfig;
use crate::error::{Error, Result};

/// The root mean square of an update at learning rate 1.
const UPDATE_RMS: f64 = 0.2;

#[derive(Debug)]
struct Parameter {
    name: String,
    var: Var,
    /// f32, or f64 for an f64 parameter.
    momentum: Tensor,
    /// The master weight of a bf16 or f16 parameter, f32.
    master: Option<Tensor>,
}

/// The optimizer Muon over matrices.
#[derive(Debug)]
pub struct Muon {
    config: MuonConfig,
    /// Sorted by name.
    parameters: Vec<Parameter>,
}

impl Muon {
    /// An optimizer over named matrices in f32, f64, bf16 or f16.
    ///
    /// # Errors
    /// A setting outside its range, a duplicate name, another dtype, or a parameter that is not a matrix.
    pub fn new(vars: Vec<(String, Var)>, config: MuonConfig) -> Result<Self> {
        config.validate()?;
        let parameter = |(name, var): (String, Var)| {
            if var.rank() != 2 {
                return Err(Error::Invalid(format!("{name}: Muon needs a matrix, not {:?}", var.dims())));
            }
            let wide = wide_dtype(&var);
            let momentum = Tensor::zeros(var.shape(), wide, var.device())?;
            let half = var.dtype() != wide;
            let master = half.then(|| var.as_detached_tensor().to_dtype(wide)).transpose()?;
            Ok(Parameter { name, var, momentum, master })
        };
        Ok(Self { config, parameters: named(vars)?.into_iter().map(parameter).collect::<Result<_>>()? })
    }

    /// Updates every parameter that has a gradient, with the gradients times `scale` at learning rate `lr`.
    ///
    /// # Errors
    /// A rate or scale that is not finite, or a gradient of another shape or dtype than its parameter.
    pub fn step(&mut self, grads: &GradStore, lr: f64, scale: f64) -> Result<()> {
        check_step(lr, scale)?;
        let MuonConfig { momentum: mu, weight_decay } = self.config;
        for Parameter { name, var, momentum, master } in &mut self.parameters {
            let Some(grad) = grads.get(var) else { continue };
            check_gradient(name, var, grad)?;
            let g = (grad.detach().to_dtype(momentum.dtype())? * scale)?;
            *momentum = ((&*momentum * mu)? + &g)?;
            let nesterov = (g + (&*momentum * mu)?)?;
            let (rows, columns) = var.dims2()?;
            let rate = lr * UPDATE_RMS * (rows.max(columns) as f64).sqrt();
            let weight = (wide_weight(var, master.as_ref())? * (1.0 - lr * weight_decay))?;
            set_wide(var, master, (weight - (newton_schulz(&nesterov)? * rate)?)?)?;
        }
        Ok(())
    }

    /// Whether the optimizer has no parameters.
    pub(super) fn is_empty(&self) -> bool {
        self.parameters.is_empty()
    }

    /// Whether the tensor `key` of a saved state belongs to a parameter of this optimizer.
    pub(super) fn owns(&self, key: &str) -> bool {
        let name = key.rsplit_once('.').map_or(key, |(name, _)| name);
        self.parameters.iter().any(|p| p.name == name)
    }

    /// The momenta and master weights, as `NAME.momentum` and, for bf16 and f16, `NAME.master`.
    pub fn state(&self) -> BTreeMap<String, Tensor> {
        let mut state = BTreeMap::new();
        for Parameter { name, momentum, master, .. } in &self.parameters {
            state.insert(format!("{name}.momentum"), momentum.clone());
            state.extend(master.iter().map(|w| (format!("{name}.master"), w.clone())));
        }
        state
    }

    /// Checks the result of [`Muon::state`] for the same parameters.
    ///
    /// # Errors
    /// Names the tensor that is missing, superfluous, or of another shape or dtype.
    pub(super) fn read(&self, mut state: BTreeMap<String, Tensor>) -> Result<Loaded> {
        let mut loaded = Vec::with_capacity(self.parameters.len());
        for Parameter { name, var, master, .. } in &self.parameters {
            let mut load = |kind: &str| -> Result<Tensor> {
                let tensor = take(&mut state, name, kind, wide_dtype(var), var.dims())?;
                Ok(tensor.to_device(var.device())?)
            };
            loaded.push((load("momentum")?, master.as_ref().map(|_| load("master")).transpose()?));
        }
        nothing_left(&state)?;
        Ok(loaded)
    }

    /// Replaces the state by the result of [`Muon::read`].
    pub(super) fn adopt(&mut self, loaded: Loaded) {
        for (parameter, (momentum, master)) in self.parameters.iter_mut().zip(loaded) {
            (parameter.momentum, parameter.master) = (momentum, master);
        }
    }
}

/// The momentum and the master weight of every parameter.
type Loaded = Vec<(Tensor, Option<Tensor>)>;
