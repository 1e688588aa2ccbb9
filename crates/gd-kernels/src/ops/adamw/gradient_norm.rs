//! The Euclidean norm of all gradients together, and the clipping or skipping of an update by it.

use candle_core::Tensor;

use super::cpu;
#[cfg(feature = "gpu")]
use super::gpu::{launch::PartialSums, tensors};
use crate::backend::dispatch::{on_gpu, refused};
use crate::backend::span::{Pass, operator_span};
use crate::backend::support::require_device;
use crate::error::{Error, Result};

/// Sums of the squares of gradients.
#[derive(Debug, Clone)]
pub struct GradientSquares(Squares);

#[derive(Debug, Clone)]
enum Squares {
    /// One sum for each gradient.
    Cpu(Vec<f64>),
    /// f32 on the device, several for each gradient.
    #[cfg(feature = "gpu")]
    Gpu { layout: PartialSums, sums: Tensor },
}

impl GradientSquares {
    /// Sums the squares of these gradients on one device, at least one gradient: f64, f32, f16 or bf16 on the CPU,
    /// where sums are f64; f32, f16 or bf16 on a GPU, where sums are f32 and a gradient above 1e19 counts as one that
    /// is not finite.
    ///
    /// # Errors
    /// No gradient, or one of another dtype.
    pub fn new(gradients: &[&Tensor]) -> Result<Self> {
        let _span = operator_span("gradient_norm", Pass::Forward);
        let Some(first) = gradients.first() else {
            return Err(Error::Invalid("the norm of an empty list of gradients".into()));
        };
        on_gpu!(first.device(), G => {
            let layout = PartialSums::new(gradients.iter().map(|t| t.elem_count()).collect())?;
            let sums = tensors::squares::<G>(gradients, &layout)?;
            Ok(Self(Squares::Gpu { layout, sums }))
        });
        require_device("the norm of gradients", first.device())?;
        let sums = gradients.iter().map(|gradient| cpu::square_sum(gradient));
        Ok(Self(Squares::Cpu(sums.collect::<Result<_>>()?)))
    }

    /// The norm of all gradients together; not finite if one of them is not. It has the same bits for any number of
    /// threads. Waits for the device.
    ///
    /// # Errors
    /// Errors of the device.
    pub fn norm(&self) -> Result<f64> {
        match &self.0 {
            Squares::Cpu(sums) => Ok(sums.iter().sum::<f64>().sqrt()),
            #[cfg(feature = "gpu")]
            Squares::Gpu { sums, .. } => {
                let losses = Tensor::zeros(1, candle_core::DType::F32, sums.device())?;
                Ok(f64::from(self.verdict(&losses, &Limits::NONE)?.read()?.norm))
            }
        }
    }

    /// The position in the list of the first gradient that is not finite. Waits for the device.
    ///
    /// # Errors
    /// Errors of the device.
    pub fn first_not_finite(&self) -> Result<Option<usize>> {
        match &self.0 {
            Squares::Cpu(sums) => Ok(sums.iter().position(|sum| !sum.is_finite())),
            #[cfg(feature = "gpu")]
            Squares::Gpu { layout, sums } => Ok(layout.first_not_finite(&sums.to_vec1()?)),
        }
    }

    /// The verdict on an update from the norm and the sum of `losses` (f32, on the gradients' GPU), computed on the
    /// GPU. The host does not wait for it.
    ///
    /// # Errors
    /// [`Error::Invalid`] for a weight or a norm to clip to that is not above 0; [`Error::Unsupported`] on the CPU,
    /// where [`GradientSquares::norm`] does not wait for a device.
    #[cfg_attr(not(feature = "gpu"), allow(unused_variables, reason = "only a GPU computes verdicts"))]
    pub fn verdict(&self, losses: &Tensor, limits: &Limits) -> Result<PendingVerdict> {
        #[cfg(feature = "gpu")]
        if let Squares::Gpu { layout, sums } = &self.0 {
            on_gpu!(sums.device(), G => {
                let (verdict, download) = tensors::verdict::<G>((layout, sums), losses, limits)?;
                Ok(PendingVerdict { verdict, download })
            });
        }
        refused("clipping", losses)
    }
}

/// When a gradient is clipped and when an update is skipped.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Limits {
    /// Gradients and losses are sums; this is what they are divided by.
    pub weight: f64,
    /// Maximum norm: a gradient of greater norm is scaled down to it.
    pub clip: f64,
    /// The update is skipped if the loss is above this.
    pub loss: f32,
    /// The update is skipped if the norm is above this.
    pub norm: f32,
}

impl Limits {
    /// No limits, to compute the norm alone.
    #[cfg(feature = "gpu")]
    const NONE: Self = Self { weight: 1.0, clip: 1.0, loss: f32::INFINITY, norm: f32::INFINITY };
}

/// A verdict on an update; on the device three f32 in this order.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Verdict {
    /// The loss.
    pub loss: f32,
    /// The norm of the gradient before clipping.
    pub norm: f32,
    /// The factor of the summed gradients; not finite where the update is skipped.
    pub factor: f32,
}

impl Verdict {
    /// Whether the update changes anything.
    pub fn applies(&self) -> bool {
        self.factor.is_finite()
    }
}

/// A verdict on its way to the host.
pub struct PendingVerdict {
    verdict: Tensor,
    download: Box<dyn FnOnce() -> Result<Vec<f32>> + Send>,
}

impl PendingVerdict {
    /// The verdict on the device, f32 `[3]`.
    pub fn tensor(&self) -> &Tensor {
        &self.verdict
    }

    /// Waits for the verdict; on CUDA, launches after it are not waited for.
    ///
    /// # Errors
    /// Errors of the device.
    pub fn read(self) -> Result<Verdict> {
        match (self.download)()?[..] {
            [loss, norm, factor] => Ok(Verdict { loss, norm, factor }),
            ref other => Err(Error::Invalid(format!("a verdict of {} numbers", other.len()))),
        }
    }
}
