//! Settings of the optimizer Muon.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::checks::{Checks, first};
use crate::error::{Error, Result};

/// Settings of [`Muon`](crate::train::optimizer::Muon).
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct MuonConfig {
    /// The decay of the momentum. In [0, 1).
    pub momentum: f64,
    /// Decoupled weight decay, which is multiplied by the learning rate. At least 0.
    pub weight_decay: f64,
}

impl Default for MuonConfig {
    fn default() -> Self {
        Self { momentum: 0.95, weight_decay: 0.1 }
    }
}

impl MuonConfig {
    /// Checks the range of every value.
    ///
    /// # Errors
    /// [`Error::OutOfRange`] for the first value outside its range.
    pub fn validate(&self) -> Result<()> {
        first(self.problems())
    }

    /// All values outside their range.
    pub(super) fn problems(&self) -> Vec<Error> {
        let Self { momentum, weight_decay } = *self;
        let mut checks = Checks::default();
        checks.require((0.0..1.0).contains(&momentum), "muon.momentum", momentum, "in [0, 1)");
        let decays = weight_decay >= 0.0 && weight_decay.is_finite();
        checks.require(decays, "muon.weight_decay", weight_decay, "at least 0");
        checks.into_problems()
    }
}
