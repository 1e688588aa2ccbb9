//! The mechanisms that `gd compare` compares: variants of one model configuration with equal numbers of parameters.

use candle_core::{DType, Device};

use crate::config::{Mechanism, ModelConfig, nearest};
use crate::error::{Error, Result};
use crate::model::Transformer;
use crate::model::params::Params;

/// A variant of a model configuration: a mechanism, with or without the Beacon.
#[derive(Debug, Clone, PartialEq)]
pub struct Variant {
    /// The name on the command line.
    pub name: &'static str,
    /// A description in one line.
    pub what: &'static str,
    mechanism: Mechanism,
    beacon: bool,
    /// Whether heads read keys.
    reads: bool,
    /// Whether only every fourth layer and the last one have the mechanism, and the others linear attention.
    hybrid: bool,
}

/// A layer of a hybrid that reads single keys comes after this many linear ones.
const LINEAR_LAYERS: usize = 3;

/// All variants: softmax and selection with and without the Beacon, every other mechanism without it, and hybrids of linear
/// attention with softmax and selection.
pub fn variants() -> Vec<Variant> {
    let variant =
        |name, what, mechanism, beacon| Variant { name, what, mechanism, beacon, reads: true, hybrid: false };
    let mut variants = vec![
        variant("softmax", "softmax attention alone", Mechanism::Softmax, false),
        variant(
            "softmax+beacon",
            "softmax attention with the configuration's Beacon",
            Mechanism::Softmax,
            true,
        ),
        variant(
            "softmax+null",
            "softmax over the selection energies with a learned null slot, without the Beacon",
            Mechanism::SoftmaxNull,
            false,
        ),
        variant(
            "softmax+beacon+null",
            "the same with the configuration's Beacon: the control of gd",
            Mechanism::SoftmaxNull,
            true,
        ),
        Variant {
            reads: false,
            ..variant("beacon", "the Beacon alone: no head reads a key", Mechanism::Gd, true)
        },
        variant("gd", "selection as the configuration has it, with its Beacon", Mechanism::Gd, true),
        variant("gd-bare", "selection without the Beacon", Mechanism::Gd, false),
    ];
    let others = Mechanism::names().iter().filter_map(|name| match Mechanism::named(name) {
        Some(mechanism @ Mechanism::Other(_)) => Some((mechanism, name)),
        _ => None,
    });
    variants.extend(others.map(|(mechanism, name)| {
        let what = match &mechanism {
            Mechanism::Other(other) => other.info().formula,
            _ => "",
        };
        variant(name, what, mechanism, false)
    }));
    let hybrid = |name, what, mechanism| Variant { hybrid: true, ..variant(name, what, mechanism, false) };
    variants.push(hybrid(
        "linear+softmax",
        "linear attention, every fourth layer and the last one softmax",
        Mechanism::Softmax,
    ));
    variants.push(hybrid(
        "linear+gd",
        "linear attention, every fourth layer and the last one selection without the Beacon",
        Mechanism::Gd,
    ));
    variants
}

impl Variant {
    /// The variant of this name.
    ///
    /// # Errors
    /// [`Error::UnknownName`] with the names of all variants.
    pub fn named(name: &str) -> Result<Self> {
        let variants = variants();
        let names: Vec<&str> = variants.iter().map(|v| v.name).collect();
        let unknown = || Error::UnknownName {
            what: "mechanism",
            name: name.into(),
            allowed: names.iter().map(|&name| name.to_owned()).collect(),
            suggestion: nearest(name, &names),
        };
        variants.iter().find(|v| v.name == name).cloned().ok_or_else(unknown)
    }

    /// Whether the variant makes sense for this configuration: those with a Beacon other than `gd` need a configuration
    /// with one, and a mechanism must fit the heads.
    pub fn applies(&self, base: &ModelConfig) -> bool {
        match &self.mechanism {
            Mechanism::Gd if self.reads && !self.hybrid => true,
            Mechanism::Softmax if !self.hybrid => base.gd.beacon.is_some() || !self.beacon,
            _ => self.config(base).is_ok_and(|config| config.validate().is_ok()),
        }
    }

    /// The configuration of this variant. A mechanism that the configuration has keeps its parameters; another one has
    /// those of [`Mechanism::at_context`] for the maximal context.
    ///
    /// # Errors
    /// [`Error::Invalid`] if the variant needs a Beacon and the configuration has none.
    pub fn config(&self, base: &ModelConfig) -> Result<ModelConfig> {
        let needs_beacon = self.beacon && (self.mechanism != Mechanism::Gd || !self.reads);
        if needs_beacon && base.gd.beacon.is_none() {
            return Err(Error::Invalid(format!("{}: the configuration has no Beacon", self.name)));
        }
        let mut config = base.clone();
        if self.hybrid {
            config.gd.beacon = None;
            config.gd.selecting_heads = Vec::new();
            config.gd.mechanism = self.layers(base)?;
            return Ok(config);
        }
        let same = |mechanism: &Mechanism| mechanism.name() == self.mechanism.name();
        // A configuration with layers of several kinds keeps its selecting layers; others replace all of them.
        if self.mechanism != Mechanism::Gd || !base.gd.mechanism.iter().any(same) {
            let own = base.gd.mechanism.iter().find(|mechanism| same(mechanism)).cloned();
            let default = || self.mechanism.at_context(base.max_position_embeddings);
            config.gd.mechanism = vec![own.unwrap_or_else(default)];
        }
        if !self.beacon {
            config.gd.beacon = None;
            config.gd.selecting_heads = Vec::new();
        }
        if !self.reads {
            (config.gd.selecting_heads, config.gd.induction_heads) = (vec![0], Vec::new());
        }
        Ok(config)
    }

