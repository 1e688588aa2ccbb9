//! Softmax attention (Vaswani et al., arXiv 1706.03762), with grouped-query attention (Ainslie et al., arXiv
//! 2305.13245) and the rotary embedding of RoFormer (Su et al., arXiv 2104.09864).

use candle_core::{Result, Tensor};
use serde::{Deserialize, Serialize};

use super::definition::{Definition, Info, QKV};
use super::dot::scaled_dot;
use super::rows;
use super::stages::{Computation, Normalise, Normalised, Run, Score, Stages};

/// `softmax(q k^T / sqrt(D)) v` over the visible keys.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Softmax {
    /// Base of the rotary frequencies, which matters if positions are given.
    pub rope_base: f64,
}

impl Default for Softmax {
    fn default() -> Self {
        Self { rope_base: 10_000.0 }
    }
}

impl Definition for Softmax {
    const INFO: Info = Info {
        formula: "softmax(q k^T / sqrt(D)) v",
        source: "Vaswani et al. 2017; Ainslie et al. 2023 (grouped queries); Su et al. 2021 (rotary embedding)",
        inputs: QKV,
        constants: &[("mask", "[N,M]"), ("pos_q", "[N], optional"), ("pos_k", "[M], optional")],
        parameters: &[("rope_base", "base of the rotary frequencies, used if positions are given")],
        ..Info::DEFAULT
    };

    fn computation(&self) -> Computation<'_> {
        Computation::Stages(Stages {
            score: Box::new(RotaryDot { base: self.rope_base }),
            ..Stages::default()
        })
    }
}

/// Scaled dot products of queries and keys, which are rotated first if `pos_q` and `pos_k` are given. Returns the
/// rotated ones as `q_rot` and `k_rot`.
struct RotaryDot {
    base: f64,
}

impl Score for RotaryDot {
    fn name(&self) -> &'static str {
        "scaled dot (rotary)"
    }

    fn score(&self, run: &mut Run) -> Result<Tensor> {
        let (q, k) = (run.inputs.get("q")?, run.inputs.get("k")?);
        let Some(positions) = run.inputs.optional("pos_q") else { return scaled_dot(q, k) };
        let q = rotate(q, positions, self.base)?;
        let k = rotate(k, run.inputs.get("pos_k")?, self.base)?;
        run.outputs.insert("q_rot", q.clone());
        run.outputs.insert("k_rot", k.clone());
        scaled_dot(&q, &k)
    }
}

/// Turns the pairs (x_i, x_{i + D/2}) of `[B, H, N, D]` by the angles position * base^(-2i/D), in f64 where x is.
fn rotate(x: &Tensor, positions: &Tensor, base: f64) -> Result<Tensor> {
    let (_, _, n, d) = x.dims4()?;
    if d % 2 != 0 || positions.dims() != [n] {
        candle_core::bail!("positions {:?} do not fit x {:?} of even width", positions.dims(), x.dims());
    }
    let half = d / 2;
    let pairs = Tensor::arange(0u32, half as u32, x.device())?.to_dtype(x.dtype())?;
    let frequencies = (pairs * (-2.0 * base.ln() / d as f64))?.exp()?;
    let angles = positions.to_dtype(x.dtype())?.unsqueeze(1)?.broadcast_mul(&frequencies.unsqueeze(0)?)?;
    let (sin, cos) = (angles.sin()?, angles.cos()?);
    let (a, b) = (x.narrow(3, 0, half)?, x.narrow(3, half, half)?);
    let first = (a.broadcast_mul(&cos)? - b.broadcast_mul(&sin)?)?;
    let second = (b.broadcast_mul(&cos)? + a.broadcast_mul(&sin)?)?;
    Tensor::cat(&[first, second], 3)
}

/// The softmax over the support.
pub(super) struct Normaliser;

impl Normalise for Normaliser {
    fn name(&self) -> &'static str {
        "softmax"
    }

    fn normalise(&self, scores: &Tensor, support: &Tensor, _: &mut Run) -> Result<Normalised> {
        Ok(rows::softmax(scores, support)?.into())
    }
}
