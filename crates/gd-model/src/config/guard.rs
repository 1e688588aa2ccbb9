//! Settings of the guard against diverging updates.

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};

/// When [`Guard`](crate::train::guard::Guard) skips an update, and when it stops the run.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
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
        if self.window < 2 {
            return Err(Error::out_of_range("guard.window", self.window, "at least 2"));
        }
        if !(2..=self.window).contains(&self.least) {
            let allowed = format!("in 2..={} (guard.window)", self.window);
            return Err(Error::out_of_range("guard.least", self.least, allowed));
        }
        if self.sigma.is_nan() || self.sigma <= 0.0 {
            return Err(Error::out_of_range("guard.sigma", self.sigma, "above 0"));
        }
        if self.stop_after == 0 {
            return Err(Error::out_of_range("guard.stop_after", 0, "at least 1"));
        }
        Ok(())
    }
}
