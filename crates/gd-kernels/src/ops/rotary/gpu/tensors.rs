//! Rotary embedding of tensors on a GPU.

use candle_core::{DType, Tensor};

use crate::backend::gpu::tensors::{TensorGpu, Vector, view};
use crate::backend::graph::attach1;
use crate::error::Result;
use crate::ops::rotary::gpu::launch::{self, Angles};

/// Rotates validated tensors.
pub(crate) fn rotary<G: TensorGpu>(
    x: &Tensor,
    [cos, sin]: [&Tensor; 2],
    offsets: &[usize],
) -> Result<Tensor> {
    let device = G::of(x.device())?;
    let (_, sizes) = view::<G::Buffer>(x)?;
    let positions = cos.dim(0)?;
    let plan = launch::RotaryPlan::new(&sizes, offsets, &device.arch())?;
    let (cos, sin) = (Vector::new(cos, DType::F32)?, Vector::new(sin, DType::F32)?);
    let rotate = move |device: &G, x: &Tensor, inverse: bool| -> Result<G::Buffer> {
        let [out] = device.gradients([x])?;
        let (rows, _) = view::<G::Buffer>(x)?;
        let angles = Angles { cos: cos.slice(), sin: sin.slice(), positions };
        launch::rotate(device, &plan, &rows.tensor4(), &angles, inverse, (&out).into())?;
        Ok(out)
    };
    let result = device.finished(rotate(&device, x, false)?, x.dtype(), x.shape())?;
    Ok(attach1("rotary", x, result, move |x, _, dy| {
        let [dx] = device.tensors([x], [rotate(&device, dy, true)?])?;
        Ok(dx)
    })?)
}
