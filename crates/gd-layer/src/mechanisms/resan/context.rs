//! What a token reads from the tokens on its side.

use candle_core::{D, Result, Tensor};

use super::Direction;
use crate::mechanisms::indices::{arange, project, visible_softmax};
use crate::mechanisms::inputs::Inputs;

impl Direction {
    /// Which tokens j each token i may read: u8 `[B, N, N]`.
    pub(super) fn side(self, n: usize, valid: &Tensor) -> Result<Tensor> {
        let at = arange(n, valid.device())?;
        let (i, j) = (at.unsqueeze(1)?, at.unsqueeze(0)?);
        let side = match self {
            Self::Forward => j.broadcast_lt(&i)?,
            Self::Backward => j.broadcast_gt(&i)?,
        };
        side.unsqueeze(0)?.broadcast_mul(&valid.unsqueeze(1)?)
    }
}

/// The sum of r `[B, N, F]` over the tokens that each token sees (u8 `[B, N, N]`), weighted per feature.
pub(super) fn weighted(r: &Tensor, visible: &Tensor, inputs: &Inputs, bound: f64) -> Result<Tensor> {
    // Read tokens stand in the last dimension: [B, 1, F, N] and [B, N, F, 1].
    let dependent = project(r, inputs.get("Wd")?)?.t()?.contiguous()?.unsqueeze(1)?;
    let head = project(r, inputs.get("Wh")?)?.broadcast_add(inputs.get("bl")?)?.unsqueeze(3)?;
    let logits = ((dependent.broadcast_add(&head)? / bound)?.tanh()? * bound)?;
    let weights = visible_softmax(&logits, &visible.unsqueeze(2)?)?;
    weights.broadcast_mul(&r.t()?.contiguous()?.unsqueeze(1)?)?.sum(D::Minus1)
}
