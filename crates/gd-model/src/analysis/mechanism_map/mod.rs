//! The map of attention mechanisms by two measured axes.
//!
//! **X, selectivity**: `1 - H / ln n` with the entropy H of the weights over n keys; 0 for a plain average, 1 for a single
//! key. With it C, the concentration on high scores: a window that ignores the content has a high X and a low C.
//!
//! **Y, consistency control**: how well a mechanism knows, in a recall task, which of its answers not to trust. It is the
//! mean of G (detection of queries that belong to no key), J (abstention on them rather than on others) and R (order
//! of all answers by confidence).
//!
//! [`ENTRIES`] lists what can be measured, [`measure`] measures it.

mod consistency;
mod entries;
mod recall;
mod responses;
mod selection;
mod selectivity;
mod weights;

use serde::Serialize;

pub use consistency::{Consistency, Graded, consistency};
pub use entries::{ENTRIES, Entry};
pub use selectivity::{Cells, Selectivity, selectivity_of_row};

use self::recall::Recall;
use crate::error::{Error, Result};

/// What to measure.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Settings {
    /// Names of [`ENTRIES`].
    pub mechanisms: Vec<String>,
    /// Key banks of the recall task, at least 1.
    pub seeds: usize,
    /// Seed of all random numbers.
    pub seed: u64,
}

/// A mean with the limits of its 95 % interval. It is serialized as `[mean, low, high]`.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
#[serde(into = "[f64; 3]")]
pub struct Interval {
    /// The mean.
    pub mean: f64,
    /// The lower limit.
    pub low: f64,
    /// The upper limit.
    pub high: f64,
}

impl From<Interval> for [f64; 3] {
    fn from(interval: Interval) -> Self {
        [interval.mean, interval.low, interval.high]
    }
}

impl Interval {
    /// The mean of a measurement, and the 2.5 % and 97.5 % quantiles of its resamples.
    fn new(mean: f64, mut resamples: Vec<f64>) -> Self {
        resamples.sort_by(f64::total_cmp);
        Self { mean, low: quantile(&resamples, 0.025), high: quantile(&resamples, 0.975) }
    }
}

/// The quantile of sorted values at `share` in [0, 1], interpolated linearly between neighbours.
fn quantile(sorted: &[f64], share: f64) -> f64 {
    let at = share * (sorted.len() - 1) as f64;
    let below = at.floor() as usize;
    let above = (below + 1).min(sorted.len() - 1);
    sorted[below] + (at - below as f64) * (sorted[above] - sorted[below])
}

/// The measurements of one mechanism.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Measurement {
    /// Its name in [`ENTRIES`].
    pub name: &'static str,
    /// Selectivity and concentration.
    pub selectivity: Selectivity,
    /// Consistency control with the confidence of the mechanism; none where the recall task does not apply.
    pub consistency: Option<Graded>,
    /// The same with the decision to answer (1) or to abstain (0) as confidence, for mechanisms that abstain by a rule.
    pub gate: Option<Graded>,
}

/// The entries of these names, in the order of [`ENTRIES`].
///
/// # Errors
/// Names an entry that does not exist.
pub fn entries_named(names: &[String]) -> Result<Vec<&'static Entry>> {
    if let Some(unknown) = names.iter().find(|name| ENTRIES.iter().all(|entry| entry.name != **name)) {
        let all: Vec<&str> = ENTRIES.iter().map(|entry| entry.name).collect();
        return Err(Error::Invalid(format!("no mechanism `{unknown}`; there are {}", all.join(", "))));
    }
    Ok(ENTRIES.iter().filter(|entry| names.iter().any(|name| name == entry.name)).collect())
}

/// Measures mechanisms, and calls `done` with each measurement. The same settings give the same numbers, whatever the
/// number of threads.
///
/// # Errors
/// A name that does not exist, or no seed.
pub fn measure(settings: &Settings, mut done: impl FnMut(&Measurement)) -> Result<Vec<Measurement>> {
    let entries = entries_named(&settings.mechanisms)?;
    if settings.seeds == 0 {
        return Err(Error::out_of_range("seeds", 0, "at least 1"));
    }
    let tasks: Vec<Recall> =
        (0..settings.seeds).map(|seed| Recall::new(settings.seed, seed as u64)).collect::<Result<_>>()?;
    let mut measurements = Vec::new();
    for entry in entries {
        let (consistency, gate) = consistency::measure(entry, &tasks, settings.seed)?;
        let selectivity = selectivity::measure(entry, settings.seed)?;
        let measurement = Measurement { name: entry.name, selectivity, consistency, gate };
        done(&measurement);
        measurements.push(measurement);
    }
    Ok(measurements)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantiles_are_interpolated() {
        let values: Vec<f64> = (0..5).map(f64::from).collect();
        let cases = [(0.0, 0.0), (0.5, 2.0), (0.1, 0.4), (1.0, 4.0)];
        for (share, expected) in cases {
            assert!((quantile(&values, share) - expected).abs() < 1e-12, "{share}");
        }
        assert_eq!(quantile(&[7.0], 0.9), 7.0);
    }
}
