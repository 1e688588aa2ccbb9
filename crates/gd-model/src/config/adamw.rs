//! Settings of the optimizer AdamW.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::checks::{Checks, first};
use crate::error::{Error, Result};

/// Settings of [`AdamW`](crate::train::optimizer::AdamW).
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct AdamWConfig {
    /// The decay of the first moment. In [0, 1).
    pub beta1: f64,
    /// The decay of the second moment. In [0, 1).
    pub beta2: f64,
    /// The value added to the square root of the second moment. Above 0.
    pub eps: f64,
    /// Decoupled weight decay, which is multiplied by the learning rate. It applies to the parameters whose
    /// [`Group`](crate::train::optimizer::Group) decays. At least 0.
    pub weight_decay: f64,
}

impl Default for AdamWConfig {
    fn default() -> Self {
        Self { beta1: 0.9, beta2: 0.95, eps: 1e-8, weight_decay: 0.1 }
    }
}

impl AdamWConfig {
    /// Checks the range of every value.
    ///
    /// # Errors
    /// [`Error::OutOfRange`] for the first value outside its range.
    pub fn validate(&self) -> Result<()> {
        first(self.problems())
    }

    /// All values outside their range.
    pub(super) fn problems(&self) -> Vec<Error> {
        let Self { beta1, beta2, eps, weight_decay } = *self;
        let mut checks = Checks::default();
        checks.require((0.0..1.0).contains(&beta1), "adamw.beta1", beta1, "in [0, 1)");
        checks.require((0.0..1.0).contains(&beta2), "adamw.beta2", beta2, "in [0, 1)");
        checks.require(eps > 0.0 && eps.is_finite(), "adamw.eps", eps, "above 0");
        let decays = weight_decay >= 0.0 && weight_decay.is_finite();
        checks.require(decays, "adamw.weight_decay", weight_decay, "at least 0");
        checks.into_problems()
    }
}
