//! The selectors of ReSAN and the loss by which they are trained.

use candle_core::{Result, Tensor};
use candle_nn::ops::sigmoid;

use crate::mechanisms::indices::project;
use crate::mechanisms::inputs::Inputs;

/// The loss of REINFORCE, `-mean_b reward_b sum log p`, a scalar, of the log-probabilities `[B, 2, N]` of the selections and
/// rewards `[B]`. Its gradient reaches the selectors alone.
///
/// # Errors
/// Shapes that do not fit.
pub fn reinforce_loss(log_probabilities: &Tensor, reward: &Tensor) -> Result<Tensor> {
    (log_probabilities.flatten_from(1)?.sum(1)? * reward)?.mean_all()?.neg()
}

/// A sample of one selector, `[B, N]` each; all 0 on padding.
pub(super) struct Selection {
    pub(super) probability: Tensor,
    /// u8: 1 where the uniform number is at most the probability.
    pub(super) action: Tensor,
    /// Of the action.
    pub(super) log_probability: Tensor,
}

impl Selection {
    /// Samples `p = sigmoid(w2 relu(W1 [x; mean x; x * mean x] + b1) + b2)`, with the inputs of these names.
    pub(super) fn sample(
        inputs: &Inputs,
        [weight1, bias1, weight2, bias2, uniform]: [&str; 5],
    ) -> Result<Self> {
        let get = |name| inputs.get(name);
        let (x, valid) = (get("x")?, get("valid")?);
        let is_token = valid.to_dtype(x.dtype())?;
        let count = is_token.sum_keepdim(1)?.maximum(1f64)?.unsqueeze(2)?;
        let sum = x.broadcast_mul(&is_token.unsqueeze(2)?)?.sum_keepdim(1)?;
        let mean = sum.broadcast_div(&count)?.broadcast_as(x.shape())?;
        let f = Tensor::cat(&[x, &mean, &(x * &mean)?], 2)?;
        let hidden = project(&f, get(weight1)?)?.broadcast_add(get(bias1)?)?.relu()?;
        let logit = project(&hidden, &get(weight2)?.unsqueeze(0)?)?.squeeze(2)?.broadcast_add(get(bias2)?)?;
        let probability = (sigmoid(&logit)? * &is_token)?;
        let action = (get(uniform)?.le(&probability.detach())? * valid)?;
        // ln p of an action and ln(1 - p) = ln sigmoid(-x) of the other, without the logarithm of a rounded 1 - p.
        let signed = (logit * ((action.to_dtype(x.dtype())? * 2.0)? - 1.0)?)?;
        let log_probability = (ln_sigmoid(&signed)? * is_token)?;
        Ok(Self { probability, action, log_probability })
    }
}

/// `ln sigmoid(x) = min(x, 0) - ln(1 + exp(-|x|))`.
fn ln_sigmoid(x: &Tensor) -> Result<Tensor> {
    let tail = (x.abs()?.neg()?.exp()? + 1.0)?.log()?;
    (x.neg()?.relu()? + tail)?.neg()
}
