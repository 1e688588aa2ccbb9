//! Changes the attention mechanism of layers of a pretrained model; the weights stay.
//!
//! A softmax layer that becomes a selecting layer blends the values of the K keys with the highest scores by the softmax
//! of these scores. With all keys as candidates this is softmax attention. A layer with another mechanism reads the same
//! queries, keys and values in its own way; the learned parameters of the mechanism are new, with its initial values.

use std::collections::BTreeMap;
use std::str::FromStr;

use candle_core::Tensor;
use gd_kernels::{Estimator, Score};
use gd_layer::GdConfig;

use crate::config::{Mechanism, ModelConfig};
use crate::error::{Error, Result};
use crate::model::params::Params;
use crate::model::pretrained::Parts;

/// A change of the attention of layers.
#[derive(Debug, Clone, PartialEq)]
pub struct Swap {
    /// The layers to change.
    pub layers: Layers,
    /// The new mechanism.
    pub mechanism: Mechanism,
    /// The number of keys that a selecting layer blends: one of [`gd_kernels::CANDIDATES`].
    pub candidates: usize,
    /// The scores of a selecting layer: dot products divided by the square root of head_dim, or energies with the prior
    /// that makes them equivalent.
    pub score: Score,
}

/// A choice of layers of a model, parsed from `all`, `last:N` or a list such as `0,3`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Layers {
    /// All layers.
    All,
    /// The last N layers.
    Last(usize),
    /// The layers with these numbers, counted from 0.
    List(Vec<usize>),
}

impl FromStr for Layers {
    type Err = String;

    fn from_str(text: &str) -> std::result::Result<Self, String> {
        let number = |n: &str| n.trim().parse::<usize>().map_err(|_| format!("`{n}` is not a layer number"));
        match text.strip_prefix("last:") {
            Some(n) => Ok(Self::Last(number(n)?)),
            None if text == "all" => Ok(Self::All),
            None => Ok(Self::List(text.split(',').map(number).collect::<std::result::Result<_, _>>()?)),
        }
    }
}

impl Layers {
    /// The numbers of the layers in a model of `count` layers, ascending.
    ///
    /// # Errors
    /// A layer that the model does not have.
    pub fn numbers(&self, count: usize) -> Result<Vec<usize>> {
        let mut layers = match self {
            Self::All => (0..count).collect(),
            Self::Last(n) if *n <= count => (count - n..count).collect(),
            Self::Last(n) => return Err(Error::Invalid(format!("the last {n} of {count} layers"))),
            Self::List(list) => list.clone(),
        };
        layers.sort_unstable();
        layers.dedup();
        match layers.last() {
            Some(last) if *last >= count => {
                Err(Error::Invalid(format!("layer {last} of a model with layers 0 to {}", count - 1)))
            }
            Some(_) => Ok(layers),
            None => Err(Error::Invalid("no layer is named".into())),
        }
    }
}

/// The blocks of an attention that hold the learned parameters of its mechanism: those of selection, and those of others.
const LEARNED: [&str; 2] = ["gd", "mechanism"];

/// Whether a parameter belongs to one of these blocks of one of these layers.
fn is_in(name: &str, blocks: &[&str], layers: &[usize]) -> bool {
    let starts =
        |layer: &usize, block: &str| name.starts_with(&format!("model.layers.{layer}.self_attn.{block}."));
    layers.iter().any(|layer| blocks.iter().any(|block| starts(layer, block)))
}

/// Removes the learned parameters of the mechanism of layers: a new mechanism starts with its own initial values.
pub(crate) fn remove_scores(tensors: &mut BTreeMap<String, Tensor>, layers: &[usize]) {
    tensors.retain(|name, _| !is_in(name, &LEARNED, layers));
}

/// The number of the learned parameters that the mechanisms of `layers` other than selection have. A conversion leaves them
/// at their initial values; those of selection start as softmax attention.
pub fn new_parameters(params: &Params, layers: &[usize]) -> usize {
    let tensors = params.tensors();
    let new = tensors.iter().filter(|(name, _)| is_in(name, &LEARNED[1..], layers));
    new.map(|(_, tensor)| tensor.elem_count()).sum()
}

