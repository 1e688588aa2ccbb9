//! Settings of the exponential moving average of the parameters.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};

/// Settings of [`Ema`](crate::train::ema::Ema).
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct EmaConfig {
    /// The maximal weight of the old average in an update. In (0, 1).
    pub decay: f64,
}

impl EmaConfig {
    /// Checks the range of every value.
    ///
    /// # Errors
    /// [`Error::OutOfRange`] for a decay outside (0, 1).
    pub fn validate(&self) -> Result<()> {
        match self.decay > 0.0 && self.decay < 1.0 {
            true => Ok(()),
            false => Err(Error::out_of_range("train.ema.decay", self.decay, "in (0, 1)")),
        }
    }

    /// The weight of the old average in update `t`, counted from 1: `min(decay, (1 + t) / (10 + t))`.
    pub(crate) fn decay_at(&self, t: u64) -> f64 {
        self.decay.min((1 + t) as f64 / (10 + t) as f64)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_decay_warms_up_to_its_maximum() {
        let config = EmaConfig { decay: 0.9 };
        assert_eq!(config.decay_at(1), 2.0 / 11.0);
        assert_eq!(config.decay_at(50), 51.0 / 60.0);
        assert_eq!(config.decay_at(1000), 0.9);
        for decay in [0.0, 1.0, f64::NAN, -0.5] {
            let error = EmaConfig { decay }.validate().unwrap_err().to_string();
            assert!(error.contains("train.ema.decay") && error.contains(&decay.to_string()), "{error}");
        }
    }
}
