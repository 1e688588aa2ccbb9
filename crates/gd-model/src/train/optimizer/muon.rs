//! Muon: momentum, orthogonalised, for the matrices of the blocks.
//!
//! The step is `U Vᵀ` of the Nesterov momentum `U S Vᵀ`, nearly: five rounds of the quintic Newton–Schulz
//! iteration of Jordan et al. (Muon, 2024) bring every singular value near 1. Scaled by
//! `0.2 sqrt(max(rows, columns))` (Liu et al., Muon is scalable for LLM training, arXiv 2502.16982) its
//! root mean square is that of a usual AdamW update, so that both share learning rate and decay.

use std::collections::BTreeMap;

use candle_core::backprop::GradStore;
use candle_core::{D, DType, Tensor, Var};
use gd_kernels::on_cpu;

use super::parameter::{
    check_gradient, check_step, named, nothing_left, set_wide, take, wide_dtype, wide_weight,
};
use crate::config::MuonConfig;
use crate::error::{Error, Result};

/// The quintic `a x + b x³ + c x⁵` of Jordan et al., as steep at 0 as it can be.
const QUINTIC: (f64, f64, f64) = (3.4445, -4.7750, 2.0315);
/// Rounds of it.
const ROUNDS: usize = 5;
/// Root mean square of an update at learning rate 1.
const RMS: f64 = 0.2;

#[derive(Debug)]
struct Parameter {
    name: String,
    var: Var,
    /// In f32 (f64 for f64), as the master.
    momentum: Tensor,
    /// Of a bf16 or f16 parameter.
    master: Option<Tensor>,
}

/// Muon over matrices.
#[derive(Debug)]
pub struct Muon {
    config: MuonConfig,
    /// By name.
    parameters: Vec<Parameter>,
}

impl Muon {
    /// An optimizer over named matrices, in f32, f64, bf16 or f16.
    ///
    /// # Errors
    /// A setting outside its range, a name given twice, another dtype, or no matrix.
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
    /// A rate or scale that is no number, or a gradient of another shape or dtype than its parameter.
    pub fn step(&mut self, grads: &GradStore, lr: f64, scale: f64) -> Result<()> {
        check_step(lr, scale)?;
        let MuonConfig { momentum: mu, weight_decay } = self.config;
        for Parameter { name, var, momentum, master } in &mut self.parameters {
            let Some(grad) = grads.get(var) else { continue };
            check_gradient(name, var, grad)?;
            let g = (grad.detach().to_dtype(momentum.dtype())? * scale)?;
            *momentum = ((&*momentum * mu)? + &g)?;
            let ahead = (g + (&*momentum * mu)?)?;
            let (rows, columns) = var.dims2()?;
            let rate = lr * RMS * (rows.max(columns) as f64).sqrt();
            let weight = (wide_weight(var, master.as_ref())? * (1.0 - lr * weight_decay))?;
            set_wide(var, master, (weight - (orthogonal(&ahead)? * rate)?)?)?;
        }
        Ok(())
    }

    /// Whether it has no parameters.
    pub(super) fn is_empty(&self) -> bool {
        self.parameters.is_empty()
    }

    /// Whether a tensor of a saved state belongs to one of its parameters.
    pub(super) fn owns(&self, key: &str) -> bool {
        let name = key.rsplit_once('.').map_or(key, |(name, _)| name);
        self.parameters.iter().any(|p| p.name == name)
    }

    /// Momenta and master weights, as `NAME.momentum` and, for bf16 and f16, `NAME.master`.
    pub fn state(&self) -> BTreeMap<String, Tensor> {
        let mut state = BTreeMap::new();
        for Parameter { name, momentum, master, .. } in &self.parameters {
            state.insert(format!("{name}.momentum"), momentum.clone());
            state.extend(master.iter().map(|w| (format!("{name}.master"), w.clone())));
        }
        state
    }

    /// What [`Muon::state`] gave for the same parameters, checked.
    pub(super) fn read(&self, mut state: BTreeMap<String, Tensor>) -> Result<Loaded> {
        let mut loaded = Vec::with_capacity(self.parameters.len());
        for Parameter { name, var, master, .. } in &self.parameters {
            let mut load = |part: &str| -> Result<Tensor> {
                let tensor = take(&mut state, name, part, wide_dtype(var), var.dims())?;
                Ok(tensor.to_device(var.device())?)
            };
            loaded.push((load("momentum")?, master.as_ref().map(|_| load("master")).transpose()?));
        }
        nothing_left(&state)?;
        Ok(loaded)
    }

    /// Goes on from what was read.
    pub(super) fn adopt(&mut self, loaded: Loaded) {
        for (parameter, (momentum, master)) in self.parameters.iter_mut().zip(loaded) {
            (parameter.momentum, parameter.master) = (momentum, master);
        }
    }
}

/// Momentum and master weight of every parameter.
type Loaded = Vec<(Tensor, Option<Tensor>)>;

/// The nearest matrix to `x` with orthonormal rows or columns, roughly: singular values within 0.7..1.2
/// where those of x are above a thousandth of its norm. A matrix of zeros stays one.
///
/// # Errors
/// Not a matrix of floats.
pub fn orthogonal(x: &Tensor) -> Result<Tensor> {
    let (rows, columns) = x.dims2()?;
    // Metal has no f64.
    let wide = if x.device().is_metal() { DType::F32 } else { DType::F64 };
    let norm = x.to_dtype(wide)?.sqr()?.sum_all()?.sqrt()?;
    // The product of the two shorter sides is the smaller one.
    let mut y = if rows > columns { x.t()?.contiguous()? } else { x.clone() };
    if on_cpu(x.device()) {
        let norm = norm.to_scalar::<f64>()?;
        if norm == 0.0 {
            return Ok(x.clone());
        }
        y = (y / norm)?;
    } else {
        // Without waiting for the device; what is 0 stays 0.
        y = y.broadcast_div(&norm.maximum(f64::from(f32::MIN_POSITIVE))?.to_dtype(y.dtype())?)?;
    }
    let mut x = y;
    let (a, b, c) = QUINTIC;
    for _ in 0..ROUNDS {
        let square = x.matmul(&x.transpose(D::Minus1, D::Minus2)?)?;
        let factor = ((&square * b)? + (square.matmul(&square)? * c)?)?;
        x = ((&x * a)? + factor.matmul(&x)?)?;
    }
    Ok(if rows > columns { x.t()?.contiguous()? } else { x })
}
