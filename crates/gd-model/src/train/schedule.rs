//! Learning rate by step: a linear warm-up, then one of three shapes.

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};

/// What the learning rate does after the warm-up.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase", deny_unknown_fields)]
pub enum Shape {
    /// Stays at its peak.
    Constant,
    /// Falls along half a cosine from the peak to the floor.
    Cosine,
    /// Warm-up, stable, decay: stays at its peak, and falls in a straight line to the floor over the last
    /// part of the run.
    Wsd {
        /// That part, as a share of all steps, in (0, 1].
        decay: f64,
    },
}

/// A learning-rate schedule.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LrSchedule {
    /// The greatest learning rate; above 0.
    pub peak: f64,
    /// Steps of the warm-up; the first has the rate peak / warmup, the last the peak.
    pub warmup: u64,
    /// What is left at the end, as a share of the peak, in [0, 1].
    pub floor: f64,
    /// The way from the peak to the floor.
    pub shape: Shape,
}

impl LrSchedule {
    /// Fails with the value that does not fit a run of `total` steps.
    pub fn validate(&self, total: u64) -> Result<()> {
        let fail = |text: String| Err(Error::Invalid(text));
        if !(self.peak > 0.0 && self.peak.is_finite()) {
            return fail(format!("the learning rate must be above 0, not {}", self.peak));
        }
        if !(0.0..=1.0).contains(&self.floor) {
            return fail(format!("the learning rate's floor must be in [0, 1], not {}", self.floor));
        }
        if self.warmup >= total {
            return fail(format!("a warm-up of {} steps does not fit a run of {total}", self.warmup));
        }
        if let Shape::Wsd { decay } = self.shape {
            if !(decay > 0.0 && decay <= 1.0) {
                return fail(format!("the decay's share must be in (0, 1], not {decay}"));
            }
            if self.warmup as f64 + decay * total as f64 > total as f64 {
                return fail(format!(
                    "a warm-up of {} steps and a decay over {decay} of all do not fit a run of {total}",
                    self.warmup
                ));
            }
        }
        Ok(())
    }

    /// The learning rate of `step` (from 0) in a run of `total` steps. The floor would be reached at step
    /// `total`, one after the last, so that no step is wasted on a rate of 0.
    pub fn lr(&self, step: u64, total: u64) -> f64 {
        if step < self.warmup {
            return self.peak * (step + 1) as f64 / self.warmup as f64;
        }
        let done = |from: f64| ((step as f64 - from) / (total as f64 - from)).clamp(0.0, 1.0);
        let share = match self.shape {
            Shape::Constant => 1.0,
            Shape::Cosine => 0.5 * (1.0 + (std::f64::consts::PI * done(self.warmup as f64)).cos()),
            Shape::Wsd { decay } => 1.0 - done((1.0 - decay) * total as f64),
        };
        self.peak * (self.floor + (1.0 - self.floor) * share)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn schedule(shape: Shape) -> LrSchedule {
        LrSchedule { peak: 2.0, warmup: 4, floor: 0.1, shape }
    }

    #[test]
    fn warm_up_rises_to_the_peak() {
        for shape in [Shape::Constant, Shape::Cosine, Shape::Wsd { decay: 0.5 }] {
            let rates: Vec<f64> = (0..5).map(|s| schedule(shape).lr(s, 24)).collect();
            assert_eq!(rates, [0.5, 1.0, 1.5, 2.0, 2.0], "{shape:?}");
        }
        assert_eq!(LrSchedule { warmup: 0, ..schedule(Shape::Cosine) }.lr(0, 24), 2.0);
    }

    #[test]
    fn shapes_pass_their_marks() {
        let near = |a: f64, b: f64| assert!((a - b).abs() < 1e-12, "{a} {b}");
        near(schedule(Shape::Constant).lr(23, 24), 2.0);
        // Halfway between the peak 2.0 and the floor 0.2 after half of the 20 steps that follow the warm-up.
        near(schedule(Shape::Cosine).lr(14, 24), 1.1);
        near(schedule(Shape::Cosine).lr(9, 24), 0.2 + 1.8 * 0.5 * (1.0 + 0.5f64.sqrt()));
        near(schedule(Shape::Cosine).lr(24, 24), 0.2);
        let wsd = schedule(Shape::Wsd { decay: 0.5 });
        near(wsd.lr(12, 24), 2.0);
        near(wsd.lr(18, 24), 1.1);
        near(wsd.lr(23, 24), 0.2 + 1.8 / 12.0);
        for shape in [Shape::Cosine, Shape::Wsd { decay: 0.5 }] {
            let rates: Vec<f64> = (4..30).map(|s| schedule(shape).lr(s, 24)).collect();
            assert!(rates.windows(2).all(|w| w[1] <= w[0]), "{rates:?}");
            near(rates[25], 0.2);
        }
    }

    #[test]
    fn values_that_do_not_fit_are_named() {
        let good = schedule(Shape::Cosine);
        assert!(good.validate(24).is_ok());
        let cases = [
            (LrSchedule { peak: 0.0, ..good }, "not 0"),
            (LrSchedule { peak: f64::NAN, ..good }, "NaN"),
            (LrSchedule { floor: 1.5, ..good }, "1.5"),
            (LrSchedule { warmup: 24, ..good }, "24 steps does not fit a run of 24"),
            (LrSchedule { shape: Shape::Wsd { decay: 0.0 }, ..good }, "not 0"),
            (LrSchedule { shape: Shape::Wsd { decay: 0.9 }, ..good }, "0.9"),
        ];
        for (schedule, expected) in cases {
            let error = schedule.validate(24).unwrap_err().to_string();
            assert!(error.contains(expected), "{expected}: {error}");
        }
    }

    #[test]
    fn the_stored_form_reads_back() {
        let text = r#"{"peak": 0.001, "warmup": 10, "floor": 0.1, "shape": {"wsd": {"decay": 0.2}}}"#;
        let read: LrSchedule = serde_json::from_str(text).unwrap();
        assert_eq!(read.shape, Shape::Wsd { decay: 0.2 });
        assert_eq!(serde_json::from_str::<LrSchedule>(&serde_json::to_string(&read).unwrap()).unwrap(), read);
        assert!(serde_json::from_str::<LrSchedule>(&text.replace("floor", "flour")).is_err());
    }
}
