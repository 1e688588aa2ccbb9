//! The gradients of a step, summed over its micro-batches.

use candle_core::Var;
use candle_core::backprop::GradStore;

use super::optimizer::{accumulate, global_norm};
use crate::error::Result;

/// Sums over the micro-batches of a step; the default is the sums over none. The loss and the gradient of the step are
/// these sums divided by the weight, so that every predicted token counts the same in whichever micro-batch it lies.
#[derive(Default)]
pub struct Gradients {
    /// The sum over the micro-batches of the mean loss times the weight of the micro-batch.
    pub loss: f64,
    /// The sum of the weights. The weight of a micro-batch is the fraction of its tokens that are predicted.
    pub weight: f64,
    /// The gradients of `loss`.
    pub store: GradStore,
}

impl Gradients {
    /// Whether no token is predicted, so that there is no gradient.
    pub fn is_empty(&self) -> bool {
        self.weight == 0.0
    }

    /// Adds the sums of another micro-batch.
    ///
    /// # Errors
    /// Gradients of other shapes.
    pub fn add(&mut self, vars: &[(String, Var)], more: &Self) -> Result<()> {
        self.loss += more.loss;
        self.weight += more.weight;
        accumulate(vars, &mut self.store, &more.store)
    }

    /// The mean loss in nats per predicted token. NaN if no token is predicted.
    pub fn loss(&self) -> f64 {
        self.loss / self.weight
    }

    /// The norm of the gradient of the mean loss. It is not finite if the gradient is not.
    ///
    /// # Errors
    /// A gradient of a dtype without a norm.
    pub fn norm(&self, vars: &[(String, Var)]) -> Result<f64> {
        Ok(global_norm(vars, &self.store)? / self.weight)
    }
}
