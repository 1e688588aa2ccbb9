//! Naive f64 reference implementations of the theory and of the operators, for tests and for reading; they are slow.
//!
//! They share no code with the kernels, only the option types and the getters of [`crate::Mask`]. Tensors are `f64`
//! slices, row-major, in the layout of the operators: q
//! `[B, Hq, N, D]`, k `[B, Hk, M, D]`, v `[B, Hk, M, Dv]`, y `[B, Hq, N, Dv]`.
//!
//! - [`theory`]: energy, coherence point and minimal energy of a pair of query and key.
//! - [`scan()`]: all energies of a row, and the keys of least energy.
//! - [`barrier()`], [`refine`], [`gate`], [`select()`]: the choice among the candidates.
//! - [`estimator`], [`backward()`]: the gradients of the choice, as the estimators define them, and of all inputs.
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

/// The squared Euclidean distance of two rows, as the sum of squared differences.
pub fn distance2(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| (a - b) * (a - b)).sum()
}

/// The logistic function, without overflow on either side.
pub fn sigmoid(x: f64) -> f64 {
    if x >= 0.0 { 1.0 / (1.0 + (-x).exp()) } else { x.exp() / (1.0 + x.exp()) }
}

/// `ln(sum exp(x))`, without overflow; minus infinity for no values.
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
