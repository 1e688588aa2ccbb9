//! AdamW on a GPU, clipped by a norm that the host need not know: see [`crate::ops::adamw::gpu::launch`].
//!
//! [`Squares`] of all gradients give a verdict, f32 `[3]`: loss, norm, and the factor of the gradients, which is not
//! finite where the update is to be skipped. [`update`] moves a parameter as the verdict says. Nothing here waits for
//! the device but [`Squares::not_finite`].

#[cfg(feature = "gpu")]
pub(crate) mod gpu;
pub mod update;

use candle_core::Tensor;

use crate::backend::dispatch::{on_gpu, refused};
use crate::error::{Error, Result};
use crate::ops::adamw::update::Parts;
pub use crate::ops::adamw::update::{Limits, Step, Verdict};

/// Sums of squares of gradients.
#[derive(Debug, Clone)]
pub struct Squares {
    of: Parts,
    parts: Tensor,
}

impl Squares {
    /// Of all these gradients on one GPU, in f32, f16 or bf16; at least one.
    ///
    /// # Errors
    /// No gradient, a gradient on the CPU, or of another dtype.
    pub fn new(gradients: &[&Tensor]) -> Result<Self> {
        let Some(first) = gradients.first() else {
            return Err(Error::Invalid("the norm of no gradient".into()));
        };
        let of = Parts::new(gradients.iter().map(|t| t.elem_count()).collect())?;
        let parts = sums(first, gradients, &of)?;
        Ok(Self { of, parts })
    }

    /// What they and the sum of `losses` say about an update.
    ///
    /// # Errors
    /// A weight or a norm to clip to that is not above 0.
    #[allow(unused_variables)] // without a GPU in this build
    pub fn verdict(&self, losses: &Tensor, limits: &Limits) -> Result<Judged> {
        on_gpu!(self.parts.device(), G => {
            let judged = crate::ops::adamw::gpu::tensors::judge::<G>((&self.of, &self.parts), losses, limits);
            judged.map(|(verdict, reading)| Judged { verdict, reading })
        });
        refused("clipping", losses)
    }

    /// The number of the first gradient that is not finite. Waits for the device.
    ///
    /// # Errors
    /// What the device reports.
    pub fn not_finite(&self) -> Result<Option<usize>> {
        Ok(self.of.not_finite(&self.parts.to_vec1()?))
    }
}

/// A verdict on its way to the host.
pub struct Judged {
    verdict: Tensor,
    reading: Box<dyn FnOnce() -> Result<Vec<f32>> + Send>,
}

impl Judged {
    /// The verdict on the device.
    pub fn tensor(&self) -> &Tensor {
        &self.verdict
    }

    /// Waits for the verdict; on CUDA not for anything that was launched after it.
    ///
    /// # Errors
    /// What the device reports.
    pub fn read(self) -> Result<Verdict> {
        match (self.reading)()?[..] {
            [loss, norm, factor] => Ok(Verdict { loss, norm, factor }),
            ref other => Err(Error::Invalid(format!("a verdict of {} numbers", other.len()))),
        }
    }
}

#[allow(unused_variables)] // without a GPU in this build
fn sums(first: &Tensor, gradients: &[&Tensor], of: &Parts) -> Result<Tensor> {
    on_gpu!(first.device(), G => crate::ops::adamw::gpu::tensors::sums::<G>(gradients, of));
    refused("the norm of gradients", first)
}

/// A parameter, its gradient and what is kept of it, all of one shape and on one GPU.
#[derive(Debug, Clone, Copy)]
pub struct Updated<'a> {
    /// The parameter, in f32, f16 or bf16, contiguous; changed in place, as what follows.
    pub parameter: &'a Tensor,
    /// First moment, f32.
    pub m: &'a Tensor,
    /// Second moment, f32.
    pub v: &'a Tensor,
    /// The f32 weight of which an f16 or bf16 parameter is the rounding.
    pub master: Option<&'a Tensor>,
    /// The gradient, in the dtype of the parameter.
    pub gradient: &'a Tensor,
}

/// One launch that updates a parameter as the verdict says. `before` is the verdict on the update before this one,
/// where the host has not read that yet: if it was skipped, the number of this one is one less.
///
/// # Errors
/// Tensors of other shapes or dtypes than these, or on the CPU.
#[allow(unused_variables)] // without a GPU in this build
pub fn update(step: &Step, verdict: &Tensor, before: Option<&Tensor>, x: &Updated<'_>) -> Result<()> {
    let wide = [Some(x.m), Some(x.v), x.master];
    let fits = |t: &Tensor| t.dims() == x.parameter.dims() && t.dtype() == candle_core::DType::F32;
    if !wide.into_iter().flatten().all(fits) || x.gradient.dims() != x.parameter.dims() {
        return Err(Error::Invalid(format!(
            "adamw: a parameter {:?} with moments {:?} {:?} and gradient {:?}; one shape, and f32 moments",
            x.parameter.dims(),
            x.m.dims(),
            x.m.dtype(),
            x.gradient.dims()
        )));
    }
    on_gpu!(x.parameter.device(), G => crate::ops::adamw::gpu::tensors::step::<G>(step, (verdict, before), x));
    refused("adamw", x.parameter)
}
