//! Cross entropy of rows of logits on a GPU, in nats: one launch each for the forward and the backward pass, with a
//! block for every row.
//!
//! logits and their gradient `[B, H, N, V]` of one dtype, the gradient contiguous; for every row in order a target
//! (u32), a loss, its logsumexp, and the gradient of the loss (f32). The target
//! [`IGNORE`](crate::cross_entropy::IGNORE) marks a row that does not count.

use crate::backend::gpu::kernel::Variant;
use crate::backend::gpu::params::CrossEntropyParams;
use crate::backend::gpu::{Arch, Gpu, KernelOp, RowSizes, Slice, Tensor4, launch};
use crate::error::Result;

/// A loss whose sizes the kernels cover.
#[derive(Debug, Clone)]
pub struct CrossEntropyPlan {
    sizes: RowSizes,
    variant: Variant,
}

impl CrossEntropyPlan {
    /// Checks the sizes, of which `dim` is the size of the vocabulary.
    ///
    /// # Errors
    /// [`crate::Error::Unsupported`] names the value that the kernels do not cover.
    pub fn new(sizes: &RowSizes, arch: &Arch) -> Result<Self> {
        Ok(Self { sizes: *sizes, variant: sizes.checked("cross_entropy", arch)? })
    }

    fn params<B>(&self, logits: &Tensor4<'_, B>) -> Result<CrossEntropyParams> {
        let [_, heads, rows, vocab] = self.sizes.dims();
        let [x_batch, x_head, x_row] = logits.checked("logits", self.sizes.dims())?;
        Ok(CrossEntropyParams {
            heads: heads as u32,
            rows: rows as u32,
            vocab: vocab as u32,
            x_batch,
            x_head,
            x_row,
        })
    }
}

/// Computes the losses and logsumexps from logits and targets.
///
/// # Errors
/// Tensors of 2^31 elements or more, and errors of the GPU.
pub fn forward<G: Gpu>(
    gpu: &G,
    plan: &CrossEntropyPlan,
    logits: &Tensor4<'_, G::Buffer>,
    targets: Slice<'_, G::Buffer>,
    [losses, log_sums]: [Slice<'_, G::Buffer>; 2],
) -> Result<()> {
    let buffers = [logits.data, targets, losses, log_sums].map(Some).to_vec();
    let kernel = plan.variant.kernel(KernelOp::CrossEntropyForward);
    launch(gpu, kernel, plan.sizes.count(), &plan.params(logits)?, buffers)
}

/// Computes the gradient of the logits from that of the losses.
///
/// # Errors
/// As [`forward`].
pub fn backward<G: Gpu>(
    gpu: &G,
    plan: &CrossEntropyPlan,
    logits: &Tensor4<'_, G::Buffer>,
    [targets, log_sums, dlosses]: [Slice<'_, G::Buffer>; 3],
    dlogits: Slice<'_, G::Buffer>,
) -> Result<()> {
    let buffers = [logits.data, targets, log_sums, dlosses, dlogits].map(Some).to_vec();
    let kernel = plan.variant.kernel(KernelOp::CrossEntropyBackward);
    launch(gpu, kernel, plan.sizes.count(), &plan.params(logits)?, buffers)
}
