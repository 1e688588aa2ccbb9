//! The guard against diverging updates: it skips updates whose loss or gradient norm is far above that of the last steps.

use std::collections::VecDeque;

use serde::{Deserialize, Serialize};

use super::state::{State, Stateful};
use crate::config::GuardConfig;
use crate::error::{Error, Result};

/// The values that the guard compares with.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
struct Window {
    /// The last finite losses, oldest first.
    losses: VecDeque<f64>,
    /// The last finite gradient norms, oldest first.
    norms: VecDeque<f64>,
    /// The number of updates skipped since the last one that was applied.
    in_a_row: usize,
    /// The number of updates skipped in the whole run.
    skipped: u64,
}

/// The maximum of a value.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Limit {
    /// The maximum; infinite as long as there are too few steps to compare with.
    pub above: f64,
    /// The number of steps that it is computed from.
    steps: usize,
}

impl Limit {
    /// The same limit rounded to f32, in which a device compares.
    #[must_use]
    pub fn rounded(self) -> Self {
        Self { above: f64::from(self.above as f32), ..self }
    }
}

/// Judges every step by the steps before it.
#[derive(Debug, Clone)]
pub struct Guard {
    config: GuardConfig,
    window: Window,
}

impl Guard {
    /// A guard without steps to compare with.
    ///
    /// # Errors
    /// [`Error::OutOfRange`] for a setting outside its range.
    pub fn new(config: GuardConfig) -> Result<Self> {
        config.validate()?;
        Ok(Self { config, window: Window::default() })
    }

    /// Judges a step, counted from 1, by its loss and gradient norm. Returns why its update is skipped; `None` if it is
    /// applied.
    ///
    /// A finite value enters the window whether or not the update is skipped. So a lasting change of level (other data,
    /// fewer candidates) is accepted after a few steps, and a single spike is not.
    ///
    /// # Errors
    /// [`Error::Diverged`] if too many updates in a row would be skipped.
    pub fn judge(&mut self, step: u64, loss: f64, norm: f64) -> Result<Option<String>> {
        let limits = self.limits();
        self.judge_by(step, loss, norm, &limits)
    }

    /// The limits of the loss and of the gradient norm after the steps that have been judged.
    pub fn limits(&self) -> [Limit; 2] {
        let GuardConfig { least, sigma, .. } = self.config;
        [&self.window.losses, &self.window.norms].map(|values| {
            let above = if values.len() >= least { limit(values, sigma) } else { f64::INFINITY };
            Limit { above, steps: values.len() }
        })
    }

    /// Judges a step by limits that were computed earlier, because a device has applied them already. Otherwise as
    /// [`Guard::judge`].
    ///
    /// # Errors
    /// As [`Guard::judge`].
    pub fn judge_by(
        &mut self,
        step: u64,
        loss: f64,
        norm: f64,
        limits: &[Limit; 2],
    ) -> Result<Option<String>> {
        let GuardConfig { window, sigma, stop_after, .. } = self.config;
        let checks = [
            ("loss", loss, limits[0], &mut self.window.losses),
            ("gradient norm", norm, limits[1], &mut self.window.norms),
        ];
        let mut reason = None;
        for (what, value, Limit { above: limit, steps: last }, values) in checks {
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
            values.push_back(value);
            if values.len() > window {
                values.pop_front();
            }
        }
        let Some(reason) = reason else {
            self.window.in_a_row = 0;
            return Ok(None);
        };
        self.window.in_a_row += 1;
        self.window.skipped += 1;
        if self.window.in_a_row >= stop_after {
            let reason = format!("{stop_after} updates in a row would be skipped: {reason}");
            return Err(Error::Diverged { step, loss: Some(loss), lr: None, reason, checkpoint: None });
        }
        Ok(Some(reason))
    }

    /// Counts the update of a step without a token to predict, which is skipped without being judged.
    pub fn count_skipped(&mut self) {
        self.window.skipped += 1;
    }

    /// Removes all steps from the window, because the loss is about to change. The count of skipped updates stays.
    pub fn reset_window(&mut self) {
        self.window.losses.clear();
        self.window.norms.clear();
    }

    /// The number of updates skipped so far.
    pub fn skipped(&self) -> u64 {
        self.window.skipped
    }
}

impl Stateful for Guard {
    fn save(&self) -> Result<State> {
        State::of(&self.window)
    }

    fn restore(&mut self, state: State) -> Result<()> {
        self.window = state.read()?;
        Ok(())
    }
}