impl Swap {
    /// Changes the layers of a model. Returns their numbers.
    ///
    /// # Errors
    /// A layer that the model does not have, other selecting layers with other settings, a mechanism that does not fit the
    /// heads or windows of a layer, or missing tensors.
    pub fn apply(&self, parts: &mut Parts) -> Result<Vec<usize>> {
        let (config, layers) = self.resolve(parts)?;
        parts.config = config;
        remove_scores(&mut parts.tensors, &layers);
        parts.seed = Some(0);
        Ok(layers)
    }

    /// The configuration of a model after the change, and the numbers of the changed layers.
    ///
    /// # Errors
    /// As [`Swap::apply`].
    pub fn resolve(&self, parts: &Parts) -> Result<(ModelConfig, Vec<usize>)> {
        let layers = self.layers.numbers(parts.config.num_hidden_layers)?;
        // The model must be complete before the change; the tensors that are missing after it are those of the new layers.
        parts.require_complete()?;
        Ok((self.config(&parts.config, &layers)?, layers))
    }

    /// The configuration `config` with the mechanism of `layers` changed.
    fn config(&self, config: &ModelConfig, layers: &[usize]) -> Result<ModelConfig> {
        let mut config = config.clone();
        let all = 0..config.num_hidden_layers;
        let others = || all.clone().filter(|i| !layers.contains(i));
        if self.mechanism == Mechanism::Gd {
            let select = GdConfig {
                candidates: self.candidates,
                score: self.score,
                norm_prior: self.score == Score::Energy,
                estimator: Estimator::Blend,
                ..GdConfig::default()
            };
            let selecting = others().find(|&i| *config.mechanism(i) == Mechanism::Gd);
            if let Some(other) = selecting.filter(|_| config.gd.select != select) {
                return Err(Error::Invalid(format!(
                    "layer {other} selects already, and in another way; swap it too"
                )));
            }
            config.gd.select = select;
        }
        let of = |i| if layers.contains(&i) { &self.mechanism } else { config.mechanism(i) };
        let mut mechanism: Vec<_> = all.clone().map(|i| of(i).clone()).collect();
        if mechanism.iter().all(|m| *m == mechanism[0]) {
            mechanism.truncate(1);
        }
        config.gd.mechanism = mechanism;
        config.validate()?;
        Ok(config)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Recipe;

    #[test]
    fn layers_are_read_and_must_exist() {
        let of = |text: &str| text.parse::<Layers>().unwrap().numbers(4).map_err(|e| e.to_string());
        assert_eq!(of("all"), Ok(vec![0, 1, 2, 3]));
        assert_eq!(of("last:2"), Ok(vec![2, 3]));
        assert_eq!(of("3, 0,3"), Ok(vec![0, 3]));
        assert_eq!(of("4"), Err("layer 4 of a model with layers 0 to 3".into()));
        assert_eq!(of("last:5"), Err("the last 5 of 4 layers".into()));
        assert_eq!(of("last:0"), Err("no layer is named".into()));
        for bad in ["", "some", "1-2", "last:", "-1"] {
            assert!(bad.parse::<Layers>().unwrap_err().contains("not a layer number"), "{bad}");
        }
    }

    #[test]
    fn all_selecting_layers_need_the_same_settings() {
        let tiny = Recipe::load("tiny").unwrap().model;
        let swap = Swap { layers: Layers::All, mechanism: Mechanism::Gd, candidates: 4, score: Score::Dot };
        let e = swap.config(&tiny, &[3]).unwrap_err().to_string();
        assert!(e.contains("layer 0"), "{e}");
        let all = swap.config(&tiny, &[0, 1, 2, 3]).unwrap();
        assert_eq!((all.gd.mechanism.len(), all.gd.select.candidates), (1, 4));
        let some = Swap { mechanism: Mechanism::Softmax, ..swap }.config(&all, &[1, 2]).unwrap();
        assert_eq!(some.gd.mechanism, [Mechanism::Gd, Mechanism::Softmax, Mechanism::Softmax, Mechanism::Gd]);
        assert_eq!(some.gd.select, all.gd.select);
    }
}
