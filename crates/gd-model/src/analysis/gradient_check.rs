//! Whether every parameter of a model learns: one backward pass, and the parameters it leaves out.

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

/// Sequences and tokens of the pass: enough for every mechanism to choose among keys.
const BATCH: (usize, usize) = (2, 24);

/// A parameter that does not learn.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Fault {
    /// Its name.
    pub parameter: String,
    /// What its gradient is.
    pub gradient: &'static str,
}

/// The parameters of a new model of this config, and those of them that do not learn.
///
/// # Errors
/// A config that contradicts itself.
pub fn check(config: &ModelConfig, seed: u64, device: &Device) -> Result<(usize, Vec<Fault>)> {
    let params = Params::new(seed, DType::F32, device);
    let model = Transformer::new(config, params.builder())?;
    let vars = params.vars();
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    fill_zeros(&vars, &mut rng)?;
    let (batch, context) = (BATCH.0, BATCH.1.min(config.max_position_embeddings));
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

/// Matrices that start at zero hide everything behind them from the gradient, so they get small
/// random values.
fn fill_zeros(vars: &[(String, Var)], rng: &mut ChaCha8Rng) -> Result<()> {
    let small = Normal::new(0f32, 0.02).map_err(|e| Error::Invalid(format!("a normal distribution: {e}")))?;
    for (_, var) in vars.iter().filter(|(_, v)| v.rank() >= 2) {
        if largest(var)? == 0.0 {
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

/// The parameters that this backward pass left without a useful gradient.
///
/// # Errors
/// Whatever reading a gradient reports.
pub fn faults(vars: &[(String, Var)], grads: &GradStore) -> Result<Vec<Fault>> {
    let mut faults = Vec::new();
    for (name, var) in vars {
        let gradient = match grads.get(var) {
            None => Some("absent"),
            Some(g) => match largest(g)? {
                x if !x.is_finite() => Some("not finite"),
                0.0 => Some("all zero"),
                _ => None,
            },
        };
        faults.extend(gradient.map(|gradient| Fault { parameter: name.clone(), gradient }));
    }
    Ok(faults)
}

/// The greatest absolute value; NaN if there is one.
fn largest(x: &Tensor) -> Result<f32> {
    let values = x.detach().to_dtype(DType::F32)?.flatten_all()?.to_vec1::<f32>()?;
    Ok(values.iter().fold(0f32, |m, x| if m.is_nan() || x.is_nan() { f32::NAN } else { m.max(x.abs()) }))
}

#[cfg(test)]
mod tests {
    use gd_kernels::Estimator;

    use super::*;
    use crate::analysis::variants::VARIANTS;
    use crate::config::Recipe;

    #[test]
    fn every_parameter_of_every_preset_and_mechanism_learns() {
        // Presets differ in size; what they are built of is checked once, on the smallest.
        let mut seen = Vec::new();
        for (preset, _) in crate::config::PRESETS {
            let base = Recipe::load(preset).unwrap().model;
            if seen.contains(&base.gd) {
                continue;
            }
            seen.push(base.gd.clone());
            for v in VARIANTS.iter().filter(|v| v.applies(&base)) {
                let (count, faults) = check(&v.config(&base).unwrap(), 1, &Device::Cpu).unwrap();
                assert!(count > 10 && faults.is_empty(), "{preset}, {}: {faults:?}", v.name);
            }
        }
    }

    #[test]
    fn an_estimator_without_score_gradients_is_found_out() {
        let mut config = Recipe::load("tiny").unwrap().model;
        // Without a gate the winner's estimator leaves nothing for the scores.
        config.gd.select.estimator = Estimator::Winner;
        let (_, faults) = check(&config, 1, &Device::Cpu).unwrap();
        for name in ["q_proj", "k_proj", "gd.beta", "beacon.prior"] {
            assert!(faults.iter().any(|f| f.parameter.contains(name)), "{name}: {faults:?}");
        }
        assert!(!faults.iter().any(|f| f.parameter.contains("v_proj")), "{faults:?}");
    }

    #[test]
    fn absent_zero_and_infinite_gradients_are_told_apart() {
        let var = |x: f32| Var::new(&[x, 1.0], &Device::Cpu).unwrap();
        let vars: Vec<(String, Var)> = [("good", 2.0), ("zero", 2.0), ("infinite", 0.0), ("absent", 2.0)]
            .map(|(n, x)| (n.to_owned(), var(x)))
            .into();
        let zero = vars[1].1.mul(&vars[1].1.zeros_like().unwrap()).unwrap();
        let loss = ((vars[0].1.as_tensor() + zero).unwrap() + vars[2].1.log().unwrap()).unwrap();
        let found = faults(&vars, &loss.sum_all().unwrap().backward().unwrap()).unwrap();
        let found: Vec<_> = found.iter().map(|f| (f.parameter.as_str(), f.gradient)).collect();
        assert_eq!(found, [("zero", "all zero"), ("infinite", "not finite"), ("absent", "absent")]);
    }
}
