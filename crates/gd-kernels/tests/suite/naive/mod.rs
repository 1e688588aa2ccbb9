//! Helpers for the tests of the reference: random problems, finite differences, fixture paths.

#![allow(dead_code, reason = "each test program uses a part of this module")]

use std::path::PathBuf;

use gd_kernels::reference::Problem;
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

/// The generator of a test, by seed.
pub(crate) fn rng(seed: u64) -> ChaCha8Rng {
    ChaCha8Rng::seed_from_u64(seed)
}

/// `n` numbers from -1 to 1.
pub(crate) fn uniform(rng: &mut ChaCha8Rng, n: usize) -> Vec<f64> {
    (0..n).map(|_| rng.random_range(-1.0..1.0)).collect()
}

/// A problem with random q, k, v, beta and prior: two batch entries, four query heads on two
/// key-value heads, three queries, `keys` keys.
pub(crate) fn problem(rng: &mut ChaCha8Rng, keys: usize) -> Problem {
    let (batch, q_heads, kv_heads, queries, dim, value_dim) = (2, 4, 2, 3, 4, 3);
    Problem {
        batch,
        q_heads,
        kv_heads,
        queries,
        keys,
        dim,
        value_dim,
        q: uniform(rng, batch * q_heads * queries * dim),
        k: uniform(rng, batch * kv_heads * keys * dim),
        v: uniform(rng, batch * kv_heads * keys * value_dim),
        beta: (0..q_heads).map(|_| rng.random_range(0.4..1.2)).collect(),
        prior: Some(uniform(rng, batch * q_heads * keys).iter().map(|x| 0.3 * x).collect()),
        ..Problem::default()
    }
}

/// The central difference quotients of `f` around `x`, one a coordinate.
pub(crate) fn finite_difference(x: &[f64], f: impl Fn(&[f64]) -> f64) -> Vec<f64> {
    let eps = 1e-6;
    let mut at = x.to_vec();
    let mut side = |j: usize, step: f64| {
        at[j] = x[j] + step;
        let y = f(&at);
        at[j] = x[j];
        y
    };
    (0..x.len()).map(|j| (side(j, eps) - side(j, -eps)) / (2.0 * eps)).collect()
}

/// Fails unless the two agree within atol 1e-5, rtol 1e-3 everywhere (a NaN never does).
#[track_caller]
pub(crate) fn assert_gradient(name: &str, actual: &[f64], expected: &[f64]) {
    assert_eq!(actual.len(), expected.len(), "{name}: lengths");
    for (j, (x, y)) in actual.iter().zip(expected).enumerate() {
        let error = (x - y).abs();
        assert!(error <= 1e-5 + 1e-3 * y.abs(), "{name}[{j}]: {x} but finite differences give {y}");
    }
}

/// Fails unless the two agree to `bound` everywhere (a NaN never does).
#[track_caller]
pub(crate) fn assert_close(name: &str, actual: &[f64], expected: &[f64], bound: f64) {
    assert_eq!(actual.len(), expected.len(), "{name}: lengths");
    for (j, (x, y)) in actual.iter().zip(expected).enumerate() {
        assert!((x - y).abs() <= bound, "{name}[{j}]: {x} but {y} was expected");
    }
}

/// A file in the repository's test fixtures.
pub(crate) fn fixture(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../tests/fixtures").join(name)
}
