//! The mechanisms that `gd compare` compares: variants of one model configuration with equal numbers of parameters.

use candle_core::{DType, Device};

use crate::config::{Mechanism, ModelConfig, nearest};
use crate::error::{Error, Result};
use crate::model::Transformer;
use crate::model::params::Params;

/// A variant of a model configuration: a mechanism, with or without the Beacon.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Variant {
    /// The name on the command line.
    pub name: &'static str,
    /// A description in one line.
    pub what: &'static str,
    mechanism: Mechanism,
    beacon: bool,
}

/// All variants.
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
    /// [`Error::UnknownName`] with the names of all variants.
    pub fn named(name: &str) -> Result<Self> {
        VARIANTS.iter().find(|v| v.name == name).copied().ok_or_else(|| Error::UnknownName {
            what: "mechanism",
            name: name.into(),
            allowed: VARIANTS.iter().map(|v| v.name.to_owned()).collect(),
            suggestion: nearest(name, &VARIANTS.map(|v| v.name)),
        })
    }

    /// Whether the variant makes sense for this configuration: `softmax+beacon` needs a configuration with a Beacon.
    pub fn applies(&self, base: &ModelConfig) -> bool {
        base.gd.beacon.is_some() || !self.beacon || self.mechanism == Mechanism::Gd
    }

    /// The configuration of this variant.
    ///
    /// # Errors
    /// [`Error::Invalid`] if the variant does not [apply](Self::applies) to `base`.
    pub fn config(&self, base: &ModelConfig) -> Result<ModelConfig> {
        if !self.applies(base) {
            return Err(Error::Invalid(format!("{}: the configuration has no Beacon", self.name)));
        }
        let mut config = base.clone();
        // A configuration with layers of both kinds keeps its selecting layers; `softmax` replaces all of them.
        if !base.gd.mechanism.contains(&self.mechanism) || self.mechanism == Mechanism::Softmax {
            config.gd.mechanism = vec![self.mechanism];
        }
        if !self.beacon {
            config.gd.beacon = None;
        }
        Ok(config)
    }
}

/// The number of parameters of a model.
///
/// # Errors
/// An inconsistent configuration.
pub fn parameters(config: &ModelConfig) -> Result<usize> {
    let params = Params::new(0, DType::F32, &Device::Cpu);
    Transformer::new(config, params.builder())?;
    Ok(params.count())
}

/// `intermediate_size` changes by multiples of this.
const WIDTH_STEP: usize = 4;

/// Increases `intermediate_size` of every configuration so that its number of parameters is as close as possible to that
/// of the largest one. Returns the numbers of parameters.
///
/// # Errors
/// An inconsistent configuration.
pub fn equalize(configs: &mut [ModelConfig]) -> Result<Vec<usize>> {
    let counts = configs.iter().map(parameters).collect::<Result<Vec<_>>>()?;
    let largest = counts.iter().copied().max().unwrap_or(0);
    for (config, count) in configs.iter_mut().zip(counts) {
        let wider =
            ModelConfig { intermediate_size: config.intermediate_size + WIDTH_STEP, ..config.clone() };
        // The number of parameters is linear in the width. The quotient is rounded to the nearest integer.
        let per_step = parameters(&wider)? - count;
        config.intermediate_size += WIDTH_STEP * ((2 * (largest - count) + per_step) / (2 * per_step));
    }
    configs.iter().map(parameters).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Recipe;

    #[test]
    fn an_unknown_name_is_an_error_with_all_names() {
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
        let largest = *before.iter().max().unwrap();
        assert!(before[0] < largest, "{before:?}");
        let counts = equalize(&mut configs).unwrap();
        // Half a step: in each layer, three matrices change by WIDTH_STEP rows or columns.
        let half = 3 * WIDTH_STEP * base.hidden_size * base.num_hidden_layers / 2;
        for (config, count) in configs.iter().zip(&counts) {
            assert!(count.abs_diff(largest) <= half, "{counts:?} of {largest}");
            assert!(config.intermediate_size.is_multiple_of(WIDTH_STEP));
            assert_eq!(parameters(config).unwrap(), *count);
        }
        assert_eq!(configs[2], base, "the largest configuration is unchanged");
    }

    #[test]
    fn softmax_with_a_beacon_needs_a_configuration_with_one() {
        let mut base = Recipe::load("tiny").unwrap().model;
        base.gd.beacon = None;
        let [_, softmax, gd, _] = VARIANTS;
        assert!(softmax.config(&base).is_err() && !softmax.applies(&base));
        assert_eq!(gd.config(&base).unwrap(), base);
    }
}
