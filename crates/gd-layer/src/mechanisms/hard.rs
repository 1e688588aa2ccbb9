//! Unique hard attention: the value of the greatest score (Yang et al., arXiv 2310.13897; Jerad et al.,
//! arXiv 2503.14615, on the side of the ties), with Gumbel noise (Jang et al., arXiv 1611.01144) in training.

use candle_core::{D, Result, Tensor};
use serde::{Deserialize, Serialize};

use super::definition::{Definition, Info};
use super::rows::{both, count, fill, positions, row_max, softmax, straight_through};
use super::stages::{Computation, Normalise, Normalised, Run, Stages, Warp};

/// One-hot weights on the greatest visible score. The gradient is straight-through: that of softmax(z), or of
/// softmax((z + noise) / tau) with the input `noise`, which is added to the scores.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Hard {
    /// The keys that share a greatest score.
    pub ties: Ties,
    /// Temperature tau of the gradient with noise, above 0.
    pub gumbel_tau: f64,
}

/// What several greatest scores of a row mean.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Ties {
    /// The first of the keys.
    #[default]
    First,
    /// The last of them, which defines another class of languages.
    Last,
    /// Equal weights for all of them.
    Average,
}

impl Default for Hard {
    fn default() -> Self {
        Self { ties: Ties::First, gumbel_tau: 1.0 }
    }
}

impl Definition for Hard {
    const INFO: Info = Info {
        formula: "v at the argmax of q k^T / sqrt(D) (+ noise); gradient of the softmax",
        source: "Yang et al. 2024; Jerad et al. 2025; Jang et al. 2017 (Gumbel)",
        constants: &[("mask", "[N,M]"), ("noise", "[B,H,N,M], optional")],
        parameters: &[
            ("ties", "first, last or average"),
            ("gumbel_tau", "temperature of the gradient with noise, above 0"),
        ],
        ..Info::DEFAULT
    };

    fn computation(&self) -> Computation<'_> {
        Computation::Stages(Stages {
            warp: Some(Box::new(Noise)),
            normalise: Box::new(OneHot { ties: self.ties, tau: self.gumbel_tau }),
            ..Stages::default()
        })
    }

    fn validate(&self) -> Result<()> {
        if !(self.gumbel_tau > 0.0 && self.gumbel_tau.is_finite()) {
            candle_core::bail!("gumbel_tau {}: a number above 0 expected", self.gumbel_tau);
        }
        Ok(())
    }
}

/// Adds the input `noise`, if there is one.
struct Noise;

impl Warp for Noise {
    fn name(&self) -> &'static str {
        "noise"
    }

    fn warp(&self, scores: &Tensor, _: &Tensor, run: &mut Run) -> Result<Tensor> {
        run.inputs.optional("noise").map_or_else(|| Ok(scores.clone()), |noise| scores + noise)
    }
}

struct OneHot {
    ties: Ties,
    tau: f64,
}

impl Normalise for OneHot {
    fn name(&self) -> &'static str {
        match self.ties {
            Ties::First => "argmax (first), straight-through",
            Ties::Last => "argmax (last), straight-through",
            Ties::Average => "argmax (average), straight-through",
        }
    }

    fn normalise(&self, scores: &Tensor, support: &Tensor, run: &mut Run) -> Result<Normalised> {
        let hard = one_hot(&scores.detach(), support, self.ties)?;
        let tau = if run.inputs.optional("noise").is_some() { self.tau } else { 1.0 };
        Ok(straight_through(&hard, &softmax(&(scores / tau)?, support)?)?.into())
    }
}

/// Weights on the greatest scores of the set, 0 in a row with an empty set. Without gradient.
pub(super) fn one_hot(scores: &Tensor, set: &Tensor, ties: Ties) -> Result<Tensor> {
    let greatest = both(&scores.broadcast_eq(&row_max(scores, set)?)?, set)?;
    let (dtype, keys) = (scores.dtype(), scores.dim(D::Minus1)? as f64);
    let positions = positions(scores)?;
    let chosen = match ties {
        Ties::First => fill(&positions, &greatest, keys)?.min_keepdim(D::Minus1)?,
        Ties::Last => fill(&positions, &greatest, -1.0)?.max_keepdim(D::Minus1)?,
        Ties::Average => {
            let shares = count(&greatest, dtype)?.maximum(1.0)?;
            return greatest.to_dtype(dtype)?.broadcast_div(&shares);
        }
    };
    positions.broadcast_eq(&chosen)?.to_dtype(dtype)
}
