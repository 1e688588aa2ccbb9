//! Scalable-Softmax (Nakanishi, arXiv 2501.19399): scores grow with the logarithm of the number of keys.

use candle_core::{Result, Tensor};
use serde::{Deserialize, Serialize};

use super::definition::{Definition, Info, Sizes, Weight};
use super::rows::{count, per_head};
use super::stages::{Computation, Run, Stages, Warp};

/// `softmax(s ln(n) z) v` with n visible keys and a learned s per head, so that attention does not fade as n grows.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ScalableSoftmax {}

/// The initial s of the paper.
const INITIAL_SCALE: f64 = 0.43;

impl Definition for ScalableSoftmax {
    const INFO: Info = Info {
        formula: "softmax(s ln(n) q k^T / sqrt(D)) v, n visible keys",
        source: "Nakanishi 2025",
        learned: &[("s", "[H]")],
        ..Info::DEFAULT
    };

    fn computation(&self) -> Computation<'_> {
        Computation::Stages(Stages { warp: Some(Box::new(LogKeys)), ..Stages::default() })
    }

    fn weights(&self, sizes: &Sizes) -> Vec<Weight> {
        vec![Weight::constant("s", &[sizes.heads], INITIAL_SCALE)]
    }
}

struct LogKeys;

impl Warp for LogKeys {
    fn name(&self) -> &'static str {
        "s ln(n)"
    }

    fn warp(&self, scores: &Tensor, visible: &Tensor, run: &mut Run) -> Result<Tensor> {
        // A query without keys has no weights in any case; its logarithm must be finite.
        let log = count(visible, scores.dtype())?.maximum(1.0)?.log()?;
        let s = per_head(run.inputs.get("s")?, scores)?;
        scores.broadcast_mul(&log.broadcast_mul(&s)?)
    }
}
