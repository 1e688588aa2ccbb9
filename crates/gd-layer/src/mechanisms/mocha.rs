//! Monotonic chunkwise attention, MoChA (Chiu and Raffel 2018, arXiv 1712.05382): softmax over the last w keys up to the
//! one that monotonic attention selects.

use candle_core::{D, Result, Tensor, bail};
use serde::{Deserialize, Serialize};

use super::definition::{Definition, Info};
use super::indices::{arange, matmul, one_hot, visible_softmax};
use super::inputs::Outputs;
use super::monotonic::{monotonic_hard, monotonic_weights};
use super::stages::Computation;

/// Monotonic chunkwise attention by probabilities, or by hard decisions as in decoding.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Mocha {
    /// Keys of a window.
    pub w: usize,
    /// Whether every row reads the window of one key, or none; see [`mocha_hard`]. Energies have no gradient then.
    pub hard: bool,
}

impl Default for Mocha {
    fn default() -> Self {
        Self { w: 8, hard: false }
    }
}

impl Definition for Mocha {
    const INFO: Info = Info {
        formula: "beta_ij = sum_{k=j}^{j+w-1} alpha_ik exp(u_ij) / sum_{l=k-w+1}^k exp(u_il), alpha monotonic",
        source: "Chiu and Raffel 2018",
        inputs: &[("e", "[B,N,M], energies"), ("u", "[B,N,M], chunk energies"), ("v", "[B,M,Dv]")],
        constants: &[("noise", "[B,N,M], optional")],
        parameters: &[
            ("w", "keys of a window, at least 1"),
            ("hard", "true: the window of one key or none per row"),
        ],
        memory: "N x M x w",
        not_in_models: Some("each row depends on the row before it"),
        ..Info::DEFAULT
    };

    fn computation(&self) -> Computation<'_> {
        Computation::whole("monotonic weights > softmax within windows > values", |inputs| {
            let (e, u, v) = (inputs.get("e")?, inputs.get("u")?, inputs.get("v")?);
            let mut outputs = Outputs::default();
            let weights = if self.hard {
                let t = monotonic_hard(e)?;
                let weights = mocha_hard(&t, u, self.w)?;
                outputs.insert("t", t);
                weights
            } else {
                let alpha = monotonic_weights(e, inputs.optional("noise"))?;
                let weights = mocha_weights(&alpha, u, self.w)?;
                outputs.insert("alpha", alpha);
                weights
            };
            outputs.insert("out", matmul(&weights, v)?);
            outputs.insert("abstain", (1.0 - weights.sum(D::Minus1)?)?);
            outputs.insert("weights", weights);
            Ok(outputs)
        })
    }

    fn validate(&self) -> Result<()> {
        match self.w {
            0 => bail!("w 0: a window of at least 1 key expected"),
            _ => Ok(()),
        }
    }
}

/// The weights `β_ij = Σ_{k=j}^{j+w−1} α_ik exp(u_ij) / Σ_{l=k−w+1}^{k} exp(u_il)`, with windows that end at the row's
/// first key, from `alpha` of [`monotonic_weights`](super::monotonic_weights) and chunk energies u, both `[B, N, M]`.
///
/// Each window has its own maximum, so that large differences between windows do not underflow. The sum of a row is that
/// of alpha; with w = 1 the weights are alpha. Memory: O(N·M·w).
///
/// # Errors
/// Shapes that differ.
pub fn mocha_weights(alpha: &Tensor, u: &Tensor, window: usize) -> Result<Tensor> {
    if alpha.dims() != u.dims() {
        bail!("mocha: alpha is {:?} and u {:?}; equal shapes [B, N, M] are needed", alpha.dims(), u.dims());
    }
    let m = alpha.dim(2)?;
    let shares = window_softmax(u, window)?;
    let mut beta = alpha.zeros_like()?;
    for back in 0..shares.dim(3)? {
        // The window that ends at key k gives this share to key k − back.
        let given = (alpha * shares.narrow(3, back, 1)?.squeeze(3)?)?;
        beta = (beta + given.narrow(2, back, m - back)?.pad_with_zeros(2, 0, back)?)?;
    }
    Ok(beta)
}

/// Hard decoding: the weights `[B, N, M]` of a softmax of u over the w keys that end at the key `t` `[B, N]` of
/// [`monotonic_hard`]; 0 in rows without a key.
///
/// # Errors
/// As [`mocha_weights`].
pub fn mocha_hard(t: &Tensor, u: &Tensor, window: usize) -> Result<Tensor> {
    mocha_weights(&one_hot(t, u.dim(2)?, u.dtype())?, u, window)
}

/// The softmax of every window of u `[B, N, M]`: element `[.., k, back]` is the weight of key k − back in the window
/// that ends at key k, 0 before the first key. `[B, N, M, min(w, M)]`.
fn window_softmax(u: &Tensor, window: usize) -> Result<Tensor> {
    let m = u.dim(2)?;
    let window = window.min(m);
    let shifted = |back: usize| u.narrow(2, 0, m - back)?.pad_with_zeros(2, back, 0);
    let windows = Tensor::stack(&(0..window).map(shifted).collect::<Result<Vec<_>>>()?, 3)?;
    let exists = arange(m, u.device())?.unsqueeze(1)?.broadcast_ge(&arange(window, u.device())?)?;
    visible_softmax(&windows, &exists)
}
