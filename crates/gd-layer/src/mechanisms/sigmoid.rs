//! Sigmoid attention (Ramapuram et al., arXiv 2409.04431).

use candle_core::{D, Result, Tensor};
use serde::{Deserialize, Serialize};

use super::definition::{Definition, Info, Sizes, Weight};
use super::rows::{fill, per_head};
use super::stages::{Computation, Normalise, Normalised, Run, Stages};

/// `sigmoid(z + b) v`: every key has a weight of its own, and rows do not sum to 1.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Sigmoid {
    /// Number M of keys for which a layer is initialised: b starts at -ln M, for every row alike.
    pub keys: usize,
}

impl Default for Sigmoid {
    fn default() -> Self {
        Self { keys: 256 }
    }
}

impl Definition for Sigmoid {
    const INFO: Info = Info {
        formula: "sigmoid(q k^T / sqrt(D) + b) v, b initially -ln M",
        source: "Ramapuram et al. 2024",
        learned: &[("b", "[H], -ln M if absent")],
        parameters: &[("keys", "M of the initial b in a layer, 1 or more")],
        ..Info::DEFAULT
    };

    fn computation(&self) -> Computation<'_> {
        Computation::Stages(Stages { normalise: Box::new(Normaliser), ..Stages::default() })
    }

    fn validate(&self) -> Result<()> {
        if self.keys == 0 {
            candle_core::bail!("keys is 0: the number of keys that a query sees expected, 1 or more");
        }
        Ok(())
    }

    fn weights(&self, sizes: &Sizes) -> Vec<Weight> {
        vec![Weight::constant("b", &[sizes.heads], -(self.keys as f64).ln())]
    }
}

struct Normaliser;

impl Normalise for Normaliser {
    fn name(&self) -> &'static str {
        "sigmoid"
    }

    fn normalise(&self, scores: &Tensor, support: &Tensor, run: &mut Run) -> Result<Normalised> {
        let biased = match run.inputs.optional("b") {
            Some(b) => scores.broadcast_add(&per_head(b, scores)?)?,
            None => (scores - (scores.dim(D::Minus1)? as f64).ln())?,
        };
        let weights = candle_nn::ops::sigmoid(&fill(&biased, support, 0.0)?)?;
        Ok((weights * support.to_dtype(scores.dtype())?)?.into())
    }
}
