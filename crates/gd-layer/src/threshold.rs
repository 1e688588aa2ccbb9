//! The thresholds of selecting heads, and how they follow the number of visible keys.

use candle_core::{DType, Device, Result, Tensor};
use candle_nn::{Init, VarBuilder};
use gd_kernels::{Candidates, Gate, Mask, above_runner_up};

use crate::config::GdConfig;

/// The learned thresholds of the heads.
///
/// The least of n energies falls with n, linearly in ln n where the lower tail of the energies is exponential: a threshold
/// that was learned on few keys is passed by chance among many. With `threshold_by_length` the threshold of a query that
/// sees n keys is `tau + slope * ln n`.
#[derive(Debug, Clone)]
pub(crate) struct Threshold {
    /// tau `[Hq]`.
    per_head: Tensor,
    /// The slope in the logarithm of the number of visible keys `[Hq]`; none for thresholds that do not follow it.
    slope: Option<Tensor>,
}

impl Threshold {
    /// Reads or creates `threshold` `[Hq]`, initially `initial`, and with `threshold_by_length` also `threshold_slope`
    /// `[Hq]`, initially 0.
    pub(crate) fn new(gd: &GdConfig, heads: usize, initial: f64, vb: &VarBuilder) -> Result<Self> {
        let per_head = vb.get_with_hints(heads, "threshold", Init::Const(initial))?;
        let slope = match gd.threshold_by_length {
            true => Some(vb.get_with_hints(heads, "threshold_slope", Init::Const(0.0))?),
            false => None,
        };
        Ok(Self { per_head, slope })
    }

    /// The thresholds `[Hq]`, or if they follow the number of visible keys those of every query `[B, Hq, N]` (in f32, or
    /// f64), of B sequences with N queries and M keys under `mask`; `more` is added.
    pub(crate) fn of_queries(&self, more: Option<f64>, mask: &Mask, sizes: [usize; 3]) -> Result<Tensor> {
        let per_head = match more {
            Some(more) => (&self.per_head + more)?,
            None => self.per_head.clone(),
        };
        match self.shift(mask, sizes)? {
            Some(shift) => by_query(&per_head.to_dtype(shift.dtype())?)?.broadcast_add(&shift),
            None => Ok(per_head),
        }
    }

    /// What is added to the threshold of a head for every query, `slope * ln n` `[B, Hq, N]`, in f32, or f64; none where the
    /// thresholds do not follow the number of visible keys. A query that sees no key has the shift of one that sees one.
    pub(crate) fn shift(&self, mask: &Mask, [b, n, m]: [usize; 3]) -> Result<Option<Tensor>> {
        let Some(slope) = &self.slope else { return Ok(None) };
        let wide = if slope.dtype() == DType::F64 { DType::F64 } else { DType::F32 };
        let entries = if mask.differs() { b } else { 1 };
        mask.validate(b, m)?;
        let logs: Vec<f64> = (0..entries * n)
            .map(|row| (mask.visible(row / n, row % n, m).len().max(1) as f64).ln())
            .collect();
        // Rounded on the host: Metal has no f64.
        let logs = Tensor::from_vec(logs, (entries, 1, n), &Device::Cpu)?.to_dtype(wide)?;
        let logs = logs.to_device(slope.device())?.broadcast_as((b, 1, n))?;
        Ok(Some(slope.to_dtype(wide)?.reshape((1, (), 1))?.broadcast_mul(&logs)?))
    }
}

/// Greatest energy that a query can select among these candidates, `[B, Hq, N]`, given thresholds `[Hq]` or `[B, Hq, N]`.
pub(crate) fn limit(
    gd: &GdConfig,
    threshold: Option<&Tensor>,
    candidates: &Candidates,
) -> Result<Option<Tensor>> {
    let Some(threshold) = threshold else { return Ok(None) };
    let (b, hq, n, _) = candidates.energy.dims4()?;
    let threshold = match gd.gate {
        Gate::Margin { .. } => {
            let threshold = threshold.to_dtype(candidates.energy.dtype())?;
            above_runner_up(&candidates.energy, &threshold, gd.picks)?
        }
        Gate::None | Gate::Energy { .. } | Gate::Coherence => threshold.clone(),
    };
    let limit = by_query(&(threshold + gd.gate.admission(gd.exclude_below))?)?;
    Ok(Some(limit.broadcast_as((b, hq, n))?))
}

/// Thresholds `[Hq]` or `[B, Hq, N]` in a shape that fits `[B, Hq, N]`.
pub(crate) fn by_query(threshold: &Tensor) -> Result<Tensor> {
    match threshold.rank() {
        1 => threshold.reshape((1, (), 1)),
        _ => Ok(threshold.clone()),
    }
}
