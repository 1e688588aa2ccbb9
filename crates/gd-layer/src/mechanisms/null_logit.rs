//! Softmax with a logit for no key: softmax-off-by-one (Miller 2023) with a logit of 0, and the learned sink of gpt-oss
//! (OpenAI 2025; Xiao et al., arXiv 2309.17453, on attention sinks).

use candle_core::{D, Result, Tensor};
use serde::{Deserialize, Serialize};

use super::definition::{Definition, Info, Sizes, Weight};
use super::rows::{exp, per_head, row_max};
use super::stages::{Computation, Normalise, Normalised, Run, Stages};

/// `exp(z) / (1 + sum(exp(z)))`: a query may attend to nothing.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct SoftmaxOffByOne {}

impl Definition for SoftmaxOffByOne {
    const INFO: Info = Info {
        formula: "exp(z) / (1 + sum exp(z)) v, z = q k^T / sqrt(D)",
        source: "Miller 2023",
        ..Info::DEFAULT
    };

    fn computation(&self) -> Computation<'_> {
        Computation::Stages(Stages { normalise: Box::new(NullLogit { learned: None }), ..Stages::default() })
    }
}

/// `exp(z) / (exp(t) + sum(exp(z)))` with a learned t per head, which is not scaled.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Sink {}

impl Definition for Sink {
    const INFO: Info = Info {
        formula: "exp(z) / (exp(t) + sum exp(z)) v, z = q k^T / sqrt(D)",
        source: "OpenAI 2025 (gpt-oss); Xiao et al. 2024",
        learned: &[("t", "[H]")],
        ..Info::DEFAULT
    };

    fn computation(&self) -> Computation<'_> {
        Computation::Stages(Stages {
            normalise: Box::new(NullLogit { learned: Some("t") }),
            ..Stages::default()
        })
    }

    fn weights(&self, sizes: &Sizes) -> Vec<Weight> {
        vec![Weight::constant("t", &[sizes.heads], 0.0)]
    }
}

/// Softmax over the support and one more logit, whose weight is that of no key.
struct NullLogit {
    /// The input with the logit per head; none for 0.
    learned: Option<&'static str>,
}

impl Normalise for NullLogit {
    fn name(&self) -> &'static str {
        if self.learned.is_some() {
            "softmax with a learned null logit"
        } else {
            "softmax with a null logit of 0"
        }
    }

    fn normalise(&self, scores: &Tensor, support: &Tensor, run: &mut Run) -> Result<Normalised> {
        let rows = row_max(scores, support)?;
        let logit = match self.learned {
            Some(name) => per_head(run.inputs.get(name)?, scores)?.broadcast_as(rows.shape())?,
            None => rows.zeros_like()?,
        };
        // The maximum of everything that is summed. In a row without keys that is the null logit, whatever its size,
        // and not the 0 that stands for the maximum of no keys.
        let some = support.max_keepdim(D::Minus1)?;
        let shift = some.where_cond(&rows.maximum(&logit.detach())?, &logit.detach().contiguous()?)?;
        let exp = exp(scores, support, &shift)?;
        let null = (logit - &shift)?.exp()?;
        let total = (exp.sum_keepdim(D::Minus1)? + &null)?;
        Ok(Normalised { weights: exp.broadcast_div(&total)?, null: Some((null / total)?) })
    }
}
