//! The buckets of the Reformer and the order that they define.

use candle_core::{D, Result, Tensor};

use crate::mechanisms::indices::{arange, matmul};

/// The bucket of every row of x `[B, H, N, D]` under a rotation `[D, buckets / 2]`: u32 `[B, H, N]`.
pub(super) fn bucket(x: &Tensor, rotation: &Tensor) -> Result<Tensor> {
    let rotated = matmul(&x.detach(), &rotation.detach())?;
    Tensor::cat(&[&rotated, &rotated.neg()?], D::Minus1)?.argmax(D::Minus1)
}

/// The positions in the order of (bucket, position): u32 `[B, H, N]`.
pub(super) fn sorted_order(bucket: &Tensor) -> Result<Tensor> {
    let n = bucket.dim(D::Minus1)?;
    // Numbers that differ, since sorting is not stable on every device.
    let first = bucket.broadcast_mul(&Tensor::new(n as u32, bucket.device())?)?;
    first.broadcast_add(&arange(n, bucket.device())?)?.contiguous()?.arg_sort_last_dim(true)
}
