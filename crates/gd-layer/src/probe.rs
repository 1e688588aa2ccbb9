//! Observation of the candidates and selections of a pass, with the possibility to change the candidates.

use std::fmt::Debug;

use candle_core::{DType, Device, Result, Tensor};
use gd_kernels::{Candidates, Mask, Scan, Selected, scan};

/// Observes the candidates and selections of every selecting layer, and may change the candidates.
pub trait Probe: Debug {
    /// The number of candidates that a layer scans for, given the number of its configuration or of the pass.
    fn candidates(&self, _layer: usize, configured: usize) -> usize {
        configured
    }

    /// Called between scan and selection: the layer selects from the candidates that this returns.
    ///
    /// # Errors
    /// Ends the pass.
    fn preserved(&self, view: CandidateView) -> Result<Candidates> {
        Ok(view.candidates)
    }

    /// Called after the selection.
    ///
    /// # Errors
    /// Ends the pass.
    fn selected(&self, view: &SelectionView) -> Result<()>;
}

/// The candidates of a layer, before it selects.
#[derive(Debug)]
pub struct CandidateView<'a> {
    /// The index of the layer.
    pub layer: usize,
    /// The number of candidates without a probe.
    pub configured: usize,
    /// The candidates of every query.
    pub candidates: Candidates,
    /// Greatest energy that can be selected per query head `[Hq]`, where the heads have a threshold.
    pub limit: Option<&'a Tensor>,
    pub(crate) q: &'a Tensor,
    pub(crate) k: &'a Tensor,
    pub(crate) scan: &'a Scan<'a>,
}

impl CandidateView<'_> {
    /// The selection energy of `key` for query `i` of head `h` in sequence `b`; none if the query does not see the key.
    ///
    /// # Errors
    /// Those of [`scan`].
    pub fn energy(&self, [b, h, i]: [usize; 3], key: usize) -> Result<Option<f64>> {
        let (hq, hk, keys) = (self.q.dim(1)?, self.k.dim(1)?, self.k.dim(2)?);
        if !self.scan.mask.visible(b, i, keys).contains(&key) {
            return Ok(None);
        }
        let kv = h / (hq / hk);
        let q = self.q.narrow(0, b, 1)?.narrow(1, h, 1)?.narrow(2, i, 1)?;
        let k = self.k.narrow(0, b, 1)?.narrow(1, kv, 1)?.narrow(2, key, 1)?;
        let of_key = |prior: &Tensor| -> Result<Tensor> {
            let (batch, heads, _) = prior.dims3()?;
            let (b, h) = (if batch == 1 { 0 } else { b }, if heads == hq { h } else { kv });
            prior.narrow(0, b, 1)?.narrow(1, h, 1)?.narrow(2, key, 1)
        };
        let prior = self.scan.prior.map(of_key).transpose()?;
        let (beta, mask) = (self.scan.beta.narrow(0, h, 1)?, Mask::none());
        let one = Scan {
            prior: prior.as_ref(),
            score: self.scan.score,
            tie: self.scan.tie,
            ..Scan::new(&beta, &mask, 1)
        };
        let energy =
            scan(&q, &k, &one)?.energy.to_device(&Device::Cpu)?.to_dtype(DType::F64)?.flatten_all()?;
        Ok(Some(energy.get(0)?.to_scalar()?))
    }
}

/// The selections of a layer.
#[derive(Debug)]
pub struct SelectionView<'a> {
    /// The index of the layer.
    pub layer: usize,
    /// The candidates that it selected from.
    pub candidates: &'a Candidates,
    /// The selections.
    pub selected: &'a Selected,
    /// Greatest energy that can be selected per query head `[Hq]`, where the heads have a threshold.
    pub limit: Option<&'a Tensor>,
    /// Output of the Beacon's running averages, which is added to that of the heads, `[B, H, N, D]`, for all heads: those
    /// that read come first.
    pub memory: Option<&'a Tensor>,
    /// The gate of the heads' output `[B, N, Hq * D]`.
    pub output_gate: Option<&'a Tensor>,
}
