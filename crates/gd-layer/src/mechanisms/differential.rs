//! Differential attention (Ye et al., arXiv 2410.05258): the difference of two softmax maps.

use candle_core::{D, Result, Tensor};
use serde::{Deserialize, Serialize};

use super::definition::{Definition, Info, Named, Sizes, Weight};
use super::dot::{grouped_matmul, scaled_dot};
use super::rows::softmax;
use super::stages::{Aggregate, Computation, Normalise, Normalised, Run, Score, Stages};

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

/// The two maps of every head: `[B, 2, H, N, M]`.
struct PairedDot;

impl Score for PairedDot {
    fn name(&self) -> &'static str {
        "scaled dot of pairs"
    }

    fn score(&self, run: &mut Run) -> Result<Tensor> {
        let (q, k) = (run.inputs.get("q")?, run.inputs.get("k")?);
        let (q, k) = (pairs("q", q)?, pairs("k", k)?);
        let map = |i| scaled_dot(&q.narrow(2, i, 1)?.squeeze(2)?, &k.narrow(2, i, 1)?.squeeze(2)?);
        Tensor::stack(&[map(0)?, map(1)?], 1)
    }
}

/// `[B, 2H, N, D]` as `[B, H, 2, N, D]`.
fn pairs(name: &str, t: &Tensor) -> Result<Tensor> {
    let (b, h, n, d) = t.dims4()?;
    if h % 2 != 0 {
        candle_core::bail!("{name} {:?}: an even number of heads expected, two for each map", t.dims());
    }
    t.reshape((b, h / 2, 2, n, d))
}

struct Difference {
    lambda_init: f64,
}

impl Normalise for Difference {
    fn name(&self) -> &'static str {
        "softmax 1 - lambda softmax 2"
    }

    fn normalise(&self, scores: &Tensor, support: &Tensor, run: &mut Run) -> Result<Normalised> {
        let inputs = run.inputs;
        let exp = |q: &str, k: &str| (inputs.get(q)? * inputs.get(k)?)?.sum_all()?.exp();
        let lambda = ((exp("lq1", "lk1")? - exp("lq2", "lk2")?)? + self.lambda_init)?;
        run.outputs.insert("lambda", lambda.reshape(1)?);
        let maps = softmax(scores, support)?;
        let map = |i| maps.narrow(1, i, 1)?.squeeze(1);
        Ok((map(0)? - map(1)?.broadcast_mul(&lambda)?)?.into())
    }
}

/// The weighted sum of the values, normed per head by its root mean square and scaled.
struct NormedValues {
    factor: f64,
    eps: f64,
}

impl Aggregate for NormedValues {
    fn name(&self) -> &'static str {
        "values, RMSNorm"
    }

    fn aggregate(&self, weights: &Tensor, run: &mut Run) -> Result<Tensor> {
        let y = grouped_matmul(weights, run.inputs.get("v")?)?;
        let rms = (y.sqr()?.mean_keepdim(D::Minus1)? + self.eps)?.sqrt()?;
        y.broadcast_div(&rms)?.broadcast_mul(run.inputs.get("gw")?)? * self.factor
    }
}
