//! Checks by one backward pass that every parameter of a model receives a gradient.

use candle_core::backprop::GradStore;
use candle_core::{DType, Device, Tensor, Var};
use gd_kernels::Mask;
use gd_layer::Pass;
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use rand_distr::{Distribution, Normal};
use serde::Serialize;

use crate::config::ModelConfig;
use crate::error::{Error, Result};
use crate::model::Transformer;
use crate::model::params::Params;

/// The number of sequences of the pass.
const BATCH_SIZE: usize = 2;

/// The maximal number of tokens per sequence; more than a selecting layer has candidates.
const SEQUENCE_TOKENS: usize = 24;

/// A parameter without a useful gradient.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Fault {
    /// The name of the parameter.
    pub parameter: String,
    /// What is wrong with its gradient: `absent`, `all zero` or `not finite`.
    pub gradient: &'static str,
}

/// Computes the gradients of a newly initialized model of this configuration on random tokens. Returns the number of
/// parameters (tensors) and those without a useful gradient.
///
/// # Errors
/// An inconsistent configuration, or an error of the device.
pub fn check(config: &ModelConfig, seed: u64, device: &Device) -> Result<(usize, Vec<Fault>)> {
    let params = Params::new(seed, DType::F32, device);
    let model = Transformer::new(config, params.builder())?;
    let vars = params.vars();
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    fill_zeros(&vars, &mut rng)?;
    let (batch, context) = (BATCH_SIZE, SEQUENCE_TOKENS.min(config.max_position_embeddings));
    let mut ids = || {
        let ids: Vec<u32> =
            (0..batch * context).map(|_| rng.random_range(0..config.vocab_size as u32)).collect();
        Tensor::from_vec(ids, (batch, context), device)
    };
    let (inputs, targets) = (ids()?, ids()?);
    let mask = Mask::causal(0);
    let grads = model.loss(&inputs, &targets, &Pass::new(&mask))?.backward()?;
    Ok((vars.len(), faults(&vars, &grads)?))
}

/// Replaces matrices of zeros by small random values. A matrix of zeros would set all gradients that pass through it to
/// zero.
fn fill_zeros(vars: &[(String, Var)], rng: &mut ChaCha8Rng) -> Result<()> {
    let small = Normal::new(0f32, 0.02).map_err(|e| Error::Invalid(format!("a normal distribution: {e}")))?;
    for (_, var) in vars.iter().filter(|(_, v)| v.rank() >= 2) {
        if max_abs(var)? == 0.0 {
            let values: Vec<f32> = (0..var.elem_count()).map(|_| small.sample(rng)).collect();
            var.set(
                &Tensor::from_vec(values, var.shape(), &Device::Cpu)?
                    .to_dtype(var.dtype())?
                    .to_device(var.device())?,
            )?;
        }
    }
    Ok(())
}

/// The parameters whose gradient in `grads` is absent, zero or not finite.
///
/// # Errors
/// A gradient that cannot be copied from its device.
pub fn faults(vars: &[(String, Var)], grads: &GradStore) -> Result<Vec<Fault>> {
    let mut faults = Vec::new();
    for (name, var) in vars {
        let gradient = match grads.get(var) {
            None => Some("absent"),
            Some(g) => match max_abs(g)? {
                x if !x.is_finite() => Some("not finite"),
                0.0 => Some("all zero"),
                _ => None,
            },
        };
        faults.extend(gradient.map(|gradient| Fault { parameter: name.clone(), gradient }));
    }
    Ok(faults)
}

/// The maximal absolute value; NaN if any value is NaN.
fn max_abs(x: &Tensor) -> Result<f32> {
    let values = x.detach().to_dtype(DType::F32)?.flatten_all()?.to_vec1::<f32>()?;
    Ok(values.iter().fold(0f32, |m, x| if m.is_nan() || x.is_nan() { f32::NAN } else { m.max(x.abs()) }))
}

#[cfg(test)]
mod tests {
    use gd_kernels::Estimator;
    use gd_layer::GdConfig;

    use super::*;
    use crate::analysis::variants::variants;
    use crate::config::{GdBlock, Recipe};

    #[test]
    fn every_parameter_of_every_preset_and_mechanism_learns() {
        // Presets whose `gd` blocks have the same options differ only in size, so the first (smallest) one of them is enough.
        let mut checked = Vec::new();
        for (preset, _) in crate::config::PRESETS {
            let base = Recipe::load(preset).unwrap().model;
            let options = GdBlock { selecting_heads: Vec::new(), ..base.gd.clone() };
            if checked.contains(&options) {
                continue;
            }
            checked.push(options);
            for v in variants().iter().filter(|v| v.applies(&base)) {
                let (count, faults) = check(&v.config(&base).unwrap(), 1, &Device::Cpu).unwrap();
                assert!(count > 10 && faults.is_empty(), "{preset}, {}: {faults:?}", v.name);
            }
        }
    }

    #[test]
    fn an_estimator_without_score_gradients_is_reported() {
        let mut config = Recipe::load("tiny").unwrap().model;
        // Without a gate, the estimator `winner` has no gradient with respect to the scores.
        config.gd.select = GdConfig { estimator: Estimator::Winner, ..GdConfig::default() };
        let (_, faults) = check(&config, 1, &Device::Cpu).unwrap();
        for name in ["q_proj", "k_proj", "gd.beta", "beacon.prior"] {
            assert!(faults.iter().any(|f| f.parameter.contains(name)), "{name}: {faults:?}");
        }
        assert!(!faults.iter().any(|f| f.parameter.contains("v_proj")), "{faults:?}");
    }

    #[test]
    fn absent_zero_and_infinite_gradients_are_distinguished() {
        let var = |x: f32| Var::new(&[x, 1.0], &Device::Cpu).unwrap();
        let vars: Vec<(String, Var)> = [("good", 2.0), ("zero", 2.0), ("infinite", 0.0), ("absent", 2.0)]
            .map(|(n, x)| (n.to_owned(), var(x)))
            .into();
        let zero = vars[1].1.mul(&vars[1].1.zeros_like().unwrap()).unwrap();
        let loss = ((vars[0].1.as_tensor() + zero).unwrap() + vars[2].1.log().unwrap()).unwrap();
        let faults = faults(&vars, &loss.sum_all().unwrap().backward().unwrap()).unwrap();
        let faults: Vec<_> = faults.iter().map(|f| (f.parameter.as_str(), f.gradient)).collect();
        assert_eq!(faults, [("zero", "all zero"), ("infinite", "not finite"), ("absent", "absent")]);
    }
}
