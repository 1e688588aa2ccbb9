//! Bahdanau attention (arXiv 1409.0473), over decoder states q `[B, N, Dq]` and encoder states k `[B, M, Dk]`.

use serde::{Deserialize, Serialize};

use super::additive::{Additive, Keys, OUTSIDE, STATES};
use super::definition::{Definition, Info};
use super::stages::{Computation, Stages};

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
