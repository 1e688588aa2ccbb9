//! Root-mean-square normalisation on a GPU: `y = x r w` with `r = 1 / sqrt(mean(x^2) + eps)`.
//!
//! x, y and their gradients `[B, H, N, C]`, weight `[C]`, all of one dtype; outputs and weight are contiguous. The
//! forward pass is one launch; the backward pass is one for dx and the partial sums of dweight of each block of rows,
//! and one that adds these up in order.

use crate::backend::gpu::kernel::Variant;
use crate::backend::gpu::params::{NORM_MAX_BLOCK_ROWS, RmsNormParams};
use crate::backend::gpu::{Arch, Gpu, KernelOp, RowSizes, Slice, THREADS, Tensor4, launch};
use crate::error::Result;

/// Approximate number of elements of a block of the backward pass. 8192 rows of 768 elements make about 400 blocks.
const BLOCK_ELEMENTS: usize = 1 << 14;
/// Minimum number of rows of a block of the backward pass.
const MIN_BLOCK_ROWS: usize = 8;

/// A normalisation whose sizes the kernels cover.
#[derive(Debug, Clone)]
pub struct NormPlan {
    sizes: RowSizes,
    eps: f32,
    variant: Variant,
}

impl NormPlan {
    /// Checks the sizes.
    ///
    /// # Errors
    /// [`crate::Error::Unsupported`] names the value that the kernels do not cover.
    pub fn new(sizes: &RowSizes, eps: f64, arch: &Arch) -> Result<Self> {
        let variant = sizes.checked("rms_norm", arch)?;
        Ok(Self { sizes: *sizes, eps: eps as f32, variant })
    }

    /// Rows of a block of the backward pass.
    fn block_rows(&self) -> usize {
        (BLOCK_ELEMENTS / self.sizes.dim).clamp(MIN_BLOCK_ROWS, NORM_MAX_BLOCK_ROWS as usize)
    }

    /// The number of blocks of the backward pass, and of the partial sums of dweight that each of them writes.
    fn parts(&self) -> (usize, usize) {
        let tiles = self.sizes.dim.div_ceil(32);
        (self.sizes.count().div_ceil(self.block_rows()), (THREADS / 32 / tiles).max(1))
    }

    fn params<B>(&self, x: &Tensor4<'_, B>, dy: Option<&Tensor4<'_, B>>) -> Result<RmsNormParams> {
        let [batch, heads, rows, dim] = self.sizes.dims();
        let [x_batch, x_head, x_row] = x.checked("x", self.sizes.dims())?;
        let d = dy.map(|dy| dy.checked("dy", self.sizes.dims())).transpose()?;
        let [d_batch, d_head, d_row] = d.unwrap_or_default();
        let (blocks, each) = self.parts();
        Ok(RmsNormParams {
            batch: batch as u32,
            heads: heads as u32,
            rows: rows as u32,
            dim: dim as u32,
            x_batch,
            x_head,
            x_row,
            d_batch,
            d_head,
            d_row,
            block_rows: self.block_rows() as u32,
            partials: (blocks * each) as u32,
            eps: self.eps,
        })
    }
}

/// Computes y from x and weight.
///
/// # Errors
/// Tensors of 2^31 elements or more, and errors of the GPU.
pub fn forward<G: Gpu>(
    gpu: &G,
    plan: &NormPlan,
    x: &Tensor4<'_, G::Buffer>,
    weight: Slice<'_, G::Buffer>,
    y: Slice<'_, G::Buffer>,
) -> Result<()> {
    let buffers = vec![Some(x.data), Some(weight), Some(y)];
    launch(
        gpu,
        plan.variant.kernel(KernelOp::RmsNormForward),
        plan.sizes.blocks(),
        &plan.params(x, None)?,
        buffers,
    )
}

/// Computes dx `[B, H, N, C]` and dweight `[C]` from dy.
///
/// # Errors
/// As [`forward`].
pub fn backward<G: Gpu>(
    gpu: &G,
    plan: &NormPlan,
    x: &Tensor4<'_, G::Buffer>,
    weight: Slice<'_, G::Buffer>,
    dy: &Tensor4<'_, G::Buffer>,
    [dx, dweight]: [Slice<'_, G::Buffer>; 2],
) -> Result<()> {
    let params = plan.params(x, Some(dy))?;
    let dim = plan.sizes.dim;
    let parts = gpu.allocate(params.partials as usize * dim * 4)?;
    let buffers = [x.data, weight, dy.data, dx, (&parts).into()].map(Some).to_vec();
    launch(gpu, plan.variant.kernel(KernelOp::RmsNormBackward), plan.parts().0, &params, buffers)?;
    let buffers = vec![Some((&parts).into()), Some(dweight)];
    launch(gpu, plan.variant.kernel(KernelOp::RmsNormWeightGradient), dim.div_ceil(32), &params, buffers)
}
