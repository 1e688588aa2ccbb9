//! Rotary position embedding on a GPU: one launch. The backward pass is the same launch with negative angles.
//!
//! x of any strides and y contiguous, `[B, H, N, D]` of one dtype; cos and sin f32 `[positions, D / 2]`.

use crate::backend::gpu::kernel::Variant;
use crate::backend::gpu::params::RotaryParams;
use crate::backend::gpu::{Arch, Gpu, KernelOp, RowSizes, Slice, Tensor4, elements, launch};
use crate::error::{Error, Result};

/// A rotation whose sizes the kernels cover.
#[derive(Debug, Clone)]
pub struct RotaryPlan {
    sizes: RowSizes,
    offsets: Vec<u32>,
    variant: Variant,
}

/// The cosines and sines of all positions, f32 `[positions, D / 2]`.
#[derive(Debug, Clone, Copy)]
pub struct Angles<'a, B> {
    /// Cosines.
    pub cos: Slice<'a, B>,
    /// Sines.
    pub sin: Slice<'a, B>,
    /// The number of positions.
    pub positions: usize,
}

impl RotaryPlan {
    /// Checks the sizes, for rows at the positions `offset + n`, with one offset for all batch entries or one for each.
    ///
    /// # Errors
    /// [`Error::Unsupported`] names the value that the kernels do not cover; [`Error::Invalid`] an odd D, or offsets
    /// that are neither one nor B.
    pub fn new(sizes: &RowSizes, offsets: &[usize], arch: &Arch) -> Result<Self> {
        let variant = sizes.checked("rotary", arch)?;
        if !sizes.dim.is_multiple_of(2) || (offsets.len() != 1 && offsets.len() != sizes.batch) {
            return Err(Error::Invalid(format!(
                "rotary: rows of {} elements at {} offsets; an even number, and 1 or {} offsets expected",
                sizes.dim,
                offsets.len(),
                sizes.batch
            )));
        }
        for &offset in offsets {
            elements("positions", offset as u128 + sizes.rows as u128)?;
        }
        Ok(Self { sizes: *sizes, offsets: offsets.iter().map(|&n| n as u32).collect(), variant })
    }
}

/// Rotates `x` into `y` by the angles of its positions, or with `inverse` by their negatives, which turns dy into dx.
///
/// # Errors
/// Positions beyond the angles, tensors of 2^31 elements or more, and errors of the GPU.
pub fn rotate<G: Gpu>(
    gpu: &G,
    plan: &RotaryPlan,
    x: &Tensor4<'_, G::Buffer>,
    angles: &Angles<'_, G::Buffer>,
    inverse: bool,
    y: Slice<'_, G::Buffer>,
) -> Result<()> {
    let [batch, heads, rows, dim] = plan.sizes.dims();
    let last = plan.offsets.iter().max().map_or(0, |&offset| offset as usize) + rows;
    if last > angles.positions {
        return Err(Error::Invalid(format!(
            "rotary: {last} positions exceed the {} of the angles",
            angles.positions
        )));
    }
    let [x_batch, x_head, x_row] = x.checked("x", plan.sizes.dims())?;
    let table = match &plan.offsets[..] {
        [_] => None,
        each => Some(gpu.upload(bytemuck::cast_slice(each))?),
    };
    let params = RotaryParams {
        batch: batch as u32,
        heads: heads as u32,
        rows: rows as u32,
        pairs: dim as u32 / 2,
        x_batch,
        x_head,
        x_row,
        offset: plan.offsets[0],
        table: u32::from(table.is_some()),
        inverse: u32::from(inverse),
    };
    let table = table.as_ref().map(Slice::from);
    let buffers = vec![Some(x.data), Some(angles.cos), Some(angles.sin), table, Some(y)];
    launch(gpu, plan.variant.kernel(KernelOp::Rotary), plan.sizes.blocks(), &params, buffers)
}
