//! Alpha-entmax (Peters et al., arXiv 1905.05702), with an alpha that is fixed or learned per head (Correia et al.,
//! arXiv 1909.00015).
//!
//! `p = relu((alpha - 1) z - tau)^(1 / (alpha - 1))` with the tau for which p sums to 1; alpha 2 is sparsemax, and
//! alpha 1 would be softmax.

mod rows;

use candle_core::{Result, Tensor};
use candle_nn::ops::sigmoid;
use serde::{Deserialize, Serialize};

pub(super) use self::rows::entmax_fixed;
pub use self::rows::{EntmaxRows, entmax};
use super::definition::{Definition, Info, Sizes, Weight};
use super::rows::per_head;
use super::stages::{Computation, Normalise, Normalised, Run, Stages};

/// The least alpha of a learned one.
const MIN_ALPHA: f64 = 1.01;
/// Attention with alpha-entmax in place of softmax.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Entmax {
    /// The exponent.
    pub alpha: Alpha,
}

/// The exponent of entmax: in a configuration a number, or `"learned"`.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum Alpha {
    /// The same for all heads, above 1.
    Fixed(f64),
    /// 1 + sigmoid(a) per head with the input `a` `[H]`, at least 1.01.
    Learned(Learned),
}

/// The word `learned`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Learned {
    /// Learned.
    Learned,
}

impl Default for Entmax {
    fn default() -> Self {
        Self { alpha: Alpha::Fixed(1.5) }
    }
}

impl Definition for Entmax {
    const INFO: Info = Info {
        formula: "entmax_alpha(q k^T / sqrt(D)) v",
        source: "Peters et al. 2019; Correia et al. 2019 (learned alpha)",
        learned: &[("a", "[H], if alpha is learned")],
        parameters: &[("alpha", "a number above 1, or \"learned\": 1 + sigmoid(a) per head")],
        ..Info::DEFAULT
    };

    fn computation(&self) -> Computation<'_> {
        Computation::Stages(Stages { normalise: Box::new(Normaliser(self.alpha)), ..Stages::default() })
    }

    fn validate(&self) -> Result<()> {
        match self.alpha {
            Alpha::Fixed(alpha) if !(alpha > 1.0 && alpha.is_finite()) => {
                candle_core::bail!("alpha {alpha}: a number above 1, or \"learned\", expected")
            }
            _ => Ok(()),
        }
    }

    fn weights(&self, sizes: &Sizes) -> Vec<Weight> {
        match self.alpha {
            Alpha::Fixed(_) => Vec::new(),
            // alpha starts at 1.5.
            Alpha::Learned(_) => vec![Weight::constant("a", &[sizes.heads], 0.0)],
        }
    }
}

struct Normaliser(Alpha);

impl Normalise for Normaliser {
    fn name(&self) -> &'static str {
        "entmax"
    }

    fn normalise(&self, scores: &Tensor, support: &Tensor, run: &mut Run) -> Result<Normalised> {
        let weights = match self.0 {
            Alpha::Fixed(alpha) => entmax_fixed(scores, support, alpha)?,
            Alpha::Learned(_) => {
                let alpha = (sigmoid(run.inputs.get("a")?)? + 1.0)?.maximum(MIN_ALPHA)?;
                entmax(scores, support, &per_head(&alpha, scores)?)?.weights
            }
        };
        Ok(weights.into())
    }
}