    /// The mechanism of every layer of a hybrid.
    fn layers(&self, base: &ModelConfig) -> Result<Vec<Mechanism>> {
        let linear =
            Mechanism::named("linear").ok_or_else(|| Error::Invalid("no linear attention".into()))?;
        let last = base.num_hidden_layers.saturating_sub(1);
        let reads_keys = |layer: usize| layer % (LINEAR_LAYERS + 1) == LINEAR_LAYERS || layer == last;
        let mechanism = |layer| if reads_keys(layer) { &self.mechanism } else { &linear };
        Ok((0..base.num_hidden_layers).map(mechanism).cloned().collect())
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
const WIDTH_STEP: usize = 1;

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
        for v in variants() {
            assert_eq!(Variant::named(v.name).unwrap(), v);
        }
        let e = Variant::named("reformer").unwrap_err().to_string();
        assert!(e.contains("\"reformer\"") && variants().iter().all(|v| e.contains(v.name)), "{e}");
    }

    #[test]
    fn variants_of_the_preset_get_equal_sizes() {
        let base = Recipe::load("tiny").unwrap().model;
        let variants = variants();
        let mut configs: Vec<_> = variants.iter().map(|v| v.config(&base).unwrap()).collect();
        let gd = variants.iter().position(|v| v.name == "gd").unwrap();
        assert_eq!(configs[gd], base);
        let before: Vec<_> = configs.iter().map(|c| parameters(c).unwrap()).collect();
        let largest = *before.iter().max().unwrap();
        assert!(before[0] < largest, "{before:?}");
        let top = before.iter().position(|count| *count == largest).unwrap();
        let unchanged = configs[top].clone();
        let counts = equalize(&mut configs).unwrap();
        // Half a step: in each layer, three matrices change by WIDTH_STEP rows or columns.
        let half = 3 * WIDTH_STEP * base.hidden_size * base.num_hidden_layers / 2;
        for (config, count) in configs.iter().zip(&counts) {
            assert!(count.abs_diff(largest) <= half, "{counts:?} of {largest}");
            assert!(1000 * count.abs_diff(largest) <= largest, "{counts:?} differ by more than 0.1 %");
            assert!(config.intermediate_size.is_multiple_of(WIDTH_STEP));
            assert_eq!(parameters(config).unwrap(), *count);
        }
        assert_eq!(configs[top], unchanged, "the largest configuration is unchanged");
    }

    #[test]
    fn a_hybrid_has_linear_layers_before_every_layer_that_reads_keys() {
        let mut base = Recipe::load("tiny").unwrap().model;
        base.num_hidden_layers = 6;
        let config = Variant::named("linear+gd").unwrap().config(&base).unwrap();
        let names: Vec<&str> = config.gd.mechanism.iter().map(Mechanism::name).collect();
        assert_eq!(names, ["linear", "linear", "linear", "gd", "linear", "gd"]);
        assert!(config.gd.beacon.is_none() && config.validate().is_ok());
    }

    #[test]
    fn softmax_with_a_beacon_needs_a_configuration_with_one() {
        let mut base = Recipe::load("tiny").unwrap().model;
        base.gd.beacon = None;
        let [softmax, gd] = ["softmax+beacon", "gd"].map(|name| Variant::named(name).unwrap());
        assert!(softmax.config(&base).is_err() && !softmax.applies(&base));
        assert_eq!(gd.config(&base).unwrap(), base);
    }

    #[test]
    fn a_mechanism_of_the_configuration_keeps_its_parameters() {
        let mut base = Recipe::load("tiny").unwrap().model;
        let own: Mechanism = serde_json::from_value(serde_json::json!({"name": "topk", "k": 3})).unwrap();
        base.gd.mechanism = vec![own.clone()];
        let [topk, sparsemax] = ["topk", "sparsemax"].map(|name| Variant::named(name).unwrap());
        assert_eq!(topk.config(&base).unwrap().gd.mechanism, [own]);
        assert_eq!(sparsemax.config(&base).unwrap().gd.mechanism[0].name(), "sparsemax");
        // An odd number of heads has no pairs.
        base.num_attention_heads = 3;
        base.num_key_value_heads = 3;
        let differential = Variant::named("differential").unwrap();
        assert!(!differential.applies(&base) && sparsemax.applies(&base));
    }
}
