//! An exponential moving average of the parameters, which often generalizes better than the parameters themselves.
//!
//! After update t (from 1) the average a of a parameter w becomes `a + (1 - d_t) (w - a)` with
//! `d_t = min(decay, (1 + t) / (10 + t))`. The first averages follow the parameters closely, and no trace of the initial
//! values remains. This is the rule of TensorFlow's `ExponentialMovingAverage` with `num_updates`. The average is f32
//! for parameters of any dtype. Updates that the guard skips do not count.

use candle_core::{DType, Device, Var};

use super::state::{State, Stateful};
use crate::config::{EmaConfig, ModelConfig};
use crate::error::{Error, Result};
use crate::model::Transformer;
use crate::model::params::Params;

/// The averages of the parameters of a model, and a model over them.
pub struct Ema {
    config: EmaConfig,
    params: Params,
    model: Transformer,
    updates: u64,
}

impl Ema {
    /// An average that starts from the current values of `params`, the parameters of a model of the configuration
    /// `model`.
    ///
    /// # Errors
    /// A decay outside (0, 1), or parameters of another model.
    pub fn new(config: EmaConfig, model: &ModelConfig, params: &Params, device: &Device) -> Result<Self> {
        config.validate()?;
        let params = Params::stored(params.tensors(), None, DType::F32, device);
        let model = Transformer::new(model, params.frozen())?;
        Ok(Self { config, params, model, updates: 0 })
    }

    /// The averages.
    pub fn params(&self) -> &Params {
        &self.params
    }

    /// The model over the averages, without gradients.
    pub fn model(&self) -> &Transformer {
        &self.model
    }

    /// Moves the averages after an update of the parameters `vars`, which are sorted by name.
    ///
    /// # Errors
    /// Parameters of another model.
    pub fn update(&mut self, vars: &[(String, Var)]) -> Result<()> {
        self.updates += 1;
        let decay = self.config.decay_at(self.updates);
        let averages = self.params.vars();
        if averages.len() != vars.len() {
            let text = format!("{} averages for {} parameters", averages.len(), vars.len());
            return Err(Error::Invalid(text));
        }
        for ((name, average), (of, var)) in averages.iter().zip(vars) {
            if name != of {
                return Err(Error::Invalid(format!("the average of {name} cannot follow {of}")));
            }
            let var = var.as_detached_tensor().to_dtype(DType::F32)?;
            let old = average.as_detached_tensor();
            average.set(&(&old + ((var - &old)? * (1.0 - decay))?)?)?;
        }
        Ok(())
    }
}

impl Stateful for Ema {
    fn save(&self) -> Result<State> {
        Ok(State { tensors: self.params.tensors(), ..State::of(&self.updates)? })
    }

    fn restore(&mut self, state: State) -> Result<()> {
        let updates = state.read()?;
        self.params.set(&state.tensors)?;
        self.updates = updates;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Recipe;

    #[test]
    fn averages_follow_every_update_and_survive_a_restart() {
        let mut model = Recipe::load("tiny").unwrap().model;
        (model.hidden_size, model.intermediate_size, model.num_hidden_layers) = (16, 24, 1);
        (model.num_attention_heads, model.num_key_value_heads, model.head_dim) = (2, 1, 8);
        let cpu = Device::Cpu;
        let params = Params::new(1, DType::F64, &cpu);
        Transformer::new(&model, params.builder()).unwrap();
        let vars = params.vars();
        let flat = |t: &candle_core::Tensor| -> Vec<f64> {
            t.to_dtype(DType::F64).unwrap().flatten_all().unwrap().to_vec1().unwrap()
        };
        let mut expected: Vec<Vec<f64>> = vars.iter().map(|(_, var)| flat(var)).collect();
        let config = EmaConfig { decay: 0.4 };
        let mut ema = Ema::new(config, &model, &params, &cpu).unwrap();
        // 2/11, 3/12 and 4/13 are below the decay, 5/14 too, 8/17 is not.
        for t in 1..=8u32 {
            for (i, (_, var)) in vars.iter().enumerate() {
                var.set(&(var.as_detached_tensor() + f64::from(t) * 0.01 * (i + 1) as f64).unwrap()).unwrap();
            }
            ema.update(&vars).unwrap();
            let share = 0.4f64.min(f64::from(1 + t) / f64::from(10 + t));
            for ((_, var), average) in vars.iter().zip(&mut expected) {
                for (average, new) in average.iter_mut().zip(flat(var)) {
                    *average = share * *average + (1.0 - share) * new;
                }
            }
            if t == 4 {
                let saved = ema.save().unwrap();
                ema = Ema::new(config, &model, &params, &cpu).unwrap();
                ema.restore(saved).unwrap();
            }
        }
        for ((name, average), expected) in ema.params().tensors().iter().zip(&expected) {
            assert_eq!(average.dtype(), DType::F32);
            let worst = flat(average).iter().zip(expected).map(|(a, b)| (a - b).abs()).fold(0.0, f64::max);
            assert!(worst <= 1e-6, "{name}: {worst}");
        }
        let mut lacking = ema.save().unwrap();
        lacking.tensors.remove("model.norm.weight");
        let error = ema.restore(lacking).unwrap_err().to_string();
        assert!(error.contains("model.norm.weight"), "{error}");
    }
}
