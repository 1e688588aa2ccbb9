//! Settings of the optimizer Muon.

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};

/// Settings of [`Muon`](crate::train::optimizer::Muon).
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
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
        if !(0.0..1.0).contains(&self.momentum) {
            return Err(Error::out_of_range("muon.momentum", self.momentum, "in [0, 1)"));
        }
        if !(self.weight_decay >= 0.0 && self.weight_decay.is_finite()) {
            return Err(Error::out_of_range("muon.weight_decay", self.weight_decay, "at least 0"));
        }
        Ok(())
    }
}
