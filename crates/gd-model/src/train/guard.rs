//! The guard in front of an update: steps whose loss or gradient is out of all proportion are skipped.

use std::collections::VecDeque;

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};
use crate::train::state::{State, Stateful};

/// When an update is skipped, and when the run is given up.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct GuardConfig {
    /// Last steps whose mean and deviation are compared with; at least 2.
    pub window: usize,
    /// Steps that must be known before anything finite is skipped; within 2..=window.
    pub least: usize,
    /// Deviations above the mean from which a loss or gradient norm is a spike; above 0.
    pub sigma: f64,
    /// Skipped updates in a row that end the run; at least 1.
    pub stop_after: usize,
}

impl Default for GuardConfig {
    fn default() -> Self {
        Self { window: 128, least: 32, sigma: 6.0, stop_after: 16 }
    }
}

impl GuardConfig {
    /// # Errors
    /// Names the first value outside its range.
    pub fn validate(&self) -> Result<()> {
        let fail = |text: String| Err(Error::Invalid(text));
        if self.window < 2 || !(2..=self.window).contains(&self.least) {
            return fail(format!(
                "guard.window {} must be at least 2 and guard.least {} within 2 and the window",
                self.window, self.least
            ));
        }
        if self.sigma.is_nan() || self.sigma <= 0.0 {
            return fail(format!("guard.sigma {} is not positive", self.sigma));
        }
        if self.stop_after == 0 {
            return fail("guard.stop_after is 0".into());
        }
        Ok(())
    }
}

/// What the guard has seen.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
struct Seen {
    /// The last finite losses, oldest first.
    losses: VecDeque<f64>,
    /// The last finite gradient norms.
    norms: VecDeque<f64>,
    /// Updates skipped since the last one that was not.
    in_a_row: usize,
    /// Updates skipped in the whole run.
    skipped: u64,
}

/// What a value must not exceed.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Limit {
    /// The limit; infinite as long as too few steps are known.
    pub above: f64,
    /// Steps that it is made from.
    steps: usize,
}

impl Limit {
    /// The same in f32, as a device compares.
    #[must_use]
    pub fn rounded(self) -> Self {
        Self { above: f64::from(self.above as f32), ..self }
    }
}

/// Judges every step by those before it.
#[derive(Debug, Clone)]
pub struct Guard {
    config: GuardConfig,
    seen: Seen,
}

impl Guard {
    /// A guard that has seen nothing.
    ///
    /// # Errors
    /// A setting outside its range.
    pub fn new(config: GuardConfig) -> Result<Self> {
        config.validate()?;
        Ok(Self { config, seen: Seen::default() })
    }

    /// Why the update of a step with this loss and gradient norm is to be skipped; none if it is not.
    ///
    /// A finite value enters the window whether or not its update is skipped: a lasting change of level (other
    /// data, fewer candidates) is accepted after a few steps, a single spike is not.
    ///
    /// # Errors
    /// Too many updates in a row would be skipped.
    pub fn judge(&mut self, loss: f64, norm: f64) -> Result<Option<String>> {
        let limits = self.limits();
        self.judge_by(loss, norm, &limits)
    }

    /// The limits of loss and gradient norm, from all steps that have been judged.
    pub fn limits(&self) -> [Limit; 2] {
        let GuardConfig { least, sigma, .. } = self.config;
        [&self.seen.losses, &self.seen.norms].map(|seen| {
            let above = if seen.len() >= least { limit(seen, sigma) } else { f64::INFINITY };
            Limit { above, steps: seen.len() }
        })
    }

    /// [`Guard::judge`] by limits of an earlier moment, for a step that a device has judged by them already.
    ///
    /// # Errors
    /// As [`Guard::judge`].
    pub fn judge_by(&mut self, loss: f64, norm: f64, limits: &[Limit; 2]) -> Result<Option<String>> {
        let GuardConfig { window, sigma, stop_after, .. } = self.config;
        let reasons = [
            ("loss", loss, limits[0], &mut self.seen.losses),
            ("gradient norm", norm, limits[1], &mut self.seen.norms),
        ];
        let mut reason = None;
        for (what, value, Limit { above: limit, steps: last }, seen) in reasons {
            if !value.is_finite() {
                reason = reason.or(Some(format!("the {what} is {value}")));
                continue;
            }
            if value > limit {
                reason = reason.or_else(|| {
                    Some(format!(
                        "the {what} {value:.4} exceeds {limit:.4}, mean + {sigma} sigma of the last {last} steps"
                    ))
                });
            }
            seen.push_back(value);
            if seen.len() > window {
                seen.pop_front();
            }
        }
        let Some(reason) = reason else {
            self.seen.in_a_row = 0;
            return Ok(None);
        };
        self.seen.in_a_row += 1;
        self.seen.skipped += 1;
        if self.seen.in_a_row >= stop_after {
            return Err(Error::Invalid(format!("{stop_after} updates in a row would be skipped: {reason}")));
        }
        Ok(Some(reason))
    }

    /// Judges the steps from here on by each other alone, as where the loss is about to be another one. What
    /// was skipped stays counted.
    pub fn forget(&mut self) {
        self.seen.losses.clear();
        self.seen.norms.clear();
    }

    /// Updates skipped so far.
    pub fn skipped(&self) -> u64 {
        self.seen.skipped
    }
}

impl Stateful for Guard {
    fn save(&self) -> Result<State> {
        State::of(&self.seen)
    }

