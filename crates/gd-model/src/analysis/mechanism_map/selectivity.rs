//! X and C: the entropy of the weights of random rows, and where the weights lie.

use candle_core::{Device, Tensor};
use rand::{Rng, RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use rayon::prelude::*;
use serde::Serialize;

use super::Interval;
use super::entries::{Entry, Kind};
use super::recall::{DIMENSIONS, normal, unit_rows};
use super::weights::{FromScores, Weights, rows};
use crate::error::{Error, Result};

/// Standard deviations of the scores.
const SIGMAS: [f64; 4] = [0.5, 1.0, 2.0, 4.0];
/// Numbers of keys.
const KEYS: [usize; 4] = [16, 64, 256, 1024];
/// Rows of a cell.
const ROWS: usize = 400;
/// Resamples of the rows for an interval.
const RESAMPLES: usize = 2000;

/// The means of the cells: standard deviations of the scores down, numbers of keys across.
pub type Cells = [[f64; KEYS.len()]; SIGMAS.len()];

/// Selectivity and concentration: means over the rows of a cell, then over the cells.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(rename_all = "UPPERCASE")]
pub struct Selectivity {
    /// `1 - H / ln n`.
    pub x: Interval,
    /// The cells of X.
    #[serde(rename = "X_cells")]
    pub x_cells: Cells,
    /// `(sum w z - mean z) / (max z - mean z)`.
    pub c: Interval,
    /// The cells of C.
    #[serde(rename = "C_cells")]
    pub c_cells: Cells,
}

/// X and C of one row.
type Row = [f64; 2];

/// The selectivity and the concentration of a mechanism that turns scores into weights, on one row of scores; `second` is
/// the second row of mechanisms that need one.
///
/// # Errors
/// An entry whose weights depend on keys, or rows of different lengths.
pub fn selectivity_of_row(entry: &Entry, scores: &[f64], second: &[f64]) -> Result<[f64; 2]> {
    let from = match entry.kind {
        Kind::Scores(from) | Kind::ScoresOnly(from) => from,
        _ => return Err(Error::Invalid(format!("{}: its weights do not follow from scores", entry.name))),
    };
    let row = |values: &[f64]| Tensor::from_slice(values, (1, values.len()), &Device::Cpu);
    let (scores, second) = (row(scores)?, row(second)?);
    let row = measured(&from.weights(&scores, &second)?, &scores)?;
    row.first().copied().ok_or_else(|| Error::Invalid("the row is not answered".into()))
}

/// X and C of the answered rows.
fn measured(weights: &Weights, scores: &Tensor) -> Result<Vec<Row>> {
    let null = weights.null.as_ref().map(Tensor::to_vec1::<f64>).transpose()?;
    let mut measured = Vec::new();
    for (i, (w, z)) in rows(&weights.weights)?.iter().zip(&rows(scores)?).enumerate() {
        let greatest = w.iter().copied().fold(0.0, f64::max);
        let abstains = greatest == 0.0 || null.as_ref().is_some_and(|null| null[i] > greatest);
        if !abstains {
            measured.push(selectivity(w, z));
        }
    }
    Ok(measured)
}

fn selectivity(weights: &[f64], scores: &[f64]) -> Row {
    let (sum, n) = (weights.iter().sum::<f64>(), weights.len() as f64);
    let shares = weights.iter().map(|w| w / sum);
    let entropy: f64 = shares.clone().filter(|p| *p > 0.0).map(|p| -p * p.ln()).sum();
    let mean = scores.iter().sum::<f64>() / n;
    let greatest = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let weighted: f64 = shares.zip(scores).map(|(p, z)| p * z).sum();
    [1.0 - entropy / n.ln(), (weighted - mean) / (greatest - mean)]
}

/// Measures an entry.
pub(super) fn measure(entry: &Entry, seed: u64) -> Result<Selectivity> {
    let mut cells: Vec<Vec<Row>> = Vec::new();
    for (s, sigma) in SIGMAS.into_iter().enumerate() {
        for (k, keys) in KEYS.into_iter().enumerate() {
            let mut rng = ChaCha8Rng::seed_from_u64(seed);
            rng.set_stream(1 + (s * KEYS.len() + k) as u64);
            cells.push(cell(entry, sigma, keys, &mut rng)?);
        }
    }
    if let Some(empty) = cells.iter().position(Vec::is_empty) {
        return Err(Error::Invalid(format!("{}: no row of cell {empty} is answered", entry.name)));
    }
    let mean =
        |cell: &[Row], which: usize| cell.iter().map(|row| row[which]).sum::<f64>() / cell.len() as f64;
    let interval = |which: usize| {
        let all = cells.iter().map(|cell| mean(cell, which)).sum::<f64>() / cells.len() as f64;
        Interval::new(all, resamples(&cells, which, seed))
    };
    let means = |which: usize| {
        std::array::from_fn(|s| std::array::from_fn(|k| mean(&cells[s * KEYS.len() + k], which)))
    };
    Ok(Selectivity { x: interval(0), x_cells: means(0), c: interval(1), c_cells: means(1) })
}

/// The rows of a cell.
fn cell(entry: &Entry, sigma: f64, keys: usize, rng: &mut ChaCha8Rng) -> Result<Vec<Row>> {
    let from_scores = |from: FromScores, rng: &mut ChaCha8Rng| {
        let scores = (normal(rng, ROWS, keys)? * sigma)?;
        let second = (normal(rng, ROWS, keys)? * sigma)?;
        measured(&from.weights(&scores, &second)?, &scores)
    };
    // Products of unit keys with queries of length sigma sqrt(D) have the standard deviation sigma.
    let beta = sigma * (DIMENSIONS as f64).sqrt();
    match entry.kind {
        Kind::Scores(from) | Kind::ScoresOnly(from) => from_scores(from, rng),
        Kind::Reject(_) => from_scores(super::responses::HARD, rng),
        Kind::Keys(from) => from_keys(rng, keys, beta, |q, k| from.weights(q, k, beta)),
        Kind::Selection(selection) => from_keys(rng, keys, beta, |q, k| selection.weights(q, k, beta)),
    }
}

/// The rows of a mechanism that reads unit queries and keys; scores are their products times beta.
fn from_keys(
    rng: &mut impl Rng,
    keys: usize,
    beta: f64,
    weights: impl Fn(&Tensor, &Tensor) -> Result<Tensor>,
) -> Result<Vec<Row>> {
    let (q, k) = (unit_rows(&normal(rng, ROWS, DIMENSIONS)?)?, unit_rows(&normal(rng, keys, DIMENSIONS)?)?);
    let weights = Weights { weights: weights(&q, &k)?, null: None };
    measured(&weights, &(q.matmul(&k.t()?)? * beta)?)
}

/// The mean over cells of resampled rows, for every resample.
fn resamples(cells: &[Vec<Row>], which: usize, seed: u64) -> Vec<f64> {
    let resample = |number: usize| {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        rng.set_stream(1000 + number as u64);
        let mean = |cell: &Vec<Row>| {
            let drawn = (0..cell.len()).map(|_| cell[rng.random_range(0..cell.len())][which]);
            drawn.sum::<f64>() / cell.len() as f64
        };
        cells.iter().map(mean).sum::<f64>() / cells.len() as f64
    };
    (0..RESAMPLES).into_par_iter().map(resample).collect()
}
