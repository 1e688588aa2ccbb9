//! The gated activation `silu(gate) * up` on a GPU, one launch each way.
//!
//! gate, up, their gradients and y `[B, H, N, C]` of one dtype; outputs are contiguous.

use crate::backend::gpu::kernel::Variant;
use crate::backend::gpu::params::SwigluParams;
use crate::backend::gpu::{Arch, Gpu, KernelOp, RowSizes, Slice, Tensor4, launch};
use crate::error::Result;

/// An activation whose sizes the kernels cover.
#[derive(Debug, Clone)]
pub struct SwigluPlan {
    sizes: RowSizes,
    variant: Variant,
}

impl SwigluPlan {
    /// Checks the sizes.
    ///
    /// # Errors
    /// [`crate::Error::Unsupported`] names the value that the kernels do not cover.
    pub fn new(sizes: &RowSizes, arch: &Arch) -> Result<Self> {
        Ok(Self { sizes: *sizes, variant: sizes.checked("swiglu", arch)? })
    }

    fn params<B>(
        &self,
        [gate, up]: [&Tensor4<'_, B>; 2],
        dy: Option<&Tensor4<'_, B>>,
    ) -> Result<SwigluParams> {
        let [batch, heads, rows, dim] = self.sizes.dims();
        let [g_batch, g_head, g_row] = gate.checked("gate", self.sizes.dims())?;
        let [u_batch, u_head, u_row] = up.checked("up", self.sizes.dims())?;
        let d = dy.map(|dy| dy.checked("dy", self.sizes.dims())).transpose()?;
        let [d_batch, d_head, d_row] = d.unwrap_or_default();
        Ok(SwigluParams {
            batch: batch as u32,
            heads: heads as u32,
            rows: rows as u32,
            dim: dim as u32,
            g_batch,
            g_head,
            g_row,
            u_batch,
            u_head,
            u_row,
            d_batch,
            d_head,
            d_row,
        })
    }
}

/// Computes y from gate and up.
///
/// # Errors
/// Tensors of 2^31 elements or more, and errors of the GPU.
pub fn forward<G: Gpu>(
    gpu: &G,
    plan: &SwigluPlan,
    inputs: [&Tensor4<'_, G::Buffer>; 2],
    y: Slice<'_, G::Buffer>,
) -> Result<()> {
    let buffers = vec![Some(inputs[0].data), Some(inputs[1].data), Some(y)];
    let params = plan.params(inputs, None)?;
    launch(gpu, plan.variant.kernel(KernelOp::SwigluForward), plan.sizes.blocks(), &params, buffers)
}

/// Computes the gradients of gate and up from dy.
///
/// # Errors
/// As [`forward`].
pub fn backward<G: Gpu>(
    gpu: &G,
    plan: &SwigluPlan,
    inputs: [&Tensor4<'_, G::Buffer>; 2],
    dy: &Tensor4<'_, G::Buffer>,
    [dgate, dup]: [Slice<'_, G::Buffer>; 2],
) -> Result<()> {
    let buffers = [inputs[0].data, inputs[1].data, dy.data, dgate, dup].map(Some).to_vec();
    let params = plan.params(inputs, Some(dy))?;
    launch(gpu, plan.variant.kernel(KernelOp::SwigluBackward), plan.sizes.blocks(), &params, buffers)
}
