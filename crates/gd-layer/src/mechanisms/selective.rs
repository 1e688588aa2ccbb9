//! Selective Attention (Leviathan et al., arXiv 2410.02703): head 0 lets tokens mask earlier ones for all later queries.

use candle_core::{Result, Tensor};
use serde::{Deserialize, Serialize};

use super::definition::{Definition, Info, State};
use super::masks::{Causal, POSITIONS, positions};
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
        constants: &[
            ("mask", "[N,M]"),
            POSITIONS[0],
            POSITIONS[1],
            (PAST, "[B,M], optional: F of queries before these"),
        ],
        state: State::PerPosition { input: PAST, output: TOTAL },
        independent_queries: false,
        ..Info::DEFAULT
    };

    fn computation(&self) -> Computation<'_> {
        let warp: Option<Box<dyn Warp>> = Some(Box::new(SubtractMasked));
        Computation::Stages(Stages { mask: Box::new(Causal), warp, ..Stages::default() })
    }
}

/// The input with the sum of S over the queries before these, and the output with that sum and these.
const PAST: &str = "F_past";
const TOTAL: &str = "F_total";

struct SubtractMasked;

impl Warp for SubtractMasked {
    fn name(&self) -> &'static str {
        "selective"
    }

    fn warp(&self, scores: &Tensor, visible: &Tensor, run: &mut Run) -> Result<Tensor> {
        let (b, _, n, m) = scores.dims4()?;
        let past = run.inputs.optional(PAST).cloned();
        if n != m && past.is_none() {
            candle_core::bail!(
                "selective attention of {n} queries and {m} keys needs what earlier queries masked"
            );
        }
        let (query, key) = positions(scores, run)?;
        let earlier = both(&key.broadcast_lt(&query)?, &key.gt(&key.zeros_like()?)?)?;
        let first = scores.narrow(1, 0, 1)?;
        let masks = both(&visible.narrow(1, 0, 1)?, &earlier)?;
        // Masked before the relu, so that no score of a later token enters.
        let s = masks.where_cond(&first, &first.zeros_like()?)?.relu()?.squeeze(1)?.contiguous()?;
        let row = Tensor::arange(0u32, n as u32, scores.device())?;
        let sums = row.reshape((1, n))?.broadcast_lt(&row.reshape((n, 1))?)?.to_dtype(scores.dtype())?;
        let mut f = sums.broadcast_as((b, n, n))?.contiguous()?.matmul(&s)?;
        let mut total = s.sum(1)?;
        if let Some(past) = past {
            f = f.broadcast_add(&past.unsqueeze(1)?)?;
            total = (total + past)?;
        }
        run.outputs.insert("F", f.clone());
        run.outputs.insert(TOTAL, total);
        scores.broadcast_sub(&f.unsqueeze(1)?)
    }
}
