//! The effect of the barrier on the candidates of a minority class: metrics of labelled rows of scores before and
//! after the barrier.
//!
//! A row has C scores: one for each of C - 1 classes, and one for a candidate that votes for all classes equally.
//! The baseline averages the class distributions of the candidates with the softmax of the scores as weights and
//! predicts the class of highest weight. The proposed method predicts the class of the candidate that is selected
//! after the barrier. Names and definitions of the metrics are those of the public demo
//! GhostDriftTheory/semantic-selection-demo.

use std::collections::BTreeMap;

use gd_kernels::Barrier;
use gd_kernels::reference::{Lift, barrier, logsumexp};

use crate::error::{Error, Result};

/// Rows of scores with their labels.
#[derive(Debug, Clone)]
pub struct Scores {
    /// The scores `[R, C]` in row-major order.
    pub raw: Vec<f64>,
    /// The number C of candidates per row.
    pub candidates: usize,
    /// The class of every row `[R]`, less than C - 1.
    pub labels: Vec<i64>,
}

/// The barrier, the protected candidate, and when a candidate counts as surviving.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Protection {
    /// The parameters of the barrier.
    pub barrier: Barrier,
    /// The minimal softmax weight of a candidate that counts as surviving.
    pub detect_floor: f64,
    /// The index of the protected candidate, which is also the minority class.
    pub minority: usize,
}

/// The result of [`report`].
#[derive(Debug, Clone)]
pub struct Report {
    /// The metrics by name; `None` for a mean over no rows.
    pub metrics: BTreeMap<String, Option<f64>>,
    /// The result of the barrier for every row.
    pub lifts: Vec<Lift>,
    /// Gamma of every row before and after the barrier: the score of the protected candidate minus the highest other
    /// score.
    pub gamma: [Vec<f64>; 2],
    /// The indices of the rows whose label is the minority class.
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

/// The index of the highest score; the first one if several are equal.
fn argmax(scores: &[f64]) -> usize {
    (1..scores.len()).fold(0, |highest, j| if scores[j] > scores[highest] { j } else { highest })
}

fn mean(values: impl Iterator<Item = f64>) -> Option<f64> {
    let (sum, count) = values.fold((0.0, 0usize), |(sum, count), x| (sum + x, count + 1));
    (count > 0).then(|| sum / count as f64)
}

/// The fraction of the flags that are set.
fn rate(flags: impl Iterator<Item = bool>) -> Option<f64> {
    mean(flags.map(|flag| f64::from(u8::from(flag))))
}

/// Applies the barrier to every row and computes the metrics before and after it.
///
/// # Errors
/// [`Error::Invalid`] names the score, label or parameter that is out of range.
pub fn report(scores: &Scores, protection: &Protection) -> Result<Report> {
    scores.validate(protection)?;
    let (rows, classes, m) = (scores.rows(), scores.candidates - 1, protection.minority);
    let label = |row: usize| scores.labels[row] as usize;
    let flags: Vec<bool> = (0..scores.candidates).map(|j| j == m).collect();
    let lifts: Vec<Lift> =
        (0..rows).map(|row| barrier(scores.row(row), &flags, &protection.barrier)).collect();
    let minority: Vec<usize> = (0..rows).filter(|&row| label(row) == m).collect();
    // The last candidate adds the same weight to all classes, so it does not change the class of highest weight. If it is
    // selected, it counts as class 0.
    let blended = |row: usize| argmax(&scores.row(row)[..classes]);
    let selected = |lift: &Lift| if lift.selected < classes { lift.selected } else { 0 };
    let predicted: [Vec<usize>; 2] = [(0..rows).map(blended).collect(), lifts.iter().map(selected).collect()];
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
    let correct = |side: usize, row: usize| predicted[side][row] == label(row);
    pair("acc", &|side| rate((0..rows).map(|row| correct(side, row))));
    pair("bal_acc", &|side| {
        let of = |class| rate((0..rows).filter(|&row| label(row) == class).map(|row| correct(side, row)));
        mean((0..classes).filter_map(of))
    });
    pair("minority_survival", &|side| {
        let weight = |row: &[f64]| (row[m] - logsumexp(row.iter().copied())).exp();
        rate(minority.iter().map(|&row| weight(row_of(side, row)) >= protection.detect_floor))
    });
    pair("minority_top2", &|side| {
        let above = |row: &[f64]| row.iter().filter(|x| **x > row[m]).count();
        rate(minority.iter().map(|&row| above(row_of(side, row)) < 2))
    });
    pair("minority_acc", &|side| rate(minority.iter().map(|&row| correct(side, row))));
    pair("collapse", &|side| rate(minority.iter().map(|&row| !correct(side, row))));

    let gain = |row: usize| gamma[1][row] - gamma[0][row];
    for (name, value) in [
        ("rescue_rate", rate(minority.iter().map(|&row| !correct(0, row) && correct(1, row)))),
        ("false_rescue_rate", rate(minority.iter().map(|&row| correct(0, row) && !correct(1, row)))),
        ("barrier_activation_rate", rate(lifts.iter().map(|l| l.activated))),
        ("barrier_activation_on_minority", rate(minority.iter().map(|&row| lifts[row].activated))),
        ("gamma_before_mean", mean(gamma[0].iter().copied())),
        ("gamma_after_mean", mean(gamma[1].iter().copied())),
        ("gamma_delta_mean", mean((0..rows).map(gain))),
        ("gamma_delta_minority", mean(minority.iter().map(|&row| gain(row)))),
    ] {
        metrics.insert(name.into(), value);
    }
    Ok(Report { metrics, lifts, gamma, minority })
}
