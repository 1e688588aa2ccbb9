//! Differential attention (Ye et al., arXiv 2410.05258): the difference of two softmax maps.

mod stages;

use candle_core::Result;
use serde::{Deserialize, Serialize};

use self::stages::{Difference, NormedValues, PairedDot};
use super::definition::{Definition, Info, Named, Sizes, Weight};
use super::stages::{Computation, Stages};

/// `(softmax_1 - lambda softmax_2) v` and an RMSNorm per head, times 1 - lambda_init.
///
/// Rows 2h and 2h + 1 of q `[B, 2H, N, D]` belong to head h, and likewise of k `[B, 2Hk, M, D]`; v is
/// `[B, Hk, M, 2D]`. lambda = exp(lq1 . lk1) - exp(lq2 . lk2) + lambda_init, one for the layer.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Differential {
    /// Number l of the layer, from 0, from which lambda_init follows: 0.8 - 0.6 exp(-0.3 l).
    pub layer_index: usize,
    /// The initial lambda, in place of that of the layer.
    pub lambda_init: Option<f64>,
    /// Epsilon of the norm.
    pub eps: f64,
}

impl Default for Differential {
    fn default() -> Self {
        Self { layer_index: 0, lambda_init: None, eps: 1e-5 }
    }
}

const INPUTS: &[Named] = &[("q", "[B,2H,N,D]"), ("k", "[B,2Hk,M,D]"), ("v", "[B,Hk,M,2D]")];

impl Differential {
    fn lambda_init(&self) -> f64 {
        self.lambda_init.unwrap_or_else(|| 0.8 - 0.6 * (-0.3 * self.layer_index as f64).exp())
    }
}

impl Definition for Differential {
    const INFO: Info = Info {
        formula: "RMSNorm((softmax_1 - lambda softmax_2) v) (1 - lambda_init)",
        source: "Ye et al. 2024",
        inputs: INPUTS,
        learned: &[("lq1", "[D]"), ("lk1", "[D]"), ("lq2", "[D]"), ("lk2", "[D]"), ("gw", "[2D]")],
        parameters: &[
            ("layer_index", "number of the layer, from 0"),
            ("lambda_init", "initial lambda, 0.8 - 0.6 exp(-0.3 layer_index) if absent"),
            ("eps", "epsilon of the norm, above 0"),
        ],
        memory: "2 N x M",
        maps: 2,
        ..Info::DEFAULT
    };

    fn computation(&self) -> Computation<'_> {
        let lambda_init = self.lambda_init();
        Computation::Stages(Stages {
            score: Box::new(PairedDot),
            normalise: Box::new(Difference { lambda_init }),
            aggregate: Box::new(NormedValues { factor: 1.0 - lambda_init, eps: self.eps }),
            ..Stages::default()
        })
    }

    fn validate(&self) -> Result<()> {
        if !(self.eps > 0.0 && self.lambda_init().is_finite()) {
            candle_core::bail!(
                "eps {} and lambda_init {:?}: an eps above 0 expected",
                self.eps,
                self.lambda_init
            );
        }
        Ok(())
    }

    fn in_layer(&self, layer: usize) -> Self {
        Self { layer_index: layer, ..self.clone() }
    }

    fn validate_in_layer(&self, sizes: &Sizes) -> Result<()> {
        let Sizes { heads, key_value_heads, .. } = *sizes;
        if heads % 2 != 0 || key_value_heads % 2 != 0 {
            candle_core::bail!(
                "{heads} heads and {key_value_heads} key-value heads: even numbers expected, two for each map"
            );
        }
        Ok(())
    }

    fn weights(&self, sizes: &Sizes) -> Vec<Weight> {
        let vector = |name| Weight { name, shape: vec![sizes.head_dim], mean: 0.0, standard_deviation: 0.1 };
        let mut weights: Vec<_> = ["lq1", "lk1", "lq2", "lk2"].map(vector).into();
        weights.push(Weight::constant("gw", &[2 * sizes.head_dim], 1.0));
        weights
    }
}
