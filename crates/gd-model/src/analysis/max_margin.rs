//! The direction of greatest margin that separates chosen tokens from the others: the direction towards which gradient
//! descent turns an attention query (Tarzanagh et al. 2023, arXiv 2306.13596).
//!
//! `p* = argmin ½‖p‖²` such that `(k_chosen − k_t)·p ≥ 1` for every other token t of every sequence. With the rows
//! `a = k_chosen − k_t`, let x be the point of least norm in their convex hull: then `p* = x / ‖x‖²` and the margin `1/‖p*‖` is
//! ‖x‖. If x is 0 there is no such direction. x is found by Wolfe's algorithm (1976, Mathematical Programming 11).

use gd_kernels::reference::dot;

use crate::error::{Error, Result};

/// A point counts as 0 if its norm is at most this fraction of that of the longest row.
const ZERO: f64 = 1e-9;
/// Weights, and gains of the squared norm relative to the norm, below this are rounding errors.
const ROUNDING: f64 = 1e-13;
/// Steps that correct p*.
const REFINEMENTS: usize = 2;
/// A constraint counts as active if it exceeds 1 by no more than this.
const ACTIVE: f64 = 1e-8;

/// Sequences of keys, each with a chosen token.
#[derive(Debug, Clone, PartialEq)]
pub struct Choices {
    /// The keys of every sequence, `[S][T][D]`. Sequences may differ in length.
    pub keys: Vec<Vec<Vec<f64>>>,
    /// The position of the chosen token of every sequence.
    pub chosen: Vec<usize>,
}

/// The direction of greatest margin.
#[derive(Debug, Clone, PartialEq)]
pub struct MaxMargin {
    /// p* `[D]`.
    pub direction: Vec<f64>,
    /// The margin, `1/‖p*‖`.
    pub margin: f64,
    /// For every token whether its constraint holds with equality, `[S][T]`; false for the chosen ones.
    pub active: Vec<Vec<bool>>,
}

impl MaxMargin {
    /// The cosine of the angle between p* and a vector `[D]`.
    pub fn cosine(&self, p: &[f64]) -> f64 {
        dot(&self.direction, p) * self.margin / dot(p, p).sqrt()
    }
}

/// The direction of greatest margin; none if no direction separates the chosen tokens, as when one lies in the convex
/// hull of the others.
///
/// # Errors
/// [`Error::Invalid`] for keys of different length, numbers that are not finite, a chosen position that does not exist, or
/// no sequence of at least two tokens.
pub fn max_margin(choices: &Choices) -> Result<Option<MaxMargin>> {
    let rows = choices.rows()?;
    let Some(direction) = shortest_direction(&rows) else { return Ok(None) };
    let is_active = |(s, keys): (usize, &Vec<Vec<f64>>)| {
        let chosen = &keys[choices.chosen[s]];
        let active = |t: usize| {
            t != choices.chosen[s] && dot(&difference(chosen, &keys[t]), &direction) <= 1.0 + ACTIVE
        };
        (0..keys.len()).map(active).collect()
    };
    let active = choices.keys.iter().enumerate().map(is_active).collect();
    let margin = 1.0 / dot(&direction, &direction).sqrt();
    Ok(Some(MaxMargin { direction, margin, active }))
}

impl Choices {
    /// The differences of the chosen keys and the other keys of their sequence.
    fn rows(&self) -> Result<Vec<Vec<f64>>> {
        let invalid = |text: String| Err(Error::Invalid(text));
        if self.keys.len() != self.chosen.len() {
            return invalid(format!(
                "{} sequences with {} chosen tokens",
                self.keys.len(),
                self.chosen.len()
            ));
        }
        let width = self.keys.iter().flatten().map(Vec::len).next().unwrap_or(0);
        let mut rows = Vec::new();
        for (s, (keys, &chosen)) in self.keys.iter().zip(&self.chosen).enumerate() {
            let Some(own) = keys.get(chosen) else {
                return invalid(format!(
                    "sequence {s} has {} tokens, and token {chosen} is chosen",
                    keys.len()
                ));
            };
            for (t, key) in keys.iter().enumerate() {
                if key.len() != width || key.iter().any(|x| !x.is_finite()) {
                    return invalid(format!("key {t} of sequence {s} has not {width} finite coordinates"));
                }
                if t != chosen {
                    rows.push(difference(own, key));
                }
            }
        }
        match rows.is_empty() {
            true => invalid("no sequence has two tokens: there is nothing to separate".into()),
            false => Ok(rows),
        }
    }
}

