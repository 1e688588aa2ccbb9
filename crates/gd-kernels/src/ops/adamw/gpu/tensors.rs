//! AdamW over tensors, in place.

use candle_core::{DType, Tensor};

use crate::backend::gpu::tensors::{Reading, TensorGpu, Vector};
use crate::error::{Error, Result};
use crate::ops::adamw::Updated;
use crate::ops::adamw::gpu::launch::{Operands, squares, update, verdict};
use crate::ops::adamw::update::{Limits, Parts, Step};

/// A tensor where it lies.
fn whole<B: From<Tensor>>(t: &Tensor) -> Result<Vector<B>> {
    match t.is_contiguous() {
        true => Ok(Vector::strided(t.detach())),
        false => Err(Error::Invalid(format!("adamw: {:?} of strides {:?}", t.dims(), t.stride()))),
    }
}

/// See [`crate::ops::adamw::Squares`].
pub(crate) fn sums<G: TensorGpu>(gradients: &[&Tensor], of: &Parts) -> Result<Tensor> {
    let device = G::of(gradients[0].device())?;
    let parts = device.allocate(4 * of.count())?;
    for (at, gradient) in gradients.iter().enumerate() {
        let held = Vector::<G::Buffer>::new(gradient, gradient.dtype())?;
        squares(&device, of, at, (held.slice(), gradient.dtype()), (&parts).into())?;
    }
    device.tensor(parts, DType::F32, of.count())
}

/// See [`crate::ops::adamw::Squares::verdict`].
pub(crate) fn judge<G: TensorGpu>(
    (of, parts): (&Parts, &Tensor),
    losses: &Tensor,
    limits: &Limits,
) -> Result<(Tensor, Reading)> {
    let device = G::of(parts.device())?;
    let out = device.allocate(12)?;
    let (parts, count) = (Vector::<G::Buffer>::new(parts, DType::F32)?, losses.elem_count());
    let losses = Vector::new(losses, DType::F32)?;
    verdict(&device, (of, parts.slice()), (losses.slice(), count), limits, (&out).into())?;
    let verdict = device.tensor(out, DType::F32, 3)?;
    let reading = device.reading(&verdict)?;
    Ok((verdict, reading))
}

/// See [`crate::ops::adamw::update`].
pub(crate) fn step<G: TensorGpu>(
    step: &Step,
    (now, before): (&Tensor, Option<&Tensor>),
    x: &Updated<'_>,
) -> Result<()> {
    let device = G::of(x.parameter.device())?;
    let held = |t: &Tensor| whole::<G::Buffer>(t);
    let (now, before) = (held(now)?, before.map(held).transpose()?);
    let gradient = Vector::new(x.gradient, x.parameter.dtype())?;
    let [parameter, m, v] = [held(x.parameter)?, held(x.m)?, held(x.v)?];
    let master = x.master.map(held).transpose()?;
    let operands = Operands {
        parameter: parameter.slice(),
        gradient: gradient.slice(),
        m: m.slice(),
        v: v.slice(),
        master: master.as_ref().map(Vector::slice),
    };
    let size = (x.parameter.elem_count(), x.parameter.dtype());
    update(&device, step, size, (now.slice(), before.as_ref().map(Vector::slice)), &operands)
}
