//! Sparsemax (Martins and Astudillo, arXiv 1602.02068): the projection of the scores onto the simplex.

use candle_core::{Result, Tensor};
use serde::{Deserialize, Serialize};

use super::definition::{Definition, Info};
use super::entmax::entmax_fixed;
use super::stages::{Computation, Normalise, Normalised, Run, Stages};

/// Attention with sparsemax in place of softmax, `relu(z - tau)` with the tau for which a row sums to 1.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Sparsemax {}

impl Definition for Sparsemax {
    const INFO: Info = Info {
        formula: "relu(z - tau) v with tau so that each row sums to 1, z = q k^T / sqrt(D)",
        source: "Martins and Astudillo 2016",
        ..Info::DEFAULT
    };

    fn computation(&self) -> Computation<'_> {
        Computation::Stages(Stages { normalise: Box::new(Normaliser), ..Stages::default() })
    }
}

struct Normaliser;

impl Normalise for Normaliser {
    fn name(&self) -> &'static str {
        "sparsemax"
    }

    fn normalise(&self, scores: &Tensor, support: &Tensor, _: &mut Run) -> Result<Normalised> {
        // Sparsemax is entmax with alpha 2.
        Ok(entmax_fixed(scores, support, 2.0)?.into())
    }
}
