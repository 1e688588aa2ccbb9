//! Scores by dot products and sums of values, with grouped-query attention: query head h uses key-value head
//! h div (H / Hk).

use candle_core::{D, Result, Tensor};

use super::stages::{Aggregate, Run, Score};

/// `a` `[B, H, N, X]` times `b` `[B, Hk, X, Y]`: `[B, H, N, Y]`, each head with its key-value head.
pub(super) fn grouped_matmul(a: &Tensor, b: &Tensor) -> Result<Tensor> {
    let ((batch, h, n, x), (_, hk, _, y)) = (a.dims4()?, b.dims4()?);
    if hk == 0 || h % hk != 0 {
        candle_core::bail!("{h} query heads do not divide into {hk} key-value heads");
    }
    // The heads of a group are rows of one product.
    let a = a.contiguous()?.reshape((batch, hk, h / hk * n, x))?;
    a.matmul(&b.contiguous()?)?.reshape((batch, h, n, y))
}

/// `q k^T / sqrt(D)` of queries `[B, H, N, D]` and keys `[B, Hk, M, D]`: `[B, H, N, M]`. The scale is applied after the
/// product, so that equal dot products stay equal.
pub(super) fn scaled_dot(q: &Tensor, k: &Tensor) -> Result<Tensor> {
    dot(q, k)? * (q.dim(D::Minus1)? as f64).sqrt().recip()
}

/// The dot products of queries `[B, H, N, D]` and keys `[B, Hk, M, D]`: `[B, H, N, M]`.
pub(super) fn dot(q: &Tensor, k: &Tensor) -> Result<Tensor> {
    if q.dim(D::Minus1)? != k.dim(D::Minus1)? {
        candle_core::bail!("q {:?} and k {:?} differ in their last dimension", q.dims(), k.dims());
    }
    grouped_matmul(q, &k.transpose(2, 3)?)
}

/// `q k^T / sqrt(D)`.
pub(super) struct ScaledDot;

impl Score for ScaledDot {
    fn name(&self) -> &'static str {
        "scaled dot"
    }

    fn score(&self, run: &mut Run) -> Result<Tensor> {
        scaled_dot(run.inputs.get("q")?, run.inputs.get("k")?)
    }
}

/// The weighted sum of the value rows.
pub(super) struct Values;

impl Aggregate for Values {
    fn name(&self) -> &'static str {
        "values"
    }

    fn aggregate(&self, weights: &Tensor, run: &mut Run) -> Result<Tensor> {
        grouped_matmul(weights, run.inputs.get("v")?)
    }
}
