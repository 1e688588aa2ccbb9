//! Pointer networks (Vinyals, arXiv 1506.03134), over decoder states `[B, N, Dd]` and encoder states `[B, M, De]`.

use candle_core::{Result, Tensor};
use serde::{Deserialize, Serialize};

use super::additive::{Additive, OUTSIDE};
use super::definition::{Definition, Info};
use super::stages::{Aggregate, Computation, Run, Stages};

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
