//! Cross entropy over tensors.

use candle_core::{DType, Tensor};

use crate::backend::gpu::tensors::{TensorGpu, Vector, view};
use crate::backend::graph::attach1;
use crate::error::{Error, Result};
use crate::ops::cross_entropy::gpu::launch::{Plan, backward, forward};

/// What the backward pass needs beside the logits.
struct Pass<G: TensorGpu> {
    device: G,
    plan: Plan,
    targets: Vector<G::Buffer>,
    log_sums: G::Buffer,
}

impl<G: TensorGpu> Pass<G> {
    /// The losses of all rows, f32, beside it.
    fn new(logits: &Tensor, targets: &Tensor) -> Result<(Self, G::Buffer)> {
        let fits = matches!((logits.dims(), targets.dims()), ([r, _], [t]) if r == t);
        if !fits || targets.dtype() != DType::U32 {
            return Err(Error::Invalid(format!(
                "cross_entropy: logits {:?} and targets {:?} {:?}; [rows, V] and u32 [rows] expected",
                logits.dims(),
                targets.dims(),
                targets.dtype()
            )));
        }
        let device = G::of(logits.device())?;
        let (rows, sizes) = view::<G::Buffer>(logits)?;
        let plan = Plan::new(&sizes, &device.arch())?;
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

/// See [`crate::ops::cross_entropy::cross_entropy`].
pub(crate) fn losses<G: TensorGpu>(logits: &Tensor, targets: &Tensor) -> Result<Tensor> {
    let (pass, losses) = Pass::<G>::new(logits, targets)?;
    let result = pass.device.finished(losses, DType::F32, logits.dims()[0])?;
    let backward = move |logits: &Tensor, dlosses: &Tensor| Ok(pass.gradient(logits, dlosses)?);
    Ok(attach1("cross_entropy", logits, result, backward)?)
}

/// See [`crate::ops::cross_entropy::cross_entropy_and_gradient`].
pub(crate) fn losses_and_gradient<G: TensorGpu>(
    logits: &Tensor,
    targets: &Tensor,
    weights: &Tensor,
) -> Result<(Tensor, Tensor)> {
    let (pass, losses) = Pass::<G>::new(logits, targets)?;
    let rows = logits.dims()[0];
    if weights.dims() != [rows] {
        let dims = weights.dims();
        return Err(Error::Invalid(format!("cross_entropy: weights {dims:?} of {rows} rows")));
    }
    let gradient = pass.gradient(logits, weights)?;
    Ok((pass.device.tensor(losses, DType::F32, rows)?, gradient))
}
