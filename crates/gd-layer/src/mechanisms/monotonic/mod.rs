//! Monotonic attention (Raffel et al. 2017, arXiv 1704.00784): every row scans the keys from the one where the row
//! before it stopped, and stops at each key with a probability.

mod recurrence;

use candle_core::{D, Result, Tensor};
use serde::{Deserialize, Serialize};

pub use self::recurrence::{monotonic_hard, monotonic_weights};
use super::definition::{Definition, Info};
use super::indices::{one_hot, project};
use super::inputs::{Inputs, Outputs};
use super::stages::Computation;

/// Monotonic attention by probabilities, or by hard decisions as in decoding.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Monotonic {
    /// Whether the input `noise` is added to the energies, as in training.
    pub noisy: bool,
    /// Whether every row selects one key or none; see [`monotonic_hard`]. It has no gradient.
    pub hard: bool,
}

impl Default for Monotonic {
    fn default() -> Self {
        Self { noisy: true, hard: false }
    }
}

impl Definition for Monotonic {
    const INFO: Info = Info {
        formula: "alpha_ij = p_ij q_ij, q_ij = (1 - p_{i,j-1}) q_{i,j-1} + alpha_{i-1,j}, p = sigmoid(e + noise)",
        source: "Raffel et al. 2017",
        inputs: &[
            ("q", "[B,N,Dq]"),
            ("k", "[B,M,Dk]"),
            ("e", "[B,N,M], energies in place of q and k if hard"),
        ],
        learned: &[
            ("W", "[A,Dq]"),
            ("V", "[A,Dk]"),
            ("b", "[A]"),
            ("vec", "[A]"),
            ("g", "[1], starts at 1/sqrt(A)"),
            ("r", "[1], starts negative, such as -4"),
        ],
        constants: &[("noise", "[B,N,M], optional")],
        parameters: &[
            ("noisy", "true: the noise is added to the energies, as in training"),
            ("hard", "true: one key or none per row, without gradient"),
        ],
        memory: "N x M",
        not_in_models: Some("each row depends on the row before it"),
        ..Info::DEFAULT
    };

    fn computation(&self) -> Computation<'_> {
        Computation::whole("additive energies > sigmoid > recurrence over rows and keys", |inputs| {
            let mut outputs = Outputs::default();
            let weights = if self.hard {
                let energies = inputs.optional("e").map_or_else(|| energies(inputs), |e| Ok(e.clone()))?;
                let t = monotonic_hard(&energies)?;
                let weights = one_hot(&t, energies.dim(2)?, energies.dtype())?;
                outputs.insert("t", t);
                weights
            } else {
                let energies = energies(inputs)?;
                let noise = inputs.optional("noise").filter(|_| self.noisy);
                let weights = monotonic_weights(&energies, noise)?;
                outputs.insert("e", energies);
                weights
            };
            outputs.insert("abstain", (1.0 - weights.sum(D::Minus1)?)?);
            outputs.insert("out", weights.clone());
            outputs.insert("weights", weights);
            Ok(outputs)
        })
    }
}

/// The energies `g · vecᵀ/‖vec‖ · tanh(W q + V k + b) + r`, `[B, N, M]`.
fn energies(inputs: &Inputs) -> Result<Tensor> {
    let get = |name| inputs.get(name);
    let q = project(get("q")?, get("W")?)?;
    let k = project(get("k")?, get("V")?)?.broadcast_add(get("b")?)?;
    let hidden = q.unsqueeze(2)?.broadcast_add(&k.unsqueeze(1)?)?.tanh()?;
    let vector = get("vec")?;
    let direction = vector.broadcast_div(&vector.sqr()?.sum_all()?.sqrt()?)?.unsqueeze(0)?;
    let e = project(&hidden, &direction)?.squeeze(D::Minus1)?;
    e.broadcast_mul(get("g")?)?.broadcast_add(get("r")?)
}
