//! The stages of differential attention.

use candle_core::{D, Result, Tensor};

use crate::mechanisms::dot::{grouped_matmul, scaled_dot};
use crate::mechanisms::rows::softmax;
use crate::mechanisms::stages::{Aggregate, Normalise, Normalised, Run, Score};

/// The two maps of every head: `[B, 2, H, N, M]`.
pub(super) struct PairedDot;

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

/// The first map minus lambda times the second.
pub(super) struct Difference {
    pub(super) lambda_init: f64,
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
pub(super) struct NormedValues {
    pub(super) factor: f64,
    pub(super) eps: f64,
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
