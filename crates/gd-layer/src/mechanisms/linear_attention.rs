//! Linear attention (Katharopoulos et al. 2020, arXiv 2006.16236): a kernel in place of the softmax, with a state of
//! constant size in place of a cache of keys and values.

use candle_core::{Result, Tensor, bail};
use serde::{Deserialize, Serialize};

use super::definition::{Definition, Info};
use super::indices::{arange, grouped, matmul};
use super::inputs::{Inputs, Outputs};
use super::stages::Computation;

/// Queries that the causal form computes at once.
const CHUNK: usize = 64;

/// Linear attention with the features elu(x) + 1.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct LinearAttention {
    /// Whether a query reads keys at or before its own position only.
    pub causal: bool,
}

impl Default for LinearAttention {
    fn default() -> Self {
        Self { causal: true }
    }
}

impl Definition for LinearAttention {
    const INFO: Info = Info {
        formula: "f(q) . sum_j f(k_j) v_j^T / (f(q) . sum_j f(k_j)), f(x) = elu(x) + 1",
        source: "Katharopoulos et al. 2020",
        constants: &[
            ("outer", "[B,Hk,D,Dv], state, optional"),
            ("normaliser", "[B,Hk,D,1], state, optional"),
        ],
        parameters: &[("causal", "true: keys at or before the query, N = M")],
        memory: "N x 64 + D x Dv per head",
        not_in_models: Some("it takes no mask, and its cache is a state"),
        ..Info::DEFAULT
    };

    fn computation(&self) -> Computation<'_> {
        Computation::whole("features > sums over keys > quotient", |inputs| {
            let (q, k, v) = (inputs.get("q")?, inputs.get("k")?, inputs.get("v")?);
            let (out, state) = linear_attention(q, k, v, self.causal, given_state(inputs)?.as_ref())?;
            let mut outputs = Outputs::default();
            outputs.insert("out", out);
            outputs.insert("outer", state.outer);
            outputs.insert("normaliser", state.normaliser);
            Ok(outputs)
        })
    }
}

/// The state among the inputs.
fn given_state(inputs: &Inputs) -> Result<Option<LinearAttentionState>> {
    let Some(outer) = inputs.optional("outer") else { return Ok(None) };
    Ok(Some(LinearAttentionState { outer: outer.clone(), normaliser: inputs.get("normaliser")?.clone() }))
}

/// What linear attention remembers of keys and values.
#[derive(Debug, Clone)]
pub struct LinearAttentionState {
    /// `Σ_j φ(k_j) v_jᵀ`, `[B, Hk, D, Dv]`.
    pub outer: Tensor,
    /// `Σ_j φ(k_j)`, `[B, Hk, D, 1]`.
    pub normaliser: Tensor,
}

impl LinearAttentionState {
    /// The state before the first key of k `[B, Hk, M, D]` and v `[B, Hk, M, Dv]`.
    ///
    /// # Errors
    /// Tensors of another rank.
    pub fn empty(k: &Tensor, v: &Tensor) -> Result<Self> {
        let (b, hk, _, d) = k.dims4()?;
        let zeros = |width: usize| Tensor::zeros((b, hk, d, width), k.dtype(), k.device());
        Ok(Self { outer: zeros(v.dim(3)?)?, normaliser: zeros(1)? })
    }

    /// The state with further keys, given as features φ(k) `[B, Hk, M, D]`, and values `[B, Hk, M, Dv]`.
    fn with(&self, features: &Tensor, v: &Tensor) -> Result<Self> {
        let t = features.t()?;
        Ok(Self {
            outer: (&self.outer + matmul(&t, v)?)?,
            normaliser: (&self.normaliser + t.sum_keepdim(3)?)?,
        })
    }
}

/// `y_i = φ(q_i)ᵀ Σ_j φ(k_j) v_jᵀ / (φ(q_i)ᵀ Σ_j φ(k_j))` with φ(x) = elu(x) + 1, over the keys of `state` and the new ones: all
/// of them, or with `causal` those at or before query i, for which N = M.
///
/// q `[B, H, N, D]`, k `[B, Hk, M, D]`, v `[B, Hk, M, Dv]` -> y `[B, H, N, Dv]` and the state after the new keys. Decoding passes
/// one position at a time with the state of the last call. A query whose denominator is 0 returns 0. Time O((N + M)·D·Dv),
/// memory O(N·64) beside inputs and outputs, not N × M.
///
/// # Errors
/// Shapes that do not fit.
pub fn linear_attention(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    causal: bool,
    state: Option<&LinearAttentionState>,
) -> Result<(Tensor, LinearAttentionState)> {
    let (b, h, n, _) = q.dims4()?;
    let (hk, m, dv) = (k.dim(1)?, k.dim(2)?, v.dim(3)?);
    if (causal && n != m) || v.dims()[..3] != k.dims()[..3] || k.dim(0)? != b {
        let (q, k, v) = (q.dims(), k.dims(), v.dims());
        bail!("q {q:?}, k {k:?}, v {v:?}: [B,H,N,D], [B,Hk,M,D] and [B,Hk,M,Dv] expected, N = M if causal");
    }
    let features = |x: &Tensor| x.elu(1.0)? + 1.0;
    let (q, k) = (features(&grouped(q, hk)?)?, features(&k.contiguous()?)?);
    let mut state = state.map_or_else(|| LinearAttentionState::empty(&k, v), |state| Ok(state.clone()))?;
    if !causal {
        state = state.with(&k, v)?;
        return Ok((quotient(read(&q, &state)?)?.reshape((b, h, n, dv))?, state));
    }
    let mut rows = Vec::new();
    for start in (0..n).step_by(CHUNK) {
        let len = CHUNK.min(n - start);
        let (q, k, v) = (q.narrow(3, start, len)?, k.narrow(2, start, len)?, v.narrow(2, start, len)?);
        let [top, bottom] = read(&q, &state)?;
        let at = arange(len, q.device())?;
        let past = at.unsqueeze(0)?.broadcast_le(&at.unsqueeze(1)?)?.to_dtype(q.dtype())?;
        let weights = matmul(&q, &k.unsqueeze(2)?.t()?)?.broadcast_mul(&past)?;
        let top = (top + matmul(&weights, &v.unsqueeze(2)?)?)?;
        rows.push(quotient([top, (bottom + weights.sum_keepdim(4)?)?])?);
        state = state.with(&k, &v)?;
    }
    Ok((Tensor::cat(&rows, 3)?.reshape((b, h, n, dv))?, state))
}

/// What features of queries `[B, Hk, G, N, D]` read from a state: numerator `[B, Hk, G, N, Dv]` and denominator
/// `[B, Hk, G, N, 1]`.
fn read(q: &Tensor, state: &LinearAttentionState) -> Result<[Tensor; 2]> {
    let of = |t: &Tensor| matmul(q, &t.unsqueeze(2)?);
    Ok([of(&state.outer)?, of(&state.normaliser)?])
}

/// Numerator over denominator, 0 where the denominator is 0.
fn quotient([top, bottom]: [Tensor; 2]) -> Result<Tensor> {
    let zero = bottom.eq(0f64)?.to_dtype(bottom.dtype())?;
    top.broadcast_div(&(bottom + zero)?)
}
