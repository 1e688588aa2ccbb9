//! The state of linear attention.

use candle_core::{Result, Tensor};

use crate::mechanisms::indices::matmul;

/// What linear attention remembers of keys and values.
#[derive(Debug, Clone)]
pub struct LinearAttentionState {
    /// `Σ_j φ(k_j) v_jᵀ`, `[B, Hk, D, Dv]`.
    pub outer: Tensor,
    /// `Σ_j φ(k_j)`, `[B, Hk, D, 1]`.
    pub normaliser: Tensor,
}

impl LinearAttentionState {
    /// The state before the first key of k `[B, Hk, M, D]` and v `[B, Hk, M, Dv]`.
    ///
    /// # Errors
    /// Tensors of another rank.
    pub fn empty(k: &Tensor, v: &Tensor) -> Result<Self> {
        let (b, hk, _, d) = k.dims4()?;
        let zeros = |width: usize| Tensor::zeros((b, hk, d, width), k.dtype(), k.device());
        Ok(Self { outer: zeros(v.dim(3)?)?, normaliser: zeros(1)? })
    }

    /// The state, or 0 in the batch entries in which `keeps` `[B|1, 1, 1, 1]` is 0.
    pub(super) fn masked(&self, keeps: &Tensor) -> Result<Self> {
        Ok(Self {
            outer: self.outer.broadcast_mul(keeps)?,
            normaliser: self.normaliser.broadcast_mul(keeps)?,
        })
    }

    /// The state with further keys, given as features φ(k) `[B, Hk, M, D]`, and values `[B, Hk, M, Dv]`.
    pub(super) fn with(&self, features: &Tensor, v: &Tensor) -> Result<Self> {
        let t = features.t()?;
        Ok(Self {
            outer: (&self.outer + matmul(&t, v)?)?,
            normaliser: (&self.normaliser + t.sum_keepdim(3)?)?,
        })
    }
}
