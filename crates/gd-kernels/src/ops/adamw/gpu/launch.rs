//! AdamW on a GPU, clipped by a norm that never leaves it.
//!
//! [`squares`] takes one launch a gradient; [`verdict`] makes of their sums what an [`update`] needs to know: the
//! factor of the gradients, or that nothing is to change. No launch waits for the host, and the host reads
//! a verdict when it likes. Sums are in a fixed order: the same bits whatever the schedule. Squares are f32; a
//! gradient above 1e19 counts as one that is not finite.

use candle_core::DType;

use crate::backend::gpu::kernel::{ElementType, Variant};
use crate::backend::gpu::params::{
    ADAMW_THREAD_ELEMENTS, AdamwParams, ClipParams, SQUARES_BLOCK_ELEMENTS, SquaresParams,
};
use crate::backend::gpu::{Gpu, KernelOp, Slice, THREADS, elements, launch};
use crate::error::{Error, Result};
use crate::ops::adamw::update::{ELEMENTS_PER_SUM, Limits, Parts, Step};

const _: () = assert!(ELEMENTS_PER_SUM == SQUARES_BLOCK_ELEMENTS as usize, "the elements that a block sums");

/// Puts the sums of squares of gradient number `at`, contiguous in f32, f16 or bf16, among the `parts`.
///
/// # Errors
/// Another dtype, and what the GPU refuses.
pub fn squares<G: Gpu>(
    gpu: &G,
    of: &Parts,
    at: usize,
    (gradient, dtype): (Slice<'_, G::Buffer>, DType),
    parts: Slice<'_, G::Buffer>,
) -> Result<()> {
    let variant = Variant::new("squares", dtype, &gpu.arch())?;
    let params = SquaresParams { count: of.counts[at] as u32, first: of.starts[at] as u32 };
    if params.count == 0 {
        return Ok(());
    }
    let blocks = of.starts[at + 1] - of.starts[at];
    launch(gpu, variant.kernel(KernelOp::Squares), blocks, &params, vec![Some(gradient), Some(parts)])
}

/// Writes a [`Verdict`] from the squares and the sum of `losses` (f32, so many).
///
/// # Errors
/// A weight or a norm to clip to that is not above 0, and what the GPU refuses.
pub fn verdict<G: Gpu>(
    gpu: &G,
    (of, parts): (&Parts, Slice<'_, G::Buffer>),
    (losses, count): (Slice<'_, G::Buffer>, usize),
    limits: &Limits,
    out: Slice<'_, G::Buffer>,
) -> Result<()> {
    let Limits { weight, clip, .. } = *limits;
    if !(weight > 0.0 && weight.is_finite() && clip > 0.0) {
        return Err(Error::Invalid(format!("a gradient of weight {weight} cannot be clipped to {clip}")));
    }
    let params = ClipParams {
        partials: of.count() as u32,
        losses: elements("losses", count as u128)?,
        weight: weight as f32,
        max_norm: clip as f32,
        loss_limit: limits.loss,
        norm_limit: limits.norm,
    };
    let buffers = [parts, losses, out].map(Some).to_vec();
    let variant = Variant { element: ElementType::F32, target: gpu.arch().target() };
    launch(gpu, variant.kernel(KernelOp::Clip), 1, &params, buffers)
}

impl Step {
    fn params(&self, count: u32) -> AdamwParams {
        let Self { number, lr, beta1, beta2, eps, weight_decay } = *self;
        // As f64, rounded once.
        let rate = |t: f64| (lr / (1.0 - beta1.powf(t))) as f32;
        let root = |t: f64| (1.0 - beta2.powf(t)).sqrt().recip() as f32;
        let (now, late) = (f64::from(number), f64::from(number.saturating_sub(1).max(1)));
        AdamwParams {
            count,
            beta1: beta1 as f32,
            one_minus_beta1: (1.0 - beta1) as f32,
            beta2: beta2 as f32,
            one_minus_beta2: (1.0 - beta2) as f32,
            weight_scale: (1.0 - lr * weight_decay) as f32,
            eps: eps as f32,
            step_size: rate(now),
            root_scale: root(now),
            previous_step_size: rate(late),
            previous_root_scale: root(late),
        }
    }
}

/// A parameter, its gradient and what is kept of it: contiguous, of as many elements.
#[derive(Debug)]
pub struct Operands<'a, B> {
    /// The parameter, in f32, f16 or bf16.
    pub parameter: Slice<'a, B>,
    /// Its gradient, in the same dtype.
    pub gradient: Slice<'a, B>,
    /// First moment, f32.
    pub m: Slice<'a, B>,
    /// Second moment, f32.
    pub v: Slice<'a, B>,
    /// The f32 weight of which an f16 or bf16 parameter is the rounding.
    pub master: Option<Slice<'a, B>>,
}

/// Updates a parameter in place, in one launch, as the verdict says. `before` is the verdict on the update before
/// this one where the host has not read it yet: if that was skipped, this one's number is one less.
///
/// # Errors
/// Another dtype, a 16-bit parameter without its master, 2^31 elements or more, and what the GPU refuses.
pub fn update<G: Gpu>(
    gpu: &G,
    step: &Step,
    (count, dtype): (usize, DType),
    (verdict, before): (Slice<'_, G::Buffer>, Option<Slice<'_, G::Buffer>>),
    x: &Operands<'_, G::Buffer>,
) -> Result<()> {
    let variant = Variant::new("adamw", dtype, &gpu.arch())?;
    if x.master.is_some() != (dtype != DType::F32) {
        return Err(Error::Invalid(format!(
            "adamw: a parameter in {} {} an f32 master weight",
            dtype.as_str(),
            if x.master.is_some() { "with" } else { "without" }
        )));
    }
    let params = step.params(elements("a parameter", count as u128)?);
    if count == 0 {
        return Ok(());
    }
    let mut buffers = vec![Some(verdict), before];
    buffers.extend([Some(x.gradient), Some(x.m), Some(x.v), x.master, Some(x.parameter)]);
    let blocks = count.div_ceil(THREADS * ADAMW_THREAD_ELEMENTS as usize);
    launch(gpu, variant.kernel(KernelOp::Adamw), blocks, &params, buffers)
}
