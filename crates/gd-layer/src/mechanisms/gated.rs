//! Gated attention (Qiu et al., arXiv 2505.06708): a sigmoid gate on the output of the heads.

use candle_core::{Result, Tensor};
use candle_nn::ops::sigmoid;
use serde::{Deserialize, Serialize};

use super::definition::{Definition, Info, QKV, Sizes, Weight};
use super::dot::grouped_matmul;
use super::stages::{Aggregate, Computation, Run, Stages};

/// Softmax attention whose heads are multiplied by `sigmoid(x Wg)` before the output projection Wo: one gate per element
/// for Wg `[C, H Dv]`, one per head for Wg `[C, H]`. A layer has an output projection of its own; without Wo, the output is
/// that of the heads, `[B, H, N, Dv]`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Gated {
    /// The gates of a layer.
    pub gate: Gates,
}

/// What has a gate of its own.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Gates {
    /// Every element of every head.
    #[default]
    Elementwise,
    /// Every head.
    Headwise,
}

impl Definition for Gated {
    const INFO: Info = Info {
        formula: "(concat_h(o_h) sigmoid(x Wg)) Wo with o of softmax attention",
        source: "Qiu et al. 2025",
        inputs: &[QKV[0], QKV[1], QKV[2], ("x", "[B,N,C]")],
        learned: &[("Wg", "[C,H*Dv] or [C,H]"), ("Wo", "[H*Dv,C], optional")],
        parameters: &[("gate", "elementwise or headwise: Wg of a layer; elsewhere its shape decides")],
        ..Info::DEFAULT
    };

    fn computation(&self) -> Computation<'_> {
        Computation::Stages(Stages { aggregate: Box::new(GatedValues), ..Stages::default() })
    }

    fn weights(&self, sizes: &Sizes) -> Vec<Weight> {
        let gates = match self.gate {
            Gates::Elementwise => sizes.heads * sizes.head_dim,
            Gates::Headwise => sizes.heads,
        };
        vec![Weight::projection("Wg", [sizes.hidden_size, gates])]
    }
}

struct GatedValues;

impl Aggregate for GatedValues {
    fn name(&self) -> &'static str {
        "values, gate, projection"
    }

    fn aggregate(&self, weights: &Tensor, run: &mut Run) -> Result<Tensor> {
        let [v, x, wg] = ["v", "x", "Wg"].map(|name| run.inputs.get(name));
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
        let gate = sigmoid(&x?.broadcast_matmul(wg)?)?.reshape((b, n, h, gates / h))?.transpose(1, 2)?;
        let o = o.broadcast_mul(&gate)?;
        match run.inputs.optional("Wo") {
            Some(wo) => o.transpose(1, 2)?.reshape((b, n, h * dv))?.broadcast_matmul(wo),
            None => Ok(o),
        }
    }
}
