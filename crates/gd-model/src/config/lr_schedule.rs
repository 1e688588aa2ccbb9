//! The learning rate by step: a linear warm-up followed by one of three shapes.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::checks::{Checks, first};
use crate::error::{Error, Result};

/// The course of the learning rate after the warm-up.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase", deny_unknown_fields)]
pub enum LrShape {
    /// The rate stays at its peak.
    Constant,
    /// The rate falls along half a cosine from the peak to the floor.
    Cosine,
    /// Warm-up, stable, decay: the rate stays at its peak, and falls linearly to the floor at the end of the run.
    Wsd {
        /// The duration of the decay, as a fraction of all steps. In (0, 1].
        decay: f64,
    },
}

/// A learning-rate schedule.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct LrSchedule {
    /// The maximal learning rate. Above 0.
    pub peak: f64,
    /// The number of steps of the warm-up. Its first step has the rate `peak / warmup`, its last step the peak.
    pub warmup: u64,
    /// The learning rate at the end, as a fraction of the peak. In [0, 1].
    pub floor: f64,
    /// The course from the peak to the floor: `constant`, `cosine`, or `{"wsd": {"decay": SHARE}}`, which is constant and
    /// then falls along a straight line over the last share of the steps.
    pub shape: LrShape,
}

impl LrSchedule {
    /// Checks the schedule for a run of `total` steps.
    ///
    /// # Errors
    /// [`Error::OutOfRange`] for the first value outside its range.
    pub fn validate(&self, total: u64) -> Result<()> {
        first(self.problems(total))
    }

    /// All values outside their range.
    pub(super) fn problems(&self, total: u64) -> Vec<Error> {
        let Self { peak, warmup, floor, shape } = *self;
        let mut checks = Checks::default();
        checks.require(peak > 0.0 && peak.is_finite(), "train.lr.peak", peak, "above 0");
        checks.require((0.0..=1.0).contains(&floor), "train.lr.floor", floor, "in [0, 1]");
        checks.require(warmup < total, "train.lr.warmup", warmup, format!("below train.steps {total}"));
        if let LrShape::Wsd { decay } = shape {
            let (name, is_fraction) = ("train.lr.shape.wsd.decay", decay > 0.0 && decay <= 1.0);
            checks.require(is_fraction, name, decay, "in (0, 1]");
            if is_fraction && warmup < total {
                let fits = warmup as f64 + decay * total as f64 <= total as f64;
                let allowed = format!("a fraction that leaves {warmup} of {total} steps for the warm-up");
                checks.require(fits, name, decay, allowed);
            }
        }
        checks.into_problems()
    }

    /// The learning rate of `step`, counted from 0, in a run of `total` steps. The floor would be reached at step
    /// `total`, one after the last, so that no step has a rate of 0.
    pub fn lr(&self, step: u64, total: u64) -> f64 {
        if step < self.warmup {
            return self.peak * (step + 1) as f64 / self.warmup as f64;
        }
        let done = |from: f64| ((step as f64 - from) / (total as f64 - from)).clamp(0.0, 1.0);
        let share = match self.shape {
            LrShape::Constant => 1.0,
            LrShape::Cosine => 0.5 * (1.0 + (std::f64::consts::PI * done(self.warmup as f64)).cos()),
            LrShape::Wsd { decay } => 1.0 - done((1.0 - decay) * total as f64),
        };
        self.peak * (self.floor + (1.0 - self.floor) * share)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn schedule(shape: LrShape) -> LrSchedule {
        LrSchedule { peak: 2.0, warmup: 4, floor: 0.1, shape }
    }

    #[test]
    fn warm_up_rises_to_the_peak() {
        for shape in [LrShape::Constant, LrShape::Cosine, LrShape::Wsd { decay: 0.5 }] {
            let rates: Vec<f64> = (0..5).map(|s| schedule(shape).lr(s, 24)).collect();
            assert_eq!(rates, [0.5, 1.0, 1.5, 2.0, 2.0], "{shape:?}");
        }
        assert_eq!(LrSchedule { warmup: 0, ..schedule(LrShape::Cosine) }.lr(0, 24), 2.0);
    }

    #[test]
    fn each_shape_passes_through_its_characteristic_points() {
        let near = |a: f64, b: f64| assert!((a - b).abs() < 1e-12, "{a} {b}");
        near(schedule(LrShape::Constant).lr(23, 24), 2.0);
        // Halfway between the peak 2.0 and the floor 0.2 after half of the 20 steps that follow the warm-up.
        near(schedule(LrShape::Cosine).lr(14, 24), 1.1);
        near(schedule(LrShape::Cosine).lr(9, 24), 0.2 + 1.8 * 0.5 * (1.0 + 0.5f64.sqrt()));
        near(schedule(LrShape::Cosine).lr(24, 24), 0.2);
        let wsd = schedule(LrShape::Wsd { decay: 0.5 });
        near(wsd.lr(12, 24), 2.0);
        near(wsd.lr(18, 24), 1.1);
        near(wsd.lr(23, 24), 0.2 + 1.8 / 12.0);
        for shape in [LrShape::Cosine, LrShape::Wsd { decay: 0.5 }] {
            let rates: Vec<f64> = (4..30).map(|s| schedule(shape).lr(s, 24)).collect();
            assert!(rates.windows(2).all(|w| w[1] <= w[0]), "{rates:?}");
            near(rates[25], 0.2);
        }
    }

    #[test]
    fn values_outside_their_range_are_named() {
        let good = schedule(LrShape::Cosine);
        assert!(good.validate(24).is_ok());
        let cases = [
            (LrSchedule { peak: 0.0, ..good }, "not 0"),
            (LrSchedule { peak: f64::NAN, ..good }, "NaN"),
            (LrSchedule { floor: 1.5, ..good }, "1.5"),
            (LrSchedule { warmup: 24, ..good }, "train.lr.warmup must be below train.steps 24, not 24"),
            (LrSchedule { shape: LrShape::Wsd { decay: 0.0 }, ..good }, "not 0"),
            (LrSchedule { shape: LrShape::Wsd { decay: 0.9 }, ..good }, "0.9"),
        ];
        for (schedule, expected) in cases {
            let error = schedule.validate(24).unwrap_err().to_string();
            assert!(error.contains(expected), "{expected}: {error}");
        }
    }

    #[test]
    fn the_serialized_schedule_reads_back() {
        let text = r#"{"peak": 0.001, "warmup": 10, "floor": 0.1, "shape": {"wsd": {"decay": 0.2}}}"#;
        let read: LrSchedule = serde_json::from_str(text).unwrap();
        assert_eq!(read.shape, LrShape::Wsd { decay: 0.2 });
        assert_eq!(serde_json::from_str::<LrSchedule>(&serde_json::to_string(&read).unwrap()).unwrap(), read);
        assert!(serde_json::from_str::<LrSchedule>(&text.replace("floor", "flour")).is_err());
    }
}
