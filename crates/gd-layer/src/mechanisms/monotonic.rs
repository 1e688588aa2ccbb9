//! Monotonic attention (Raffel et al. 2017, arXiv 1704.00784): every row scans the keys from the one where the row
//! before it stopped, and stops at each key with a probability.

use candle_core::{D, DType, Result, Tensor};
use candle_nn::ops::sigmoid;
use serde::{Deserialize, Serialize};

use super::definition::{Definition, Info};
use super::indices::{arange, index_or_none, one_hot, project};
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

/// The probabilities α `[B, N, M]` that row i stops at key j, from energies `[B, N, M]` and, in training, noise of that
/// shape that is added to them: with `p = σ(energies + noise)`,
/// `q_ij = (1 − p_{i,j−1}) q_{i,j−1} + α_{i−1,j}` and `α_ij = p_ij q_ij`; the row before the first stands at key 0.
///
/// `1 − Σ_j α_ij` is the probability that the row selects no key. A row that selects none stays behind the last key,
/// and so do all later rows. The recurrence has only sums and products of numbers in 0..1; it takes N + M − 1 steps, each over
/// one anti-diagonal, and O(N·M) memory.
///
/// # Errors
/// Shapes that do not fit.
pub fn monotonic_weights(energies: &Tensor, noise: Option<&Tensor>) -> Result<Tensor> {
    let p = match noise {
        Some(noise) => sigmoid(&(energies + noise)?)?,
        None => sigmoid(energies)?,
    };
    let (b, n, m) = p.dims3()?;
    let p = skewed(&p)?;
    let passed = (1.0 - &p)?;
    let column = |t: &Tensor, d: usize| t.narrow(2, d, 1)?.squeeze(2);
    let first = Tensor::ones((b, 1), p.dtype(), p.device())?.pad_with_zeros(1, 0, n - 1)?;
    let mut reached = first;
    let mut alpha = (&reached * column(&p, 0)?)?;
    let mut columns = vec![alpha.clone()];
    for d in 1..n + m - 1 {
        // The same key in the row before lies on the anti-diagonal before.
        let entering = alpha.pad_with_zeros(1, 1, 0)?.narrow(1, 0, n)?;
        reached = ((column(&passed, d - 1)? * reached)? + entering)?;
        alpha = (&reached * column(&p, d)?)?;
        columns.push(alpha.clone());
    }
    unskewed(&Tensor::stack(&columns, 2)?, m)
}

/// `[B, N, M]` -> `[B, N, N + M − 1]` with row i shifted by i places: the column d holds the anti-diagonal i + j = d.
/// Other places are 0.
fn skewed(x: &Tensor) -> Result<Tensor> {
    let (b, n, m) = x.dims3()?;
    let rows = x.pad_with_zeros(2, 0, n)?.reshape((b, n * (m + n)))?;
    rows.narrow(1, 0, n * (m + n - 1))?.reshape((b, n, m + n - 1))
}

/// The inverse of [`skewed`].
fn unskewed(x: &Tensor, m: usize) -> Result<Tensor> {
    let (b, n, width) = x.dims3()?;
    let rows = x.reshape((b, n * width))?.pad_with_zeros(1, 0, n)?;
    rows.reshape((b, n, width + 1))?.narrow(2, 0, m)
}

/// Hard decoding of energies `[B, N, M]`: row i selects the first key `j ≥ t_{i−1}` with a positive energy, from key 0 in
/// the first row. Returns i64 `[B, N]`, −1 where no key was selected; all rows after such a row are −1 too.
///
/// # Errors
/// Energies of another rank.
pub fn monotonic_hard(energies: &Tensor) -> Result<Tensor> {
    let (b, n, m) = energies.dims3()?;
    let device = energies.device();
    let positive = energies.gt(0f64)?;
    let key = arange(m, device)?.broadcast_as((b, m))?.contiguous()?;
    let none = Tensor::full(m as u32, (b, m), device)?;
    let mut start = Tensor::zeros((b, 1), DType::U32, device)?;
    let mut rows = Vec::with_capacity(n);
    for i in 0..n {
        // After a row without a key, start is m, which no key reaches.
        let admitted = (key.broadcast_ge(&start)? * positive.narrow(1, i, 1)?.squeeze(1)?)?;
        start = admitted.where_cond(&key, &none)?.min_keepdim(1)?;
        rows.push(start.clone());
    }
    let t = Tensor::cat(&rows, 1)?;
    index_or_none(&t, &t.lt(m as u32)?)
}
