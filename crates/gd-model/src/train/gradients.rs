//! The gradients of a step, summed over its micro-batches.

use candle_core::Var;
use candle_core::backprop::GradStore;

use super::optimizer::{accumulate, global_norm};
use crate::error::{Error, Result};

/// Sums over the micro-batches of a step. The loss and the gradient of the step are these sums divided by the weight, so
/// that every predicted token counts the same in whichever micro-batch it lies.
pub struct Gradients {
    /// The sum over the micro-batches of the mean loss times the weight of the micro-batch.
    pub loss: f64,
    /// The sum of the weights. The weight of a micro-batch is the fraction of its tokens that are predicted.
    pub weight: f64,
    /// The gradients of `loss`.
    pub store: GradStore,
}

impl Gradients {
    /// Adds the sums of another micro-batch.
    ///
    /// # Errors
    /// Gradients of other shapes.
    pub fn add(&mut self, vars: &[(String, Var)], more: &Self) -> Result<()> {
        self.loss += more.loss;
        self.weight += more.weight;
        accumulate(vars, &mut self.store, &more.store)
    }

    /// The mean loss in nats per predicted token.
    ///
    /// # Errors
    /// No token is predicted.
    pub fn loss(&self) -> Result<f64> {
        match self.weight > 0.0 {
            true => Ok(self.loss / self.weight),
            false => Err(Error::Invalid("a step without a token to predict".into())),
        }
    }

    /// The norm of the gradient of the mean loss. It is not finite if the gradient is not.
    ///
    /// # Errors
    /// A gradient of a dtype without a norm.
    pub fn norm(&self, vars: &[(String, Var)]) -> Result<f64> {
        Ok(global_norm(vars, &self.store)? / self.weight)
    }
}
