//! Cross entropy of tensors on a GPU.

use candle_core::{DType, Tensor};

use crate::backend::gpu::tensors::{TensorGpu, Vector, view};
use crate::backend::graph::attach1;
use crate::error::Result;
use crate::ops::cross_entropy::gpu::launch::{CrossEntropyPlan, backward, forward};

/// A forward pass: the tensors that the backward pass reads besides the logits.
struct ForwardPass<G: TensorGpu> {
    device: G,
    plan: CrossEntropyPlan,
    targets: Vector<G::Buffer>,
    log_sums: G::Buffer,
}

impl<G: TensorGpu> ForwardPass<G> {
    /// The pass, and the losses of all rows, f32.
    fn new(logits: &Tensor, targets: &Tensor) -> Result<(Self, G::Buffer)> {
        let device = G::of(logits.device())?;
        let (rows, sizes) = view::<G::Buffer>(logits)?;
        let plan = CrossEntropyPlan::new(&sizes, &device.arch())?;
        let targets = Vector::new(targets, DType::U32)?;
        let (losses, log_sums) = (device.allocate(4 * sizes.rows)?, device.allocate(4 * sizes.rows)?);
        let out = [(&losses).into(), (&log_sums).into()];
        forward(&device, &plan, &rows.tensor4(), targets.slice(), out)?;
        Ok((Self { device, plan, targets, log_sums }, losses))
    }

    /// The gradient of the logits from that of the losses.
    fn gradient(&self, logits: &Tensor, dlosses: &Tensor) -> Result<Tensor> {
        let Self { device, plan, targets, log_sums } = self;
        let (rows, _) = view::<G::Buffer>(logits)?;
        let dlosses = Vector::new(dlosses, DType::F32)?;
        let [out] = device.gradients([logits])?;
        let operands = [targets.slice(), log_sums.into(), dlosses.slice()];
        backward(device, plan, &rows.tensor4(), operands, (&out).into())?;
        device.tensor(out, logits.dtype(), logits.shape())
    }
}

/// The losses f32 `[rows]` of validated logits `[rows, V]` and targets u32 `[rows]`. The target
/// [`IGNORE`](crate::ops::cross_entropy::IGNORE) has the loss 0; another target that is no column has probability 0 and
/// the loss +inf.
pub(crate) fn losses<G: TensorGpu>(logits: &Tensor, targets: &Tensor) -> Result<Tensor> {
    let (pass, losses) = ForwardPass::<G>::new(logits, targets)?;
    let result = pass.device.finished(losses, DType::F32, logits.dims()[0])?;
    let backward = move |logits: &Tensor, _: &Tensor, dlosses: &Tensor| Ok(pass.gradient(logits, dlosses)?);
    Ok(attach1("cross_entropy", logits, result, backward)?)
}

/// The same losses, and the gradient for the logits of their sum weighted by `weights` f32 `[rows]`; both without a
/// graph.
pub(crate) fn losses_and_gradient<G: TensorGpu>(
    logits: &Tensor,
    targets: &Tensor,
    weights: &Tensor,
) -> Result<(Tensor, Tensor)> {
    let (pass, losses) = ForwardPass::<G>::new(logits, targets)?;
    let rows = logits.dims()[0];
    let gradient = pass.gradient(logits, weights)?;
    Ok((pass.device.tensor(losses, DType::F32, rows)?, gradient))
}
