//! Settings of uptraining, in which a model with a new attention mechanism learns from the model that it was.

use std::path::PathBuf;

use gd_kernels::{CANDIDATES, Estimator};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::checks::{Checks, first};
use super::{Curve, SelectSchedule};
use crate::error::{Error, Result};

/// How a model learns from a teacher: the block `train.uptrain` of a recipe.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct UptrainConfig {
    /// The path of the teacher: a checkpoint folder, a safetensors file in one, or a GGUF file.
    #[serde(rename = "original")]
    pub teacher: PathBuf,
    /// The fraction of all steps, at the start of the run, in which the changed layers are aligned with those of the
    /// teacher, each layer alone. In [0, 1).
    #[serde(default = "align")]
    pub align: f64,
    /// The weight of the Kullback-Leibler divergence from the teacher's logits; the cross entropy has the weight 1.
    /// At least 0.
    #[serde(default = "kl")]
    pub kl: f64,
}

fn align() -> f64 {
    0.05
}
fn kl() -> f64 {
    1.0
}

impl UptrainConfig {
    /// Checks the range of every value.
    ///
    /// # Errors
    /// [`Error::OutOfRange`] for the first value outside its range.
    pub fn validate(&self) -> Result<()> {
        first(self.problems())
    }

    /// All values outside their range.
    pub(super) fn problems(&self) -> Vec<Error> {
        let Self { align, kl, .. } = *self;
        let mut checks = Checks::default();
        checks.require((0.0..1.0).contains(&align), "train.uptrain.align", align, "in [0, 1)");
        checks.require(kl >= 0.0 && kl.is_finite(), "train.uptrain.kl", kl, "at least 0");
        checks.into_problems()
    }

    /// Whether `step`, counted from 0, of a run of `steps` steps aligns layers.
    pub fn aligns(&self, step: u64, steps: u64) -> bool {
        (step as f64) < self.align * steps as f64
    }
}

/// The number of candidates and the estimator with which a layer is trained to read `k` keys per query. More than one
/// key are blended. A single key is selected, with a gradient through the eight candidates of lowest energy.
pub fn training_candidates(k: usize) -> (usize, Estimator) {
    if k == 1 { (8, Estimator::Candidates) } else { (k, Estimator::Blend) }
}

/// The selection schedule of an uptraining run that ends with `k` keys per query and aligns layers for the fraction
/// `align` of its steps.
///
/// The alignment uses the final number of candidates. After it the number starts at the maximum and is halved until it
/// reaches the final number at 70 % of the run. For `k = 1` it reaches eight candidates at 40 %, and the share of the
/// hard forward pass rises from 0 to 1 between 40 % and 70 %.
pub fn uptrain_schedule(k: usize, align: f64) -> SelectSchedule {
    let (last, _) = training_candidates(k);
    let end = if k == 1 { 0.4 } else { 0.7 };
    let levels: Vec<usize> = CANDIDATES.iter().copied().rev().filter(|&n| n >= last).collect();
    let from = align.min(end);
    let each = (end - from) / (levels.len() - 1).max(1) as f64;
    let mut candidates = vec![(0.0, last as f64)];
    candidates.extend(levels.iter().enumerate().map(|(i, &n)| (from + each * i as f64, n as f64)));
    let hardness =
        (k == 1).then(|| Curve::Points(vec![(0.0, 1.0), (from, 1.0), (from, 0.0), (end, 0.0), (0.7, 1.0)]));
    SelectSchedule { candidates: Some(Curve::Points(candidates)), hardness, ..SelectSchedule::default() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_number_of_candidates_falls_until_the_last_part_of_the_run() {
        let mask = gd_kernels::Mask::causal(0);
        for k in CANDIDATES {
            let schedule = uptrain_schedule(k, 0.05);
            schedule.validate().unwrap();
            let at = |share: f64| {
                let pass = schedule.pass(&mask, share);
                (pass.candidates.unwrap(), pass.hardness)
            };
            let last = training_candidates(k).0;
            assert_eq!(at(0.0), (last, 1.0), "{k}");
            assert_eq!(at(0.05), (64, if k == 1 { 0.0 } else { 1.0 }), "{k}");
            assert_eq!(at(0.7), (last, 1.0), "{k}");
            assert_eq!(at(1.0), (last, 1.0), "{k}");
            let way: Vec<_> = (5..=100).map(|p| at(f64::from(p) / 100.0)).collect();
            assert!(way.windows(2).all(|w| w[0].0 >= w[1].0 && w[0].1 <= w[1].1), "{k}: {way:?}");
            let passed: std::collections::BTreeSet<_> = way.iter().map(|w| w.0).collect();
            assert_eq!(passed.len(), CANDIDATES.iter().filter(|&&n| n >= last).count(), "{k}");
        }
        assert!((uptrain_schedule(1, 0.05).pass(&mask, 0.55).hardness - 0.5).abs() < 1e-12);
        // Without an alignment, and with one that is longer than the schedule.
        assert_eq!(uptrain_schedule(2, 0.0).pass(&mask, 0.0).candidates, Some(64));
        uptrain_schedule(4, 0.9).validate().unwrap();
    }
}
