//! Scores by small networks, for decoder states and encoder states: Bahdanau (arXiv 1409.0473), Luong
//! (arXiv 1508.04025) and Pointer networks (Vinyals, arXiv 1506.03134).
//!
//! Shapes: q `[B, N, Dq]`, k `[B, M, Dk]`; scores and weights `[B, N, M]`, not scaled.

use candle_core::{D, Result, Tensor};
use serde::{Deserialize, Serialize};

use super::definition::{Definition, Info, Named};
use super::stages::{Aggregate, Computation, Run, Score, Stages};

const OUTSIDE: Option<&str> = Some("it scores encoder states for decoder states, without heads");
const STATES: &[Named] = &[("q", "[B,N,Dq]"), ("k", "[B,M,Dk]")];

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

/// Bahdanau attention: the values are the keys.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Bahdanau {}

impl Definition for Bahdanau {
    const INFO: Info = Info {
        formula: "softmax(vec^T tanh(W q + U k)) k",
        source: "Bahdanau et al. 2015",
        inputs: STATES,
        learned: &[("W", "[A,Dq]"), ("U", "[A,Dk]"), ("vec", "[A]")],
        not_in_models: OUTSIDE,
        memory: "N x M x A",
        ..Info::DEFAULT
    };

    fn computation(&self) -> Computation<'_> {
        let score = Additive { query: ("q", "W"), key: ("k", "U") };
        Computation::Stages(Stages { score: Box::new(score), aggregate: Box::new(Keys), ..Stages::default() })
    }
}

/// A pointer network: the output is the distribution over the encoder states.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Pointer {}

impl Definition for Pointer {
    const INFO: Info = Info {
        formula: "softmax(vec^T tanh(W1 e + W2 dec))",
        source: "Vinyals et al. 2015",
        inputs: &[("e", "[B,M,De]"), ("dec", "[B,N,Dd]")],
        learned: &[("W1", "[A,De]"), ("W2", "[A,Dd]"), ("vec", "[A]")],
        not_in_models: OUTSIDE,
        memory: "N x M x A",
        ..Info::DEFAULT
    };

    fn computation(&self) -> Computation<'_> {
        let score = Additive { query: ("dec", "W2"), key: ("e", "W1") };
        Computation::Stages(Stages {
            score: Box::new(score),
            aggregate: Box::new(Weights),
            ..Stages::default()
        })
    }
}

/// `vec^T tanh(W q + U k)`, with the names of q and W and of k and U.
struct Additive {
    query: (&'static str, &'static str),
    key: (&'static str, &'static str),
}

impl Score for Additive {
    fn name(&self) -> &'static str {
        "additive"
    }

    fn score(&self, run: &mut Run) -> Result<Tensor> {
        let projected = |(states, w): (&str, &str)| project(run.inputs.get(states)?, run.inputs.get(w)?);
        additive(&projected(self.query)?, &projected(self.key)?, run.inputs.get("vec")?)
    }
}

/// `x W^T` for x `[B, N, D]` and W `[A, D]`.
pub(super) fn project(x: &Tensor, w: &Tensor) -> Result<Tensor> {
    x.broadcast_matmul(&w.t()?)
}

/// `q k^T` for q `[B, N, D]` and k `[B, M, D]`.
fn products(q: &Tensor, k: &Tensor) -> Result<Tensor> {
    q.contiguous()?.matmul(&k.transpose(1, 2)?.contiguous()?)
}

/// `vec^T tanh(q_i + k_j)` for q `[B, N, A]`, k `[B, M, A]` and vec `[A]`: `[B, N, M]`.
pub(super) fn additive(q: &Tensor, k: &Tensor, vec: &Tensor) -> Result<Tensor> {
    let hidden = q.unsqueeze(2)?.broadcast_add(&k.unsqueeze(1)?)?.tanh()?;
    hidden.broadcast_mul(vec)?.sum(D::Minus1)
}

/// The weighted sum of the keys.
struct Keys;

impl Aggregate for Keys {
    fn name(&self) -> &'static str {
        "keys"
    }

    fn aggregate(&self, weights: &Tensor, run: &mut Run) -> Result<Tensor> {
        weights.matmul(&run.inputs.get("k")?.contiguous()?)
    }
}

/// The weights themselves.
struct Weights;

impl Aggregate for Weights {
    fn name(&self) -> &'static str {
        "weights"
    }

    fn aggregate(&self, weights: &Tensor, _: &mut Run) -> Result<Tensor> {
        Ok(weights.clone())
    }
}
