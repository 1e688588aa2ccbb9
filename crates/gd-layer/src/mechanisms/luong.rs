//! Luong attention (arXiv 1508.04025), over decoder states q `[B, N, Dq]` and encoder states k `[B, M, Dk]`.

use candle_core::{D, Result, Tensor};
use serde::{Deserialize, Serialize};

use super::additive::{Keys, OUTSIDE, STATES, additive};
use super::definition::{Definition, Info};
use super::indices::project;
use super::stages::{Computation, Run, Score, Stages};

/// Luong attention: the values are the keys.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Luong {
    /// The score.
    pub kind: LuongScore,
}

/// The scores of Luong attention.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LuongScore {
    /// `q k^T`.
    #[default]
    Dot,
    /// `q W k^T`.
    General,
    /// `vec^T tanh(W [q; k])`.
    Concat,
}

impl Definition for Luong {
    const INFO: Info = Info {
        formula: "softmax(score) k, score q k^T, q W k^T or vec^T tanh(W [q; k])",
        source: "Luong et al. 2015",
        inputs: STATES,
        learned: &[("W", "general [Dq,Dk], concat [A,Dq+Dk]"), ("vec", "concat [A]")],
        parameters: &[("kind", "dot, general or concat")],
        not_in_models: OUTSIDE,
        memory: "N x M, concat N x M x A",
        ..Info::DEFAULT
    };

    fn computation(&self) -> Computation<'_> {
        Computation::Stages(Stages {
            score: Box::new(self.kind),
            aggregate: Box::new(Keys),
            ..Stages::default()
        })
    }
}

impl Score for LuongScore {
    fn name(&self) -> &'static str {
        match self {
            Self::Dot => "dot",
            Self::General => "general",
            Self::Concat => "concat",
        }
    }

    fn score(&self, run: &mut Run) -> Result<Tensor> {
        let (q, k) = (run.inputs.get("q")?, run.inputs.get("k")?);
        match self {
            Self::Dot => products(q, k),
            Self::General => products(&project(q, &run.inputs.get("W")?.t()?)?, k),
            Self::Concat => {
                let w = run.inputs.get("W")?;
                let (dq, dk) = (q.dim(D::Minus1)?, k.dim(D::Minus1)?);
                if w.dim(D::Minus1)? != dq + dk {
                    candle_core::bail!("W {:?}: [A, {dq} + {dk}] expected", w.dims());
                }
                let (wq, wk) = (w.narrow(1, 0, dq)?, w.narrow(1, dq, dk)?);
                additive(&project(q, &wq)?, &project(k, &wk)?, run.inputs.get("vec")?)
            }
        }
    }
}

/// `q k^T` for q `[B, N, D]` and k `[B, M, D]`.
fn products(q: &Tensor, k: &Tensor) -> Result<Tensor> {
    q.contiguous()?.matmul(&k.transpose(1, 2)?.contiguous()?)
}
