//! One query and one key: the energy landscape between them.
//!
//! With bandwidth `beta` and the query's weight `alpha` the energy of a point s is
//! `Phi(s) = -ln(alpha e^{-beta |s-q|^2} + (1-alpha) e^{-beta |s-k|^2})`. On the passage from q to k it
//! depends only on `t = beta |k-q|^2` and on the fraction `u` of the way, so that most functions of this module take
//! numbers instead of vectors. Rows are `[D]`.

use super::{dot, logsumexp, sigmoid};
use crate::options::CoherenceMode;

/// The jump from a query to a key.
#[derive(Debug, Clone)]
pub struct Pair<'a> {
    /// The query `[D]`.
    pub query: &'a [f64],
    /// The key `[D]`.
    pub key: &'a [f64],
    /// The jump length `|k - q|`.
    pub length: f64,
    /// The unit jump direction `[D]`; all zeros where query and key coincide.
    pub direction: Vec<f64>,
}

impl<'a> Pair<'a> {
    /// The pair of a query and a key of one length.
    pub fn new(query: &'a [f64], key: &'a [f64]) -> Self {
        let jump: Vec<f64> = key.iter().zip(query).map(|(k, q)| k - q).collect();
        let length = dot(&jump, &jump).sqrt();
        let scale = if length > 0.0 { 1.0 / length } else { 0.0 };
        Self { query, key, length, direction: jump.iter().map(|x| x * scale).collect() }
    }

    /// The passage point `q + x g` at distance `x` from the query.
    pub fn passage(&self, x: f64) -> Vec<f64> {
        self.query.iter().zip(&self.direction).map(|(q, g)| q + x * g).collect()
    }

    /// Splits a point into its distance `x` along the jump and its orthogonal residual `y`, so that
    /// `s = q + x g + y` with `<y, g> = 0`.
    pub fn split(&self, point: &[f64]) -> (f64, Vec<f64>) {
        let offset: Vec<f64> = point.iter().zip(self.query).map(|(s, q)| s - q).collect();
        let x = dot(&offset, &self.direction);
        let residual = offset.iter().zip(&self.direction).map(|(o, g)| o - x * g).collect();
        (x, residual)
    }

    /// The semantic energy Phi of a point.
    pub fn energy(&self, point: &[f64], alpha: f64, beta: f64) -> f64 {
        let query = alpha.ln() - beta * super::distance2(point, self.query);
        let key = (1.0 - alpha).ln() - beta * super::distance2(point, self.key);
        -logsumexp([query, key].into_iter())
    }

    /// The coherence point `s* = q + u* L g` `[D]`.
    pub fn coherence_point(&self, alpha: f64, beta: f64, mode: CoherenceMode) -> Vec<f64> {
        let u = coherence(beta * self.length * self.length, alpha, mode).u;
        self.passage(u * self.length)
    }
}

/// The position of the coherence point on the passage, as a fraction of the way from query to key.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Coherence {
    /// The fraction `u*`.
    pub u: f64,
    /// `1 - u*`, with its own relative precision where `u*` rounds to 1.
    pub rest: f64,
}

/// The left side of the coherence equation minus its right side: `u - sigmoid(l + t (2u - 1))` with
/// `l = ln((1 - alpha) / alpha)`.
pub fn coherence_defect(u: f64, t: f64, alpha: f64) -> f64 {
    u - sigmoid(((1.0 - alpha) / alpha).ln() + t * (2.0 * u - 1.0))
}

/// Solves the coherence equation for a squared, scaled jump `t >= 0` and `alpha` in (0, 1).
pub fn coherence(t: f64, alpha: f64, mode: CoherenceMode) -> Coherence {
    if alpha < 0.5 {
        // By symmetry: query and key exchanged.
        let Coherence { u, rest } = coherence(t, 1.0 - alpha, mode);
        return Coherence { u: rest, rest: u };
    }
    let defect = |u| coherence_defect(u, t, alpha);
    let u = match mode {
        // Bisection of [0, 1] starts at 1/2: at alpha = 1/2 it ends there, otherwise it continues toward the heavier
        // well.
        CoherenceMode::Passage => bisect(0.0, 1.0, defect),
        // On [0, 1/2] the defect is concave, below 0 at 0 and not below 0 at 1/2: it leaves the
        // negative side once, at the query's well. The saddle at 1/2 is not tried.
        CoherenceMode::Global => bisect_up(0.0, 0.5, defect),
    };
    Coherence { u, rest: 1.0 - u }
}

/// Halves `[lo, hi]` until it cannot be halved, or until the function is exactly 0 at a midpoint.
fn bisect(mut lo: f64, mut hi: f64, f: impl Fn(f64) -> f64) -> f64 {
    loop {
        let mid = 0.5 * (lo + hi);
        let y = f(mid);
        if y == 0.0 || mid <= lo || mid >= hi {
            return mid;
        }
        if y < 0.0 { lo = mid } else { hi = mid }
    }
}

/// Halves `[lo, hi]` until it cannot be halved, towards the point where the function changes its sign from minus.
fn bisect_up(mut lo: f64, mut hi: f64, f: impl Fn(f64) -> f64) -> f64 {
    loop {
        let mid = 0.5 * (lo + hi);
        if mid <= lo || mid >= hi {
            return hi;
        }
        if f(mid) < 0.0 { lo = mid } else { hi = mid }
    }
}

/// The energy on the passage at a fraction of the way.
pub fn passage_energy(t: f64, at: Coherence, alpha: f64) -> f64 {
    let query = alpha.ln() - t * at.u * at.u;
    let key = (1.0 - alpha).ln() - t * at.rest * at.rest;
    -logsumexp([query, key].into_iter())
}

/// A value at the coherence point with its derivatives.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct AtCoherence {
    /// The value.
    pub value: f64,
    /// Its derivative with respect to t.
    pub d_t: f64,
    /// Its derivative with respect to alpha.
    pub d_alpha: f64,
    /// The coherence point.
    pub at: Coherence,
}

/// The minimal energy `E*(t, alpha)`. The energy is stationary in the coherence point, so that
/// the derivatives hold it fixed: `dE*/dt = u (1 - u)`, `dE*/dalpha = u / (1 - alpha) - (1 - u) / alpha`.
pub fn minimal_energy(t: f64, alpha: f64, mode: CoherenceMode) -> AtCoherence {
    let at = coherence(t, alpha, mode);
    AtCoherence {
        value: passage_energy(t, at, alpha),
        d_t: at.u * at.rest,
        d_alpha: at.u / (1.0 - alpha) - at.rest / alpha,
        at,
    }
}

/// The mixture density `exp(-E*)` at the coherence point: 1 at t = 0, falling to
/// `max(alpha, 1 - alpha)`.
pub fn density(t: f64, alpha: f64, mode: CoherenceMode) -> AtCoherence {
    let energy = minimal_energy(t, alpha, mode);
    let value = (-energy.value).exp();
    AtCoherence { value, d_t: -value * energy.d_t, d_alpha: -value * energy.d_alpha, at: energy.at }
}
