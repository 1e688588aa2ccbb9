//! What a warp does with a row: normalisation, rotary embedding, gated activation.

use candle_core::{DType, Tensor};

use super::{Rows, TensorGpu, Vector};
use crate::error::{Error, Result};
use crate::fused::{attach1, attach2, with_contiguous_rows};
use crate::gpu::rotary::Angles;
use crate::gpu::{RowSizes, norm, rotary, swiglu};

/// A tensor of any rank from 1 on, as the kernels read it.
pub(super) fn view<B: From<Tensor>>(t: &Tensor) -> Result<(Rows<B>, RowSizes)> {
    let mut t = with_contiguous_rows(&t.detach())?;
    if t.rank() > 4 {
        t = t.flatten(0, t.rank() - 4)?;
    }
    while t.rank() < 4 {
        t = t.unsqueeze(0)?;
    }
    let (batch, heads, rows, dim) = t.dims4()?;
    Ok((Rows::new(&t)?, RowSizes { batch, heads, rows, dim, dtype: t.dtype() }))
}

/// See [`crate::on_device::rms_norm`].
pub(crate) fn rms_norm<G: TensorGpu>(x: &Tensor, weight: &Tensor, eps: f64) -> Result<Tensor> {
    let device = G::of(x.device())?;
    let dtype: DType = x.dtype();
    let [out] = device.gradients([x])?;
    let plan = {
        let (rows, sizes) = view::<G::Buffer>(x)?;
        let plan = norm::Plan::new(&sizes, eps, &device.arch())?;
        let weight = Vector::new(weight, dtype)?;
        norm::forward(&device, &plan, &rows.tensor4(), weight.slice(), (&out).into())?;
        plan
    };
    let result = device.finished(out, dtype, x.shape())?;
    Ok(attach2("rms_norm", x, weight, result, move |x, weight, dy| {
        let ((rows, _), (dy, _)) = (view::<G::Buffer>(x)?, view::<G::Buffer>(dy)?);
        let taps = Vector::new(weight, dtype)?;
        let [dx, dw] = device.gradients([x, weight])?;
        let out = [(&dx).into(), (&dw).into()];
        norm::backward(&device, &plan, &rows.tensor4(), taps.slice(), &dy.tensor4(), out)?;
        device.tensors([x, weight], [dx, dw])
    })?)
}

/// See [`crate::on_device::rotary`].
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
    let plan = rotary::Plan::new(&sizes, offsets, &device.arch())?;
    let (cos, sin) = (Vector::new(cos, DType::F32)?, Vector::new(sin, DType::F32)?);
    let turn = move |device: &G, x: &Tensor, back: bool| -> Result<G::Buffer> {
        let [out] = device.gradients([x])?;
        let (rows, _) = view::<G::Buffer>(x)?;
        let angles = Angles { cos: cos.slice(), sin: sin.slice(), positions };
        rotary::rotate(device, &plan, &rows.tensor4(), &angles, back, (&out).into())?;
        Ok(out)
    };
    let result = device.finished(turn(&device, x, false)?, x.dtype(), x.shape())?;
    Ok(attach1("rotary", x, result, move |x, dy| {
        let [dx] = device.tensors([x], [turn(&device, dy, true)?])?;
        Ok(dx)
    })?)
}

/// See [`crate::on_device::swiglu`].
pub(crate) fn gated<G: TensorGpu>(gate: &Tensor, up: &Tensor) -> Result<Tensor> {
    let device = G::of(gate.device())?;
    let [out] = device.gradients([gate])?;
    let plan = {
        let ((g, sizes), (u, _)) = (view::<G::Buffer>(gate)?, view::<G::Buffer>(up)?);
        let plan = swiglu::Plan::new(&sizes, &device.arch())?;
        swiglu::forward(&device, &plan, [&g.tensor4(), &u.tensor4()], (&out).into())?;
        plan
    };
    let result = device.finished(out, gate.dtype(), gate.shape())?;
    Ok(attach2("swiglu", gate, up, result, move |gate, up, dy| {
        let ((g, _), (u, _)) = (view::<G::Buffer>(gate)?, view::<G::Buffer>(up)?);
        let (dy, _) = view::<G::Buffer>(dy)?;
        let [dgate, dup] = device.gradients([gate, up])?;
        let (inputs, out) = ([&g.tensor4(), &u.tensor4()], [(&dgate).into(), (&dup).into()]);
        swiglu::backward(&device, &plan, inputs, &dy.tensor4(), out)?;
        device.tensors([gate, up], [dgate, dup])
    })?)
}
