//! Observation of the candidates and selections of a pass, with the possibility to change the candidates, and of the
//! greatest weights of softmax layers.

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

    /// The number of greatest weights per query that a softmax layer passes to [`blended`](Self::blended). With 0 it
    /// computes none.
    fn greatest_weights(&self, _layer: usize) -> usize {
        0
    }

    /// Called by a softmax layer with the greatest weights of every query, if
    /// [`greatest_weights`](Self::greatest_weights) asks for some.
    ///
    /// # Errors
    /// Ends the pass.
    fn blended(&self, _view: &BlendView) -> Result<()> {
        Ok(())
    }
}

/// The greatest weights of a softmax layer.
#[derive(Debug)]
pub struct BlendView<'a> {
    /// The index of the layer.
    pub layer: usize,
    /// For every (batch, head, query) in this order, its greatest weights in descending order, each with its key. Of equal
    /// weights that of the first key comes first. Keys without weight are left out.
    pub weights: &'a [Vec<(i32, f32)>],
}

/// Collects the greatest weights of the queries of a pass.
pub(crate) struct GreatestWeights {
    count: usize,
    /// Number of queries.
    n: usize,
    weights: Vec<Vec<(i32, f32)>>,
}

impl GreatestWeights {
    /// For `count` weights of each query of B sequences, Hq heads and N queries.
    pub(crate) fn new(count: usize, [b, hq, n]: [usize; 3]) -> Self {
        Self { count, n, weights: vec![Vec::new(); b * hq * n] }
    }

    /// Adds the weights `[B, Hq, rows, M]` of the queries from `first` on.
    pub(crate) fn add(&mut self, first: usize, weights: &Tensor) -> Result<()> {
        let (_, _, rows, m) = weights.dims4()?;
        let all = weights.detach().to_dtype(DType::F32)?.flatten_all()?.to_vec1::<f32>()?;
        for (at, row) in all.chunks(m).enumerate() {
            let mut order: Vec<i32> = (0..m as i32).filter(|&j| row[j as usize] > 0.0).collect();
            let descending = |&a: &i32, &b: &i32| row[b as usize].total_cmp(&row[a as usize]).then(a.cmp(&b));
            if order.len() > self.count {
                order.select_nth_unstable_by(self.count, descending);
                order.truncate(self.count);
            }
            order.sort_unstable_by(descending);
            self.weights[at / rows * self.n + first + at % rows] =
                order.into_iter().map(|j| (j, row[j as usize])).collect();
        }
        Ok(())
    }

    /// Passes the weights to a probe.
    pub(crate) fn report(&self, probe: &dyn Probe, layer: usize) -> Result<()> {
        probe.blended(&BlendView { layer, weights: &self.weights })
    }
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
    /// Greatest energy that can be selected for every query `[B, Hq, N]`, where the heads have a threshold.
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
    /// Greatest energy that can be selected for every query `[B, Hq, N]`, where the heads have a threshold.
    pub limit: Option<&'a Tensor>,
    /// Output of the Beacon's running averages, which is added to that of the heads, `[B, H, N, D]`, for all heads: those
    /// that read come first.
    pub memory: Option<&'a Tensor>,
    /// The gate of the heads' output `[B, N, Hq * D]`.
    pub output_gate: Option<&'a Tensor>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_greatest_weights_are_in_order_and_keep_their_queries() {
        let weights =
            Tensor::new(&[[[[0.1f32, 0.4, 0.4, 0.1], [1.0, 0.0, 0.0, 0.0]]]], &Device::Cpu).unwrap();
        let mut greatest = GreatestWeights::new(3, [1, 1, 3]);
        greatest.add(1, &weights).unwrap();
        assert_eq!(greatest.weights, [vec![], vec![(1, 0.4), (2, 0.4), (0, 0.1)], vec![(0, 1.0)]]);
    }
}
