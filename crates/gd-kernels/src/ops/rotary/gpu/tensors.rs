//! Rotary embedding of tensors on a GPU.

use candle_core::{DType, Tensor};

use crate::backend::gpu::tensors::{TensorGpu, Vector, view};
use crate::backend::graph::attach1;
use crate::error::{Error, Result};
use crate::ops::rotary::gpu::launch::{self, Angles};

/// See [`crate::ops::rotary::rotary`].
pub(crate) fn rotate<G: TensorGpu>(
    x: &Tensor,
    [cos, sin]: [&Tensor; 2],
    offsets: &[usize],
) -> Result<Tensor> {
    let device = G::of(x.device())?;
    let (_, sizes) = view::<G::Buffer>(x)?;
    let (positions, pairs) = cos.dims2()?;
    if (positions, pairs) != sin.dims2()? || 2 * pairs != sizes.dim || x.rank() != 4 {
        return Err(Error::Invalid(format!(
            "rotary: x {:?}, cos {:?} and sin {:?}; [B, H, N, D] and [positions, D / 2] expected",
            x.dims(),
            cos.dims(),
            sin.dims()
        )));
    }
    let plan = launch::Plan::new(&sizes, offsets, &device.arch())?;
    let (cos, sin) = (Vector::new(cos, DType::F32)?, Vector::new(sin, DType::F32)?);
    let turn = move |device: &G, x: &Tensor, back: bool| -> Result<G::Buffer> {
        let [out] = device.gradients([x])?;
        let (rows, _) = view::<G::Buffer>(x)?;
        let angles = Angles { cos: cos.slice(), sin: sin.slice(), positions };
        launch::rotate(device, &plan, &rows.tensor4(), &angles, back, (&out).into())?;
        Ok(out)
    };
    let result = device.finished(turn(&device, x, false)?, x.dtype(), x.shape())?;
    Ok(attach1("rotary", x, result, move |x, dy| {
        let [dx] = device.tensors([x], [turn(&device, dy, true)?])?;
        Ok(dx)
    })?)
}
