//! How selection changes over a run: the block `train.select` of a recipe.

use gd_kernels::{CANDIDATES, Mask};
use gd_layer::Pass;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::Curve;
use super::checks::{Checks, first};
use crate::error::{Error, Result};

/// Settings of selection as functions of the progress of the training. A setting without a curve is that of the model's
/// configuration. The curves apply to training steps; the evaluation always selects as the finished model does.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct SelectSchedule {
    /// The number of candidates per query, one of [`CANDIDATES`]. It changes at the points of the curve, without
    /// interpolation.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub candidates: Option<Curve>,
    /// The weight of the hard forward pass, in [0, 1]: 0 blends the candidates, 1 (the default) selects one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub hardness: Option<Curve>,
    /// The preserve floor of the gradient, in [0, 1].
    #[serde(skip_serializing_if = "Option::is_none")]
    pub preserve_floor: Option<Curve>,
    /// The temperature of the softmax in the gradient, above 0.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub temperature: Option<Curve>,
    /// An offset that is added to the learned thresholds of the heads, in units of the energy. At least 0. A positive
    /// value that falls to 0 keeps heads from abstaining early in the training.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub threshold: Option<Curve>,
    /// Whether the thresholds start where the mean energy gate over the first batch is 1/2, instead of at
    /// `gd.select.threshold`. Without the energy gate: where half of the queries abstain.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub calibrate_thresholds: bool,
}

impl SelectSchedule {
    /// The options of a training pass at a fraction of all steps.
    pub fn pass<'a>(&self, mask: &'a Mask, share: f64) -> Pass<'a> {
        let at = |curve: &Option<Curve>| curve.as_ref().map(|c| c.at(share));
        Pass {
            candidates: self.candidates.as_ref().map(|c| c.step_at(share) as usize),
            hardness: at(&self.hardness).unwrap_or(1.0),
            preserve_floor: at(&self.preserve_floor),
            temperature: at(&self.temperature),
            threshold: at(&self.threshold),
            ..Pass::new(mask)
        }
    }

    /// Checks the range of every curve.
    ///
    /// # Errors
    /// [`Error::OutOfRange`](crate::Error::OutOfRange) for the first value outside its range.
    pub fn validate(&self) -> Result<()> {
        first(self.problems())
    }

    /// The first problem of every curve.
    pub(super) fn problems(&self) -> Vec<Error> {
        let mut checks = Checks::default();
        let share = |v: f64| (0.0..=1.0).contains(&v);
        let count = |v: f64| CANDIDATES.iter().any(|&k| k as f64 == v);
        let check = |curve: &Option<Curve>, name: &str, range: &str, fit: &dyn Fn(f64) -> bool| match curve {
            Some(curve) => curve.validate(&format!("train.select.{name}"), range, fit),
            None => Ok(()),
        };
        checks.add(check(&self.candidates, "candidates", &format!("one of {CANDIDATES:?}"), &count));
        checks.add(check(&self.hardness, "hardness", "in [0, 1]", &share));
        checks.add(check(&self.preserve_floor, "preserve_floor", "in [0, 1]", &share));
        checks.add(check(&self.temperature, "temperature", "above 0", &|v| v > 0.0));
        checks.add(check(&self.threshold, "threshold", "at least 0", &|v| v >= 0.0));
        checks.into_problems()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_default_is_a_plain_pass_and_curves_reach_it() {
        let mask = Mask::causal(0);
        let plain = format!("{:?}", Pass::new(&mask));
        assert_eq!(format!("{:?}", SelectSchedule::default().pass(&mask, 0.3)), plain);
        let text = r#"{"candidates": [[0, 32], [0.5, 8]], "hardness": [[0.2, 0], [0.6, 1]],
            "preserve_floor": [[0, 0.1], [1, 0]], "temperature": 2.0, "threshold": [[0, 4], [0.5, 0]]}"#;
        let select: SelectSchedule = serde_json::from_str(text).unwrap();
        select.validate().unwrap();
        let pass = select.pass(&mask, 0.4);
        assert_eq!((pass.candidates, pass.temperature), (Some(32), Some(2.0)));
        assert!((pass.hardness - 0.5).abs() < 1e-12);
        assert!((pass.preserve_floor.unwrap() - 0.06).abs() < 1e-12);
        assert!((pass.threshold.unwrap() - 0.8).abs() < 1e-12);
        assert_eq!(select.pass(&mask, 0.5).candidates, Some(8));
    }

    #[test]
    fn values_outside_their_range_are_named() {
        for (text, expected) in [
            (
                r#"{"candidates": [[0, 8], [0.5, 6]]}"#,
                "train.select.candidates must be one of [1, 2, 4, 8, 16, 32, 64], not 6",
            ),
            (r#"{"hardness": 1.5}"#, "train.select.hardness must be in [0, 1], not 1.5"),
            (r#"{"preserve_floor": -0.1}"#, "preserve_floor"),
            (r#"{"temperature": 0}"#, "train.select.temperature must be above 0, not 0"),
            (r#"{"threshold": -1}"#, "threshold"),
        ] {
            let select: SelectSchedule = serde_json::from_str(text).unwrap();
            let error = select.validate().unwrap_err().to_string();
            assert!(error.contains(expected), "{error}");
        }
        assert!(serde_json::from_str::<SelectSchedule>(r#"{"hardnes": 1}"#).is_err());
    }
}
