//! Settings of the guard against diverging updates.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::checks::{Checks, first};
use crate::error::{Error, Result};

/// The maximal number of steps that are compared with.
const MAX_WINDOW: usize = 1 << 20;

/// When [`Guard`](crate::train::guard::Guard) skips an update, and when it stops the run.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct GuardConfig {
    /// The number of most recent steps whose mean and standard deviation a step is compared with. At least 2.
    pub window: usize,
    /// The number of steps before a finite value is skipped. In `2..=window`.
    pub least: usize,
    /// The threshold of a loss or gradient norm, in standard deviations above the mean. Above 0.
    pub sigma: f64,
    /// The number of consecutive skipped updates that stops the run. At least 1.
    pub stop_after: usize,
}

impl Default for GuardConfig {
    fn default() -> Self {
        Self { window: 128, least: 32, sigma: 6.0, stop_after: 16 }
    }
}

impl GuardConfig {
    /// Checks the range of every value.
    ///
    /// # Errors
    /// [`Error::OutOfRange`] for the first value outside its range.
    pub fn validate(&self) -> Result<()> {
        first(self.problems())
    }

    /// All values outside their range.
    pub(super) fn problems(&self) -> Vec<Error> {
        let Self { window, least, sigma, stop_after } = *self;
        let mut checks = Checks::default();
        checks.require(window >= 2, "guard.window", window, "at least 2");
        checks.require(window <= MAX_WINDOW, "guard.window", window, format!("at most {MAX_WINDOW}"));
        let allowed = format!("in 2..={window} (guard.window)");
        checks.require(window < 2 || (2..=window).contains(&least), "guard.least", least, allowed);
        checks.require(sigma > 0.0, "guard.sigma", sigma, "above 0");
        checks.require(stop_after > 0, "guard.stop_after", stop_after, "at least 1");
        checks.into_problems()
    }
}
