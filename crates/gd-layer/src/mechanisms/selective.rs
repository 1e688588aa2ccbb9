//! Selective Attention (Leviathan et al., arXiv 2410.02703): head 0 lets tokens mask earlier ones for all later queries.

use candle_core::{Result, Tensor};
use serde::{Deserialize, Serialize};

use super::definition::{Definition, Info};
use super::masks::{Causal, positions};
use super::rows::both;
use super::stages::{Computation, Run, Stages, Warp};

/// Causal self-attention with `softmax(z - F)`, where F accumulates over earlier queries how much head 0 attends to a
/// key: `F_ij = sum over r < i of S_rj`, `S_rj = relu(z of head 0)` for 0 < j < r and 0 elsewhere.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Selective {}

impl Definition for Selective {
    const INFO: Info = Info {
        formula: "softmax(z - F) v, F_ij = sum_{r<i} relu(z_rj of head 0) for 0 < j < r",
        source: "Leviathan et al. 2025",
        ..Info::DEFAULT
    };

    fn computation(&self) -> Computation<'_> {
        let warp: Option<Box<dyn Warp>> = Some(Box::new(SubtractMasked));
        Computation::Stages(Stages { mask: Box::new(Causal), warp, ..Stages::default() })
    }
}

struct SubtractMasked;

impl Warp for SubtractMasked {
    fn name(&self) -> &'static str {
        "selective"
    }

    fn warp(&self, scores: &Tensor, visible: &Tensor, run: &mut Run) -> Result<Tensor> {
        let (b, _, n, m) = scores.dims4()?;
        if n != m {
            candle_core::bail!("selective attention of {n} queries and {m} keys: it is self-attention");
        }
        let (query, key) = positions(scores)?;
        let earlier = both(&key.broadcast_lt(&query)?, &key.gt(&key.zeros_like()?)?)?;
        let first = scores.narrow(1, 0, 1)?;
        let masks = both(&visible.narrow(1, 0, 1)?, &earlier)?;
        // Masked before the relu, so that no score of a later token enters.
        let s = masks.where_cond(&first, &first.zeros_like()?)?.relu()?.squeeze(1)?;
        let sums = key.broadcast_lt(&query)?.to_dtype(scores.dtype())?.broadcast_as((b, n, n))?.contiguous()?;
        let f = sums.matmul(&s.contiguous()?)?;
        run.outputs.insert("F", f.clone());
        scores.broadcast_sub(&f.unsqueeze(1)?)
    }
}
