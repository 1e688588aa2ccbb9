//! AdamW over tensors on a GPU, in place.

use candle_core::{DType, Tensor};

use super::launch::{self, Operands, PartialSums};
use crate::backend::gpu::tensors::{PendingDownload, TensorGpu, Vector};
use crate::error::{Error, Result};
use crate::ops::adamw::{Limits, Step};

/// A contiguous tensor without a copy; another one is refused, since the update would change a copy of it.
fn contiguous<B: From<Tensor>>(t: &Tensor) -> Result<Vector<B>> {
    match t.is_contiguous() {
        true => Ok(Vector::strided(t.detach())),
        false => Err(Error::Invalid(format!(
            "adamw: a tensor {:?} of strides {:?} is not contiguous",
            t.dims(),
            t.stride()
        ))),
    }
}

/// The partial sums of squares of gradients, f32.
pub(crate) fn squares<G: TensorGpu>(gradients: &[&Tensor], layout: &PartialSums) -> Result<Tensor> {
    let device = G::of(gradients[0].device())?;
    let sums = device.allocate(4 * layout.count())?;
    for (at, gradient) in gradients.iter().enumerate() {
        let values = Vector::<G::Buffer>::new(gradient, gradient.dtype())?;
        launch::squares(&device, layout, at, (values.slice(), gradient.dtype()), (&sums).into())?;
    }
    device.tensor(sums, DType::F32, layout.count())
}

/// The verdict f32 `[3]` of sums and losses, and its copy to the host.
pub(crate) fn verdict<G: TensorGpu>(
    (layout, sums): (&PartialSums, &Tensor),
    losses: &Tensor,
    limits: &Limits,
) -> Result<(Tensor, PendingDownload)> {
    let device = G::of(sums.device())?;
    let out = device.allocate(12)?;
    let (sums, count) = (Vector::<G::Buffer>::new(sums, DType::F32)?, losses.elem_count());
    let losses = Vector::new(losses, DType::F32)?;
    launch::verdict(&device, (layout, sums.slice()), (losses.slice(), count), limits, (&out).into())?;
    let verdict = device.tensor(out, DType::F32, 3)?;
    let download = device.start_download(&verdict)?;
    Ok((verdict, download))
}

/// A parameter, its gradient and its state, of one shape.
pub(crate) struct Tensors<'a> {
    /// The parameter, contiguous.
    pub(crate) parameter: &'a Tensor,
    /// The gradient, in the dtype of the parameter.
    pub(crate) gradient: &'a Tensor,
    /// First moment, f32.
    pub(crate) m: &'a Tensor,
    /// Second moment, f32.
    pub(crate) v: &'a Tensor,
    /// The master weight of an f16 or bf16 parameter, f32.
    pub(crate) master: Option<&'a Tensor>,
}

/// Updates a parameter in one launch, by the factor of the verdict; see [`crate::adamw::Scale::of_verdict`].
pub(crate) fn update<G: TensorGpu>(
    step: &Step,
    (verdict, previous): (&Tensor, Option<&Tensor>),
    x: &Tensors<'_>,
) -> Result<()> {
    let device = G::of(x.parameter.device())?;
    let vector = |t: &Tensor| contiguous::<G::Buffer>(t);
    let (verdict, previous) = (vector(verdict)?, previous.map(vector).transpose()?);
    let gradient = Vector::new(x.gradient, x.parameter.dtype())?;
    let [parameter, m, v] = [vector(x.parameter)?, vector(x.m)?, vector(x.v)?];
    let master = x.master.map(vector).transpose()?;
    let operands = Operands {
        parameter: parameter.slice(),
        gradient: gradient.slice(),
        m: m.slice(),
        v: v.slice(),
        master: master.as_ref().map(Vector::slice),
    };
    let size = (x.parameter.elem_count(), x.parameter.dtype());
    let verdicts = (verdict.slice(), previous.as_ref().map(Vector::slice));
    launch::update(&device, step, size, verdicts, &operands)
}
