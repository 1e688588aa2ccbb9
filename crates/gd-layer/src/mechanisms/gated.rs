//! Gated attention (Qiu et al., arXiv 2505.06708): a sigmoid gate on the output of the heads.

use candle_core::{Result, Tensor};
use candle_nn::ops::sigmoid;
use serde::{Deserialize, Serialize};

use super::definition::{Definition, Info};
use super::dot::grouped_matmul;
use super::stages::{Aggregate, Computation, Run, Stages};

/// Softmax attention whose heads are multiplied by `sigmoid(x Wg)` before the output projection Wo: one gate per element
/// for Wg `[C, H Dv]`, one per head for Wg `[C, H]`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Gated {}

impl Definition for Gated {
    const INFO: Info = Info {
        formula: "(concat_h(o_h) sigmoid(x Wg)) Wo with o of softmax attention",
        source: "Qiu et al. 2025",
        inputs: &[("q", "[B,H,N,D]"), ("k", "[B,Hk,M,D]"), ("v", "[B,Hk,M,Dv]"), ("x", "[B,N,C]")],
        learned: &[("Wg", "[C,H*Dv] or [C,H]"), ("Wo", "[H*Dv,C]")],
        not_in_models: Some("a model has the elementwise gate for every mechanism: `output_gate`"),
        ..Info::DEFAULT
    };

    fn computation(&self) -> Computation<'_> {
        Computation::Stages(Stages { aggregate: Box::new(GatedValues), ..Stages::default() })
    }
}

struct GatedValues;

impl Aggregate for GatedValues {
    fn name(&self) -> &'static str {
        "values, gate, projection"
    }

    fn aggregate(&self, weights: &Tensor, run: &mut Run) -> Result<Tensor> {
        let [v, x, wg, wo] = ["v", "x", "Wg", "Wo"].map(|name| run.inputs.get(name));
        let (wg, o) = (wg?, grouped_matmul(weights, v?)?);
        let (b, h, n, dv) = o.dims4()?;
        let gates = wg.dim(1)?;
        if gates != h && gates != h * dv {
            candle_core::bail!(
                "Wg {:?}: {h} columns (headwise) or {} (elementwise) expected",
                wg.dims(),
                h * dv
            );
        }
        let gate = sigmoid(&x?.broadcast_matmul(wg)?)?.reshape((b, n, h, gates / h))?;
        let o = o.transpose(1, 2)?.broadcast_mul(&gate)?;
        o.reshape((b, n, h * dv))?.broadcast_matmul(wo?)
    }
}
