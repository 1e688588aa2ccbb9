//! Linear attention from sums over keys, chunk by chunk where it is causal.

use candle_core::{Result, Tensor, bail};

use super::chunk::ChunkSets;
use super::state::LinearAttentionState;
use crate::mechanisms::indices::{grouped, matmul};

/// Queries that the causal form computes at once.
const CHUNK: usize = 64;

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
    let dv = v.dim(3)?;
    if causal {
        // One sequence, which began before these positions or with the first of them.
        let at = Tensor::arange(n as i64, 2 * n as i64, q.device())?.unsqueeze(0)?;
        return packed_linear_attention(q, k, v, &at, state);
    }
    let (q, k, state) = features(q, k, v, state)?;
    let state = state.with(&k, v)?;
    Ok((quotient(read(&q, &state)?)?.reshape((b, h, n, dv))?, state))
}

/// Causal [`linear_attention`] of rows that may hold several sequences: `at` `[B|1, N]` (i64) has the position of every query in
/// its own sequence, and a query reads the keys of that sequence only. The first positions of a row may continue a sequence,
/// whose keys are in `state`.
///
/// # Errors
/// Shapes that do not fit.
pub fn packed_linear_attention(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    at: &Tensor,
    state: Option<&LinearAttentionState>,
) -> Result<(Tensor, LinearAttentionState)> {
    let (b, h, n, _) = q.dims4()?;
    if n != k.dim(2)? {
        bail!("q {:?}, k {:?}: N = M expected for causal attention", q.dims(), k.dims());
    }
    let dv = v.dim(3)?;
    let (q, k, mut state) = features(q, k, v, state)?;
    let mut rows = Vec::new();
    for start in (0..n).step_by(CHUNK) {
        let len = CHUNK.min(n - start);
        let (q, k, v) = (q.narrow(3, start, len)?, k.narrow(2, start, len)?, v.narrow(2, start, len)?);
        let sets = ChunkSets::new(&at.narrow(1, start, len)?, q.dtype())?;
        let before = read(&q, &state)?;
        let [top, bottom] = before.map(|part| part.broadcast_mul(&sets.reads));
        let weights = matmul(&q, &k.unsqueeze(2)?.t()?)?.broadcast_mul(&sets.pairs)?;
        let top = (top? + matmul(&weights, &v.unsqueeze(2)?)?)?;
        rows.push(quotient([top, (bottom? + weights.sum_keepdim(4)?)?])?);
        state = state.masked(&sets.keeps)?.with(&k.broadcast_mul(&sets.stays)?, &v)?;
    }
    Ok((Tensor::cat(&rows, 3)?.reshape((b, h, n, dv))?, state))
}

/// The features of queries `[B, Hk, G, N, D]` and keys, and the state before them.
fn features(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    state: Option<&LinearAttentionState>,
) -> Result<(Tensor, Tensor, LinearAttentionState)> {
    if v.dims()[..3] != k.dims()[..3] || k.dim(0)? != q.dim(0)? {
        let (q, k, v) = (q.dims(), k.dims(), v.dims());
        bail!("q {q:?}, k {k:?}, v {v:?}: [B,H,N,D], [B,Hk,M,D] and [B,Hk,M,Dv] expected");
    }
    let of = |x: &Tensor| x.elu(1.0)? + 1.0;
    let state = state.map_or_else(|| LinearAttentionState::empty(k, v), |state| Ok(state.clone()))?;
    Ok((of(&grouped(q, k.dim(1)?)?)?, of(&k.contiguous()?)?, state))
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
