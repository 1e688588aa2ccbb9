//! What conditional protection does to the candidates of a minority: rows of scores before and after the barrier,
//! judged by labels.
//!
//! A row has C scores: one for each of C - 1 classes, and one for a candidate that stands for all of them alike.
//! The baseline blends the candidates' class rows by the softmax of the scores and takes the greatest class; the
//! proposal takes the class of the candidate that is selected after the barrier. Names and definitions are those
//! of the public demo GhostDriftTheory/semantic-selection-demo.

use std::collections::BTreeMap;

use gd_kernels::Barrier;
use gd_kernels::reference::{Lift, barrier, logsumexp};

use crate::error::{Error, Result};

/// Scores and labels.
#[derive(Debug, Clone)]
pub struct Scores {
    /// `[R, C]`, row by row.
    pub raw: Vec<f64>,
    /// C.
    pub candidates: usize,
    /// The class of every row, below C - 1.
    pub labels: Vec<i64>,
}

/// How the minority is protected and found.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Protection {
    /// The rule.
    pub barrier: Barrier,
    /// Least softmax weight of a candidate that has survived.
    pub detect_floor: f64,
    /// The protected candidate, and the class of the minority.
    pub minority: usize,
}

/// The outcome.
#[derive(Debug, Clone)]
pub struct Report {
    /// By name; none where there is no row to take a mean of.
    pub metrics: BTreeMap<String, Option<f64>>,
    /// What the barrier made of every row.
    pub lifts: Vec<Lift>,
    /// Gamma of every row: the protected candidate's score less the greatest other, before and after the barrier.
    pub gamma: [Vec<f64>; 2],
    /// The rows whose label is the minority's class.
    pub minority: Vec<usize>,
}

impl Scores {
    fn rows(&self) -> usize {
        self.labels.len()
    }

    fn row(&self, row: usize) -> &[f64] {
        &self.raw[row * self.candidates..][..self.candidates]
    }

    fn validate(&self, protection: &Protection) -> Result<()> {
        let fail = |text: String| Err(Error::Invalid(text));
        let (c, rows) = (self.candidates, self.rows());
        if c < 3 || rows == 0 || self.raw.len() != rows * c {
            return fail(format!(
                "{} scores for {rows} rows of {c} candidates; at least one row of two classes and a third candidate \
                 expected",
                self.raw.len()
            ));
        }
        if let Some(at) = self.raw.iter().position(|x| !x.is_finite()) {
            return fail(format!("the score {} of row {}, candidate {}", self.raw[at], at / c, at % c));
        }
        if let Some(row) = self.labels.iter().position(|&l| l < 0 || l as usize >= c - 1) {
            return fail(format!("label {} of row {row}; there are {} classes", self.labels[row], c - 1));
        }
        let Protection { barrier: Barrier { floor, strength, .. }, detect_floor, minority } = *protection;
        if minority >= c - 1 {
            return fail(format!("minority_index {minority}; there are {} classes", c - 1));
        }
        if !(floor > 0.0 && floor < 1.0 && strength >= 0.0 && (0.0..=1.0).contains(&detect_floor)) {
            return fail(format!(
                "barrier floor {floor}, strength {strength} or detect floor {detect_floor} is out of range"
            ));
        }
        Ok(())
    }
}

/// The first of the greatest.
fn greatest(scores: &[f64]) -> usize {
    (1..scores.len()).fold(0, |best, j| if scores[j] > scores[best] { j } else { best })
}

fn mean(values: impl Iterator<Item = f64>) -> Option<f64> {
    let (sum, count) = values.fold((0.0, 0usize), |(sum, count), x| (sum + x, count + 1));
    (count > 0).then(|| sum / count as f64)
}

fn share(flags: impl Iterator<Item = bool>) -> Option<f64> {
    mean(flags.map(|flag| f64::from(u8::from(flag))))
}

