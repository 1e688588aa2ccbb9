//! The naive f64 reference: the theory and every operator, written for reading and not for speed.
//!
//! It shares no code with the kernels; only the option types and the getters of [`crate::Mask`] are
//! common. Everything is a plain `f64` slice, row-major, in the layout of the operators: q
//! `[B, Hq, N, D]`, k `[B, Hk, M, D]`, v `[B, Hk, M, Dv]`, y `[B, Hq, N, Dv]`.
//!
//! - [`theory`]: energy, coherence point, minimal energy of one query-key pair.
//! - [`scan()`]: all energies of a row, and its least ones.
//! - [`barrier()`], [`refine`], [`gate`], [`select()`]: the choice among the candidates.
//! - [`estimator`], [`backward()`]: the gradients that stand for the choice.
//! - [`average`]: the gated running average.

pub mod average;
pub mod backward;
pub mod barrier;
pub mod estimator;
pub mod gate;
pub mod problem;
pub mod refine;
pub mod scan;
pub mod select;
pub mod theory;

pub use backward::{Gradients, backward};
pub use barrier::{Lift, barrier};
pub use problem::{Params, Problem};
pub use scan::{Candidates, scan};
pub use select::{Selected, select};

/// The inner product of two rows.
pub fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

/// The squared distance of two rows, by direct differences.
pub fn distance2(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| (a - b) * (a - b)).sum()
}

/// The logistic function, without overflow on either side.
pub fn sigmoid(x: f64) -> f64 {
    if x >= 0.0 { 1.0 / (1.0 + (-x).exp()) } else { x.exp() / (1.0 + x.exp()) }
}

/// `ln(sum exp(x))`; minus infinity for nothing.
pub fn logsumexp(x: impl Iterator<Item = f64> + Clone) -> f64 {
    let top = x.clone().fold(f64::NEG_INFINITY, f64::max);
    if top == f64::NEG_INFINITY { top } else { top + x.map(|x| (x - top).exp()).sum::<f64>().ln() }
}

/// `to += scale * row`.
pub(crate) fn add_scaled(to: &mut [f64], scale: f64, row: &[f64]) {
    for (to, x) in to.iter_mut().zip(row) {
        *to += scale * x;
    }
}
