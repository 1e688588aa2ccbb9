//! SwiGLU of tensors on a GPU.

use candle_core::Tensor;

use crate::backend::gpu::tensors::{TensorGpu, view};
use crate::backend::graph::attach2;
use crate::error::Result;
use crate::ops::swiglu::gpu::launch;

/// Applies the activation to validated tensors.
pub(crate) fn swiglu<G: TensorGpu>(gate: &Tensor, up: &Tensor) -> Result<Tensor> {
    let device = G::of(gate.device())?;
    let [out] = device.gradients([gate])?;
    let plan = {
        let ((g, sizes), (u, _)) = (view::<G::Buffer>(gate)?, view::<G::Buffer>(up)?);
        let plan = launch::SwigluPlan::new(&sizes, &device.arch())?;
        launch::forward(&device, &plan, [&g.tensor4(), &u.tensor4()], (&out).into())?;
        plan
    };
    let result = device.finished(out, gate.dtype(), gate.shape())?;
    Ok(attach2("swiglu", gate, up, result, move |gate, up, dy| {
        let ((g, _), (u, _)) = (view::<G::Buffer>(gate)?, view::<G::Buffer>(up)?);
        let (dy, _) = view::<G::Buffer>(dy)?;
        let [dgate, dup] = device.gradients([gate, up])?;
        let (inputs, out) = ([&g.tensor4(), &u.tensor4()], [(&dgate).into(), (&dup).into()]);
        launch::backward(&device, &plan, inputs, &dy.tensor4(), out)?;
        device.tensors([gate, up], [dgate, dup])
    })?)
}