/// Applies the barrier to every row, and judges it.
///
/// # Errors
/// Names the score, label or parameter that does not fit.
pub fn report(scores: &Scores, protection: &Protection) -> Result<Report> {
    scores.validate(protection)?;
    let (rows, classes, m) = (scores.rows(), scores.candidates - 1, protection.minority);
    let label = |row: usize| scores.labels[row] as usize;
    let flags: Vec<bool> = (0..scores.candidates).map(|j| j == m).collect();
    let lifts: Vec<Lift> =
        (0..rows).map(|row| barrier(scores.row(row), &flags, &protection.barrier)).collect();
    let minority: Vec<usize> = (0..rows).filter(|&row| label(row) == m).collect();
    // In the blend the last candidate weighs on all classes alike; alone it is read as the first of them.
    let blended = |row: usize| greatest(&scores.row(row)[..classes]);
    let chosen = |lift: &Lift| if lift.selected < classes { lift.selected } else { 0 };
    let predicted: [Vec<usize>; 2] = [(0..rows).map(blended).collect(), lifts.iter().map(chosen).collect()];
    let row_of = |side: usize, row: usize| if side == 0 { scores.row(row) } else { &lifts[row].scores[..] };
    let gamma = [0, 1].map(|side| {
        let of = |row: usize| {
            let scores = row_of(side, row);
            let others = (0..scores.len()).filter(|&j| j != m).map(|j| scores[j]);
            scores[m] - others.fold(f64::NEG_INFINITY, f64::max)
        };
        (0..rows).map(of).collect::<Vec<f64>>()
    });

    let mut metrics = BTreeMap::new();
    let mut pair = |name: &str, of: &dyn Fn(usize) -> Option<f64>| {
        let (before, after) = (of(0), of(1));
        metrics.insert(format!("baseline_{name}"), before);
        metrics.insert(format!("proposed_{name}"), after);
        metrics.insert(format!("delta_{name}"), before.zip(after).map(|(before, after)| after - before));
    };
    let right = |side: usize, row: usize| predicted[side][row] == label(row);
    pair("acc", &|side| share((0..rows).map(|row| right(side, row))));
    pair("bal_acc", &|side| {
        let of = |class| share((0..rows).filter(|&row| label(row) == class).map(|row| right(side, row)));
        mean((0..classes).filter_map(of))
    });
    pair("minority_survival", &|side| {
        let weight = |row: &[f64]| (row[m] - logsumexp(row.iter().copied())).exp();
        share(minority.iter().map(|&row| weight(row_of(side, row)) >= protection.detect_floor))
    });
    pair("minority_top2", &|side| {
        let above = |row: &[f64]| row.iter().filter(|x| **x > row[m]).count();
        share(minority.iter().map(|&row| above(row_of(side, row)) < 2))
    });
    pair("minority_acc", &|side| share(minority.iter().map(|&row| right(side, row))));
    pair("collapse", &|side| share(minority.iter().map(|&row| !right(side, row))));

    let gain = |row: usize| gamma[1][row] - gamma[0][row];
    for (name, value) in [
        ("rescue_rate", share(minority.iter().map(|&row| !right(0, row) && right(1, row)))),
        ("false_rescue_rate", share(minority.iter().map(|&row| right(0, row) && !right(1, row)))),
        ("barrier_activation_rate", share(lifts.iter().map(|l| l.activated))),
        ("barrier_activation_on_minority", share(minority.iter().map(|&row| lifts[row].activated))),
        ("gamma_before_mean", mean(gamma[0].iter().copied())),
        ("gamma_after_mean", mean(gamma[1].iter().copied())),
        ("gamma_delta_mean", mean((0..rows).map(gain))),
        ("gamma_delta_minority", mean(minority.iter().map(|&row| gain(row)))),
    ] {
        metrics.insert(name.into(), value);
    }
    Ok(Report { metrics, lifts, gamma, minority })
}
