//! The gated running average: `a_t = sigmoid(decay_t)`, `n_t = a_t n_{t-1} + e^{write_t} v_t`,
//! `d_t = a_t d_{t-1} + e^{write_t}`, `m_t = n_t / d_t`.
//!
//! Shapes for one head: decay, write `[N]`, v `[N, D]`, m `[N, D]`; the state holds n `[D]` and d.

use super::{add_scaled, dot, logsumexp, sigmoid};

/// Numerator n and denominator d after a position.
#[derive(Debug, Clone, PartialEq)]
pub struct State {
    /// n `[D]`.
    pub numerator: Vec<f64>,
    /// d.
    pub denominator: f64,
}

/// The recurrence, computed literally. Returns m `[N, D]` and the state after the last position; without `state` n and
/// d start at 0.
pub fn average(
    decay: &[f64],
    write: &[f64],
    v: &[f64],
    dim: usize,
    state: Option<&State>,
) -> (Vec<f64>, State) {
    let empty = || State { numerator: vec![0.0; dim], denominator: 0.0 };
    let mut state = state.cloned().unwrap_or_else(empty);
    let mut m = Vec::with_capacity(v.len());
    for ((decay, write), v) in decay.iter().zip(write).zip(v.chunks(dim)) {
        let (keep, add) = (sigmoid(*decay), write.exp());
        state.numerator.iter_mut().for_each(|n| *n *= keep);
        add_scaled(&mut state.numerator, add, v);
        state.denominator = keep * state.denominator + add;
        m.extend(state.numerator.iter().map(|n| n / state.denominator));
    }
    (m, state)
}

/// The weight of each position s in m_t, `[t + 1]`, by the closed form
/// `w_ts = e^{write_s} prod_{s < r <= t} a_r` in logarithms, over their sum.
pub fn shares(decay: &[f64], write: &[f64], t: usize) -> Vec<f64> {
    let log_keep = |r: usize| -logsumexp([0.0, -decay[r]].into_iter());
    let logs: Vec<f64> = (0..=t).map(|s| write[s] + (s + 1..=t).map(log_keep).sum::<f64>()).collect();
    let total = logsumexp(logs.iter().copied());
    logs.iter().map(|l| (l - total).exp()).collect()
}

/// The closed form of [`average`] from an empty state.
pub fn average_direct(decay: &[f64], write: &[f64], v: &[f64], dim: usize) -> Vec<f64> {
    let mut m = vec![0.0; v.len()];
    for (t, m) in m.chunks_mut(dim).enumerate() {
        for (share, v) in shares(decay, write, t).iter().zip(v.chunks(dim)) {
            add_scaled(m, *share, v);
        }
    }
    m
}

/// The gradients of `(decay, write, v)` from `dm` `[N, D]`, by the closed form with an empty state.
pub fn average_backward(
    decay: &[f64],
    write: &[f64],
    v: &[f64],
    dim: usize,
    dm: &[f64],
) -> (Vec<f64>, Vec<f64>, Vec<f64>) {
    let m = average_direct(decay, write, v, dim);
    let (mut d_decay, mut d_write) = (vec![0.0; decay.len()], vec![0.0; decay.len()]);
    let mut d_v = vec![0.0; v.len()];
    for t in 0..decay.len() {
        let (m, dm) = (&m[t * dim..][..dim], &dm[t * dim..][..dim]);
        for (s, share) in shares(decay, write, t).into_iter().enumerate() {
            let value = &v[s * dim..][..dim];
            add_scaled(&mut d_v[s * dim..][..dim], share, dm);
            let d_log = share * (dot(dm, value) - dot(dm, m));
            d_write[s] += d_log;
            for r in s + 1..=t {
                d_decay[r] += d_log * sigmoid(-decay[r]);
            }
        }
    }
    (d_decay, d_write, d_v)
}