/// The mean plus `sigma` standard deviations, summed in the order of the steps.
fn limit(values: &VecDeque<f64>, sigma: f64) -> f64 {
    let n = values.len().max(1) as f64;
    let mean = values.iter().sum::<f64>() / n;
    let variance = values.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / n;
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
            assert_eq!(guard.judge(1, calm(i), calm(i + 7)).unwrap(), None, "step {i}");
        }
        guard
    }

    #[test]
    fn spikes_of_either_kind_are_skipped_and_counted() {
        for steps in [32, 128, 500] {
            let mut guard = guard(steps);
            assert!(guard.judge(1, 1.04, 1.04).unwrap().is_none(), "within 6 sigma");
            let reason = guard.judge(1, 1.2, 1.0).unwrap().unwrap();
            assert!(reason.starts_with("the loss 1.2000 exceeds 1.0"), "{reason}");
            let reason = guard.judge(1, 1.0, 1.3).unwrap().unwrap();
            assert!(reason.starts_with("the gradient norm 1.3000"), "{reason}");
            assert!(guard.judge(1, 1.0, 1.0).unwrap().is_none());
            assert!(guard.judge(1, 0.1, 0.0).unwrap().is_none(), "a low value is no spike");
            assert_eq!(guard.skipped(), 2);
        }
        assert!(guard(31).judge(1, 50.0, 50.0).unwrap().is_none(), "too few steps to judge");
    }

    #[test]
    fn a_device_gets_the_limits_of_the_steps_read_so_far() {
        assert!(guard(31).limits().iter().all(|limit| limit.above == f64::INFINITY));
        let mut guard = guard(40);
        let limits = guard.limits().map(Limit::rounded);
        for limit in limits {
            assert!(limit.above > 1.04 && limit.above < 1.2, "{limit:?}");
            assert_eq!(limit.above, f64::from(limit.above as f32));
        }
        // A step whose result the device did not have when it judged the next.
        assert!(guard.judge(1, 1.3, 1.0).unwrap().is_some());
        assert!(guard.limits()[0].above > 1.2);
        let reason = guard.judge_by(1, 1.2, 1.0, &limits).unwrap().unwrap();
        assert!(reason.contains("of the last 40 steps"), "{reason}");
        assert!(guard.judge_by(1, 1.0, 1.2, &limits).unwrap().unwrap().starts_with("the gradient norm"));
        assert_eq!(guard.skipped(), 3);
    }

    #[test]
    fn values_that_are_not_finite_are_skipped_from_the_first_step() {
        for bad in [f64::NAN, f64::INFINITY, f64::NEG_INFINITY] {
            let mut guard = guard(0);
            assert!(guard.judge(1, bad, 1.0).unwrap().unwrap().contains(&bad.to_string()));
            assert!(guard.judge(1, 1.0, bad).unwrap().unwrap().contains("gradient norm"));
            assert!(guard.judge(1, 1.0, 1.0).unwrap().is_none());
            assert!(guard.window.losses.iter().chain(&guard.window.norms).all(|x| x.is_finite()));
        }
    }

    #[test]
    fn a_lasting_change_is_accepted_and_an_endless_one_ends_the_run() {
        let mut raised = guard(200);
        let skips = (0..20).filter(|&i| raised.judge(1, 3.0 + calm(i), calm(i)).unwrap().is_some()).count();
        assert!((1..8).contains(&skips), "{skips}");
        let mut rising = guard(200);
        let error = (0..40).find_map(|i| rising.judge(1, 10f64.powi(i), 1.0).err()).unwrap().to_string();
        assert!(error.starts_with("step 1: 16 updates in a row would be skipped: the loss 1"), "{error}");
        let mut broken = guard(3);
        for _ in 0..15 {
            assert!(broken.judge(1, f64::NAN, 1.0).unwrap().is_some());
        }
        assert!(broken.judge(1, f64::NAN, 1.0).unwrap_err().to_string().contains("the loss is NaN"));
    }

    #[test]
    fn a_restored_guard_judges_alike() {
        let mut straight = guard(40);
        let _ = straight.judge(1, f64::NAN, 2.0).unwrap();
        let text = serde_json::to_string(&straight.save().unwrap().values).unwrap();
        let values = serde_json::from_str(&text).unwrap();
        let mut other = guard(0);
        other.restore(State { values, ..State::default() }).unwrap();
        assert_eq!(other.window, straight.window);
        assert_eq!((other.skipped(), other.window.losses.len(), other.window.norms.len()), (1, 40, 41));
    }

    #[test]
    fn settings_outside_their_range_are_named() {
        let good = GuardConfig::default();
        for (config, name) in [
            (GuardConfig { window: 1, ..good }, "guard.window must be at least 2, not 1"),
            (GuardConfig { least: 129, ..good }, "guard.least must be in 2..=128 (guard.window), not 129"),
            (GuardConfig { sigma: f64::NAN, ..good }, "guard.sigma must be above 0, not NaN"),
            (GuardConfig { stop_after: 0, ..good }, "guard.stop_after"),
        ] {
            assert!(Guard::new(config).unwrap_err().to_string().contains(name), "{name}");
        }
    }
}