/// p* for these rows; none if the point x of least norm in their convex hull is 0.
///
/// x is kept as a convex combination of affinely independent rows. Each step adds the row that lies furthest in the
/// direction of the origin, and removes rows until the point of least norm of their affine hull is inside their
/// convex hull.
fn shortest_direction(rows: &[Vec<f64>]) -> Option<Vec<f64>> {
    // Lengths of at most 1 make the tolerances relative.
    let scale = rows.iter().map(|a| dot(a, a)).fold(0.0, f64::max).sqrt();
    let rows: Vec<Vec<f64>> = rows.iter().map(|a| a.iter().map(|x| x / scale).collect()).collect();
    let closest = |x: &[f64]| (0..rows.len()).min_by(|&a, &b| dot(&rows[a], x).total_cmp(&dot(&rows[b], x)));
    let (mut corners, mut weights) = (vec![0], vec![1.0]);
    let mut least = f64::INFINITY;
    loop {
        let x = combination(&rows, &corners, &weights);
        let squared = dot(&x, &x);
        // Also for rows of zeros, whose scale is 0.
        if squared.is_nan() || squared <= ZERO * ZERO {
            return None;
        }
        let next = closest(&x)?;
        let is_closer =
            dot(&rows[next], &x) < squared - ROUNDING * squared.sqrt() && !corners.contains(&next);
        // Every step makes x shorter, until rounding prevents it.
        if !is_closer || squared >= least || !add_corner(&rows, next, &mut corners, &mut weights) {
            return Some(equalised(&rows, &corners, &x).iter().map(|p| p / scale).collect());
        }
        least = squared;
    }
}

/// `x / ‖x‖²` with products of 1 with the corners. The rounding errors of x are divided by ‖x‖², which is small where the
/// margin is, so that what a product lacks to 1 is added by the combination of corners of least norm that has it.
fn equalised(rows: &[Vec<f64>], corners: &[usize], x: &[f64]) -> Vec<f64> {
    let squared = dot(x, x);
    let mut p: Vec<f64> = x.iter().map(|x| x / squared).collect();
    for _ in 0..REFINEMENTS {
        let equation = |a: &usize| -> Vec<f64> {
            let products = corners.iter().map(|&b| dot(&rows[*a], &rows[b]));
            products.chain([1.0 - dot(&rows[*a], &p)]).collect()
        };
        let Some(weights) = solution(corners.iter().map(equation).collect()) else { break };
        p.iter_mut().zip(combination(rows, corners, &weights)).for_each(|(p, change)| *p += change);
    }
    p
}

/// Adds a corner, and removes corners until the weights of the point of least norm of their affine hull are positive. Returns
/// false if rounding errors prevent it.
fn add_corner(rows: &[Vec<f64>], next: usize, corners: &mut Vec<usize>, weights: &mut Vec<f64>) -> bool {
    corners.push(next);
    weights.push(0.0);
    while let Some(affine) = affine_weights(rows, corners) {
        if affine.iter().all(|w| *w > ROUNDING) {
            *weights = affine;
            return corners.contains(&next);
        }
        // As far towards the affine solution as all weights stay positive.
        let limits = weights.iter().zip(&affine).filter(|(_, a)| **a <= ROUNDING);
        let step = limits.map(|(w, a)| w / (w - a).max(f64::MIN_POSITIVE)).fold(1.0, f64::min);
        weights.iter_mut().zip(&affine).for_each(|(w, a)| *w += step * (a - *w));
        let least = weights.iter().copied().fold(f64::MAX, f64::min).max(ROUNDING);
        let stays: Vec<bool> = weights.iter().map(|w| *w > least).collect();
        retain(corners, &stays);
        retain(weights, &stays);
    }
    false
}

fn retain<T>(list: &mut Vec<T>, stays: &[bool]) {
    let mut flags = stays.iter();
    list.retain(|_| flags.next() == Some(&true));
}

fn combination(rows: &[Vec<f64>], corners: &[usize], weights: &[f64]) -> Vec<f64> {
    let mut x = vec![0.0; rows[0].len()];
    for (&corner, w) in corners.iter().zip(weights) {
        x.iter_mut().zip(&rows[corner]).for_each(|(x, a)| *x += w * a);
    }
    x
}

/// The weights, with the sum 1, of the point of least norm in the affine hull of the corners: the solution of
/// `(1 1ᵀ + A Aᵀ) u = 1` divided by its sum. None if there are no corners or they are not affinely independent.
fn affine_weights(rows: &[Vec<f64>], corners: &[usize]) -> Option<Vec<f64>> {
    let n = corners.len();
    let equation = |a: &usize| -> Vec<f64> {
        corners.iter().map(|&b| 1.0 + dot(&rows[*a], &rows[b])).chain([1.0]).collect()
    };
    let solution = solution(corners.iter().map(equation).collect())?;
    let sum: f64 = solution.iter().sum();
    (n > 0).then(|| solution.iter().map(|u| u / sum).collect())
}

/// The solution of linear equations with a positive definite matrix, each given as its coefficients and its right side. None
/// if rounding makes the matrix singular.
fn solution(mut system: Vec<Vec<f64>>) -> Option<Vec<f64>> {
    let n = system.len();
    // Elimination with pivots on the diagonal is stable for a positive definite matrix.
    for i in 0..n {
        let pivot = system[i].clone();
        if pivot[i] <= 0.0 {
            return None;
        }
        for j in (0..n).filter(|&j| j != i) {
            let factor = system[j][i] / pivot[i];
            system[j].iter_mut().zip(&pivot).for_each(|(x, p)| *x -= factor * p);
        }
    }
    Some((0..n).map(|i| system[i][n] / system[i][i]).collect())
}

fn difference(a: &[f64], b: &[f64]) -> Vec<f64> {
    a.iter().zip(b).map(|(a, b)| a - b).collect()
}
