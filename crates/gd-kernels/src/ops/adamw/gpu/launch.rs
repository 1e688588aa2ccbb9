//! AdamW on a GPU, clipped by a norm that stays in its memory.
//!
//! [`squares`] is one launch per gradient. [`verdict`] computes from the sums the factor of the gradients in an
//! [`update`], or that the update is skipped. No launch waits for the host, which may read a verdict later. Sums are in
//! a fixed order, so that they have the same bits for any schedule. Squares are f32; a gradient above 1e19 counts as
//! one that is not finite.

use candle_core::DType;

use crate::backend::gpu::kernel::{ElementType, Variant};
use crate::backend::gpu::params::{
    ADAMW_THREAD_ELEMENTS, AdamwParams, ClipParams, SQUARES_BLOCK_ELEMENTS, SquaresParams,
};
use crate::backend::gpu::{Gpu, KernelOp, Slice, THREADS, elements, launch};
use crate::error::{Error, Result};
pub use crate::ops::adamw::{Limits, Step};

/// Elements of a gradient that one partial sum of squares covers.
const ELEMENTS_PER_SUM: usize = SQUARES_BLOCK_ELEMENTS as usize;

/// The layout of the partial sums of squares of several gradients: f32, one for every `ELEMENTS_PER_SUM` elements of
/// a gradient.
#[derive(Debug, Clone)]
pub struct PartialSums {
    counts: Vec<usize>,
    /// Where the sums of each gradient begin, and at the end where the last ones end.
    starts: Vec<usize>,
}

impl PartialSums {
    /// For gradients of these numbers of elements.
    ///
    /// # Errors
    /// A gradient of 2^31 elements or more.
    pub fn new(counts: Vec<usize>) -> Result<Self> {
        let mut starts = vec![0];
        for &count in &counts {
            elements("a gradient", count as u128)?;
            starts.push(starts[starts.len() - 1] + count.div_ceil(ELEMENTS_PER_SUM));
        }
        elements("sums of squares", starts[counts.len()] as u128)?;
        Ok(Self { counts, starts })
    }

    /// The number of sums.
    pub fn count(&self) -> usize {
        self.starts[self.counts.len()]
    }

    /// The first gradient that is not finite, given the sums.
    pub fn first_not_finite(&self, sums: &[f32]) -> Option<usize> {
        self.starts.windows(2).position(|range| sums[range[0]..range[1]].iter().any(|x| !x.is_finite()))
    }
}

/// Writes the partial sums of squares of gradient number `at`, contiguous in f32, f16 or bf16, to their place in
/// `sums`.
///
/// # Errors
/// Another dtype, and errors of the GPU.
pub fn squares<G: Gpu>(
    gpu: &G,
    layout: &PartialSums,
    at: usize,
    (gradient, dtype): (Slice<'_, G::Buffer>, DType),
    sums: Slice<'_, G::Buffer>,
) -> Result<()> {
    let variant = Variant::new("squares", dtype, &gpu.arch())?;
    let params = SquaresParams { count: layout.counts[at] as u32, first: layout.starts[at] as u32 };
    if params.count == 0 {
        return Ok(());
    }
    let blocks = layout.starts[at + 1] - layout.starts[at];
    launch(gpu, variant.kernel(KernelOp::Squares), blocks, &params, vec![Some(gradient), Some(sums)])
}

/// Writes a [`Verdict`](crate::adamw::Verdict) from the squares and the sum of `losses` (f32, `count` of them).
///
/// # Errors
/// A weight or a norm to clip to that is not above 0, and errors of the GPU.
pub fn verdict<G: Gpu>(
    gpu: &G,
    (layout, sums): (&PartialSums, Slice<'_, G::Buffer>),
    (losses, count): (Slice<'_, G::Buffer>, usize),
    limits: &Limits,
    out: Slice<'_, G::Buffer>,
) -> Result<()> {
    let Limits { weight, clip, .. } = *limits;
    if !(weight > 0.0 && weight.is_finite() && clip > 0.0) {
        return Err(Error::Invalid(format!("a gradient of weight {weight} cannot be clipped to {clip}")));
    }
    let params = ClipParams {
        partials: layout.count() as u32,
        losses: elements("losses", count as u128)?,
        weight: weight as f32,
        max_norm: clip as f32,
        loss_limit: limits.loss,
        norm_limit: limits.norm,
    };
    let buffers = [sums, losses, out].map(Some).to_vec();
    let variant = Variant { element: ElementType::F32, target: gpu.arch().target() };
    launch(gpu, variant.kernel(KernelOp::Clip), 1, &params, buffers)
}

impl Step {
    fn params(&self, count: u32) -> AdamwParams {
        let Self { number, beta1, beta2, eps, .. } = *self;
        // The number of this update if the one before it was skipped.
        let previous = number.saturating_sub(1).max(1);
        AdamwParams {
            count,
            beta1: beta1 as f32,
            one_minus_beta1: (1.0 - beta1) as f32,
            beta2: beta2 as f32,
            one_minus_beta2: (1.0 - beta2) as f32,
            weight_scale: self.weight_scale() as f32,
            eps: eps as f32,
            step_size: self.step_size(number) as f32,
            root_scale: self.root_scale(number) as f32,
            previous_step_size: self.step_size(previous) as f32,
            previous_root_scale: self.root_scale(previous) as f32,
        }
    }
}

/// A parameter, its gradient and its state: contiguous, with the same number of elements.
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

/// Updates a parameter in place, in one launch, by the factor of `verdict`, or skips the update. `previous` is the
/// verdict on the update before this one where the host has not read it yet: if that was skipped, the number of this
/// one is one less.
///
/// # Errors
/// Another dtype, a 16-bit parameter without its master, 2^31 elements or more, and errors of the GPU.
pub fn update<G: Gpu>(
    gpu: &G,
    step: &Step,
    (count, dtype): (usize, DType),
    (verdict, previous): (Slice<'_, G::Buffer>, Option<Slice<'_, G::Buffer>>),
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
    let mut buffers = vec![Some(verdict), previous];
    buffers.extend([Some(x.gradient), Some(x.m), Some(x.v), x.master, Some(x.parameter)]);
    let blocks = count.div_ceil(THREADS * ADAMW_THREAD_ELEMENTS as usize);
    launch(gpu, variant.kernel(KernelOp::Adamw), blocks, &params, buffers)
}
