//! The moving average of the centroids of the Routing Transformer.

use candle_core::{DType, Result, Tensor};

use crate::mechanisms::indices::{matmul, one_hot, top_k_positions, unit_rows};

/// The centroids `[H, C, D]` after a step of their moving average: with every unit query and key of the batch assigned
/// to its nearest centroid (least index at a tie), `μ ← unit(decay · μ + (1 − decay) · unit(mean of its members))`. A
/// centroid without members stays. Returns the centroids and the assignment, i64 `[H, 2·B·N]`: the queries of all batch
/// entries, then their keys. Nothing has a gradient.
///
/// # Errors
/// Shapes that do not fit.
pub fn update_centroids(q: &Tensor, k: &Tensor, centroids: &Tensor, decay: f64) -> Result<(Tensor, Tensor)> {
    let points = |x: &Tensor| unit_rows(&x.detach())?.transpose(0, 1)?.flatten(1, 2);
    let (points, centroids) = (Tensor::cat(&[points(q)?, points(k)?], 1)?.contiguous()?, centroids.detach());
    let nearest = top_k_positions(&matmul(&points, &centroids.t()?)?, 1)?.squeeze(2)?;
    let assigned = one_hot(&nearest, centroids.dim(1)?, points.dtype())?;
    // The direction of the mean is that of the sum.
    let sum = matmul(&assigned.t()?, &points)?;
    let moved = unit_rows(&((&centroids * decay)? + (unit_rows(&sum)? * (1.0 - decay))?)?)?;
    let members = assigned.sum(1)?.unsqueeze(2)?.broadcast_as(centroids.shape())?;
    let centroids = members.gt(0f64)?.where_cond(&moved, &centroids)?;
    Ok((centroids, nearest.to_dtype(DType::I64)?))
}
