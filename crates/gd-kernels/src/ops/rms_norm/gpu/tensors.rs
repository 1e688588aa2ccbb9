//! RMS normalisation of tensors on a GPU.

use candle_core::{DType, Tensor};

use crate::backend::gpu::tensors::{TensorGpu, Vector, view};
use crate::backend::graph::attach2;
use crate::error::Result;
use crate::ops::rms_norm::gpu::launch;

/// Normalises validated tensors.
pub(crate) fn rms_norm<G: TensorGpu>(x: &Tensor, weight: &Tensor, eps: f64) -> Result<Tensor> {
    let device = G::of(x.device())?;
    let dtype: DType = x.dtype();
    let [out] = device.gradients([x])?;
    let plan = {
        let (rows, sizes) = view::<G::Buffer>(x)?;
        let plan = launch::NormPlan::new(&sizes, eps, &device.arch())?;
        let weight = Vector::new(weight, dtype)?;
        launch::forward(&device, &plan, &rows.tensor4(), weight.slice(), (&out).into())?;
        plan
    };
    let result = device.finished(out, dtype, x.shape())?;
    Ok(attach2("rms_norm", x, weight, result, move |x, weight, dy| {
        let ((rows, _), (dy, _)) = (view::<G::Buffer>(x)?, view::<G::Buffer>(dy)?);
        let weight_values = Vector::new(weight, dtype)?;
        let [dx, dw] = device.gradients([x, weight])?;
        let out = [(&dx).into(), (&dw).into()];
        launch::backward(&device, &plan, &rows.tensor4(), weight_values.slice(), &dy.tensor4(), out)?;
        device.tensors([x, weight], [dx, dw])
    })?)
}