    fn restore(&mut self, state: State) -> Result<()> {
        self.seen = state.read()?;
        Ok(())
    }
}

/// Mean and `sigma` deviations, summed in the order of the steps.
fn limit(seen: &VecDeque<f64>, sigma: f64) -> f64 {
    let n = seen.len().max(1) as f64;
    let mean = seen.iter().sum::<f64>() / n;
    let variance = seen.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / n;
    mean + sigma * variance.sqrt()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Values around 1 with a deviation near 0.01.
    fn calm(i: usize) -> f64 {
        1.0 + 0.014 * (i as f64 * 12.9898).sin()
    }

    fn guard(steps: usize) -> Guard {
        let mut guard = Guard::new(GuardConfig::default()).unwrap();
        for i in 0..steps {
            assert_eq!(guard.judge(calm(i), calm(i + 7)).unwrap(), None, "step {i}");
        }
        guard
    }

    #[test]
    fn spikes_of_either_kind_are_skipped_and_counted() {
        for steps in [32, 128, 500] {
            let mut guard = guard(steps);
            assert!(guard.judge(1.04, 1.04).unwrap().is_none(), "within 6 sigma");
            let reason = guard.judge(1.2, 1.0).unwrap().unwrap();
            assert!(reason.starts_with("the loss 1.2000 exceeds 1.0"), "{reason}");
            let reason = guard.judge(1.0, 1.3).unwrap().unwrap();
            assert!(reason.starts_with("the gradient norm 1.3000"), "{reason}");
            assert!(guard.judge(1.0, 1.0).unwrap().is_none());
            assert!(guard.judge(0.1, 0.0).unwrap().is_none(), "a low value is no spike");
            assert_eq!(guard.skipped(), 2);
        }
        assert!(guard(31).judge(50.0, 50.0).unwrap().is_none(), "too few steps to judge");
    }

    #[test]
    fn a_device_is_given_the_limits_of_the_steps_known_by_then() {
        assert!(guard(31).limits().iter().all(|limit| limit.above == f64::INFINITY));
        let mut guard = guard(40);
        let limits = guard.limits().map(Limit::rounded);
        for limit in limits {
            assert!(limit.above > 1.04 && limit.above < 1.2, "{limit:?}");
            assert_eq!(limit.above, f64::from(limit.above as f32));
        }
        // A step that the device did not know when it judged the next.
        assert!(guard.judge(1.3, 1.0).unwrap().is_some());
        assert!(guard.limits()[0].above > 1.2);
        let reason = guard.judge_by(1.2, 1.0, &limits).unwrap().unwrap();
        assert!(reason.contains("of the last 40 steps"), "{reason}");
        assert!(guard.judge_by(1.0, 1.2, &limits).unwrap().unwrap().starts_with("the gradient norm"));
        assert_eq!(guard.skipped(), 3);
    }

    #[test]
    fn values_that_are_not_finite_are_skipped_from_the_first_step() {
        for bad in [f64::NAN, f64::INFINITY, f64::NEG_INFINITY] {
            let mut guard = guard(0);
            assert!(guard.judge(bad, 1.0).unwrap().unwrap().contains(&bad.to_string()));
            assert!(guard.judge(1.0, bad).unwrap().unwrap().contains("gradient norm"));
            assert!(guard.judge(1.0, 1.0).unwrap().is_none());
            assert!(guard.seen.losses.iter().chain(&guard.seen.norms).all(|x| x.is_finite()));
        }
    }

    #[test]
    fn a_lasting_change_is_accepted_and_an_endless_one_ends_the_run() {
        let mut raised = guard(200);
        let skips = (0..20).filter(|&i| raised.judge(3.0 + calm(i), calm(i)).unwrap().is_some()).count();
        assert!((1..8).contains(&skips), "{skips}");
        let mut growing = guard(200);
        let error = (0..40).find_map(|i| growing.judge(10f64.powi(i), 1.0).err()).unwrap().to_string();
        assert!(error.starts_with("16 updates in a row would be skipped: the loss 1"), "{error}");
        let mut broken = guard(3);
        for _ in 0..15 {
            assert!(broken.judge(f64::NAN, 1.0).unwrap().is_some());
        }
        assert!(broken.judge(f64::NAN, 1.0).unwrap_err().to_string().contains("the loss is NaN"));
    }

    #[test]
    fn a_restored_guard_judges_alike() {
        let mut straight = guard(40);
        let _ = straight.judge(f64::NAN, 2.0).unwrap();
        let text = serde_json::to_string(&straight.save().unwrap().values).unwrap();
        let values = serde_json::from_str(&text).unwrap();
        let mut other = guard(0);
        other.restore(State { values, ..State::default() }).unwrap();
        assert_eq!(other.seen, straight.seen);
        assert_eq!((other.skipped(), other.seen.losses.len(), other.seen.norms.len()), (1, 40, 41));
    }

    #[test]
    fn values_that_do_not_fit_are_named() {
        let good = GuardConfig::default();
        for (config, name) in [
            (GuardConfig { window: 1, ..good }, "guard.window 1"),
            (GuardConfig { least: 129, ..good }, "guard.least 129"),
            (GuardConfig { sigma: f64::NAN, ..good }, "guard.sigma NaN"),
            (GuardConfig { stop_after: 0, ..good }, "guard.stop_after"),
        ] {
            assert!(Guard::new(config).unwrap_err().to_string().contains(name), "{name}");
        }
    }
}
