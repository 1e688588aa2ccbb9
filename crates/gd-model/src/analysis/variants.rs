//! The mechanisms that can be compared, as changes of one model, and their equal sizes.

use candle_core::{DType, Device};

use crate::config::{Mechanism, ModelConfig, nearest};
use crate::error::{Error, Result};
use crate::model::Transformer;
use crate::model::params::Params;

/// A mechanism by name.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Variant {
    /// Its name on the command line.
    pub name: &'static str,
    /// What it is, in one line.
    pub what: &'static str,
    mechanism: Mechanism,
    beacon: bool,
}

/// Everything that can be compared.
pub const VARIANTS: [Variant; 4] = [
    Variant {
        name: "softmax",
        what: "softmax attention alone",
        mechanism: Mechanism::Softmax,
        beacon: false,
    },
    Variant {
        name: "softmax+beacon",
        what: "softmax attention with the configuration's Beacon",
        mechanism: Mechanism::Softmax,
        beacon: true,
    },
    Variant {
        name: "gd",
        what: "selection as the configuration has it, with its Beacon",
        mechanism: Mechanism::Gd,
        beacon: true,
    },
    Variant {
        name: "gd-bare",
        what: "selection without the Beacon",
        mechanism: Mechanism::Gd,
        beacon: false,
    },
];

impl Variant {
    /// The variant of this name.
    ///
    /// # Errors
    /// Names what there is.
    pub fn named(name: &str) -> Result<Self> {
        VARIANTS.iter().find(|v| v.name == name).copied().ok_or_else(|| Error::UnknownName {
            what: "mechanism",
            name: name.into(),
            allowed: VARIANTS.iter().map(|v| v.name.to_owned()).collect(),
            suggestion: nearest(name, &VARIANTS.map(|v| v.name)),
        })
    }

    /// Whether it differs from the others for this model: without a Beacon in the configuration,
    /// softmax has none to be compared with.
    pub fn applies(&self, base: &ModelConfig) -> bool {
        base.gd.beacon.is_some() || !self.beacon || self.mechanism == Mechanism::Gd
    }

    /// The model with this mechanism.
    ///
    /// # Errors
    /// A Beacon is asked for and the configuration has none.
    pub fn config(&self, base: &ModelConfig) -> Result<ModelConfig> {
        if !self.applies(base) {
            return Err(Error::Invalid(format!("{}: the configuration has no Beacon", self.name)));
        }
        let mut config = base.clone();
        // Selecting layers stay where the configuration has them; softmax replaces them all.
        if !base.gd.mechanism.contains(&self.mechanism) || self.mechanism == Mechanism::Softmax {
            config.gd.mechanism = vec![self.mechanism];
        }
        if !self.beacon {
            config.gd.beacon = None;
        }
        Ok(config)
    }
}

/// Parameters of a model.
///
/// # Errors
/// A config that contradicts itself.
pub fn parameters(config: &ModelConfig) -> Result<usize> {
    let params = Params::new(0, DType::F32, &Device::Cpu);
    Transformer::new(config, params.builder())?;
    Ok(params.count())
}

/// Steps in which `intermediate_size` may change.
const STEP: usize = 4;

/// Widens every model's feed-forward block until it has as nearly as possible as many parameters
/// as the greatest of them. Returns the numbers.
///
/// # Errors
/// A config that contradicts itself.
pub fn equalise(configs: &mut [ModelConfig]) -> Result<Vec<usize>> {
    let counts = configs.iter().map(parameters).collect::<Result<Vec<_>>>()?;
    let most = counts.iter().copied().max().unwrap_or(0);
    for (config, count) in configs.iter_mut().zip(counts) {
        let wider = ModelConfig { intermediate_size: config.intermediate_size + STEP, ..config.clone() };
        let each = parameters(&wider)? - count;
        // To the nearest: the number grows by the same for every step.
        config.intermediate_size += STEP * ((2 * (most - count) + each) / (2 * each));
    }
    configs.iter().map(parameters).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Recipe;

    #[test]
    fn names_are_unique_and_an_unknown_one_lists_them() {
        for v in VARIANTS {
            assert_eq!(Variant::named(v.name).unwrap(), v);
        }
        let e = Variant::named("linear").unwrap_err().to_string();
        assert!(e.contains("\"linear\"") && VARIANTS.iter().all(|v| e.contains(v.name)), "{e}");
    }

    #[test]
    fn variants_of_the_preset_get_equal_sizes() {
        let base = Recipe::load("tiny").unwrap().model;
        let mut configs = VARIANTS.map(|v| v.config(&base).unwrap());
        assert_eq!(configs[2], base);
        let before = configs.each_ref().map(|c| parameters(c).unwrap());
        let most = *before.iter().max().unwrap();
        assert!(before[0] < most, "{before:?}");
        let counts = equalise(&mut configs).unwrap();
        // Half a step: three matrices of 4 rows in each layer.
        let half = 3 * STEP * base.hidden_size * base.num_hidden_layers / 2;
        for (config, count) in configs.iter().zip(&counts) {
            assert!(count.abs_diff(most) <= half, "{counts:?} of {most}");
            assert!(config.intermediate_size.is_multiple_of(STEP));
            assert_eq!(parameters(config).unwrap(), *count);
        }
        assert_eq!(configs[2], base, "the greatest stays as it is");
    }

    #[test]
    fn softmax_with_a_beacon_needs_one() {
        let mut base = Recipe::load("tiny").unwrap().model;
        base.gd.beacon = None;
        let [_, softmax, gd, _] = VARIANTS;
        assert!(softmax.config(&base).is_err() && !softmax.applies(&base));
        assert_eq!(gd.config(&base).unwrap(), base);
    }
}
