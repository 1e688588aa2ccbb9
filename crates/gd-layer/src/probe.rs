//! Looking into a pass, and reaching in: what a selecting layer preserves and what it selects.

use std::fmt::Debug;

use candle_core::{DType, Device, Result, Tensor};
use gd_kernels::{Candidates, Mask, Scan, Selected, scan};

/// Sees what every selecting layer preserves and selects, and may change what is selected from.
pub trait Probe: Debug {
    /// How many candidates a layer that keeps `own` of them scans for.
    fn candidates(&self, _layer: usize, own: usize) -> usize {
        own
    }

    /// Between preserving and selecting: the layer selects from what this returns.
    ///
    /// # Errors
    /// Ends the pass.
    fn preserved(&self, found: Found) -> Result<Candidates> {
        Ok(found.candidates)
    }

    /// After selecting.
    ///
    /// # Errors
    /// Ends the pass.
    fn selected(&self, reading: &Reading) -> Result<()>;
}

/// What a layer has found, and may select from.
#[derive(Debug)]
pub struct Found<'a> {
    /// The layer.
    pub layer: usize,
    /// How many candidates the layer keeps by itself.
    pub own: usize,
    /// The candidates of every query.
    pub candidates: Candidates,
    /// Threshold per query head `[Hq]`, where the heads have one.
    pub threshold: Option<&'a Tensor>,
    pub(crate) q: &'a Tensor,
    pub(crate) k: &'a Tensor,
    pub(crate) scan: &'a Scan<'a>,
}

impl Found<'_> {
    /// The selection energy of any key for query `i` of head `h` in sequence `b`; none if the query does not
    /// see the key.
    ///
    /// # Errors
    /// What the scan reports.
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

/// What a layer has read.
#[derive(Debug)]
pub struct Reading<'a> {
    /// The layer.
    pub layer: usize,
    /// What it selected from.
    pub candidates: &'a Candidates,
    /// What it selected.
    pub selected: &'a Selected,
    /// Threshold per query head `[Hq]`, where the heads have one.
    pub threshold: Option<&'a Tensor>,
    /// What the Beacon's running averages add to the heads `[B, Hq, N, D]`.
    pub memory: Option<&'a Tensor>,
    /// The gate on the heads' output `[B, N, Hq * D]`.
    pub output_gate: Option<&'a Tensor>,
}
