//! Scores by small networks, for decoder states and encoder states, and what the mechanisms with such scores share.
//!
//! Shapes: q `[B, N, Dq]`, k `[B, M, Dk]`; scores and weights `[B, N, M]`, not scaled.

use candle_core::{D, Result, Tensor};

use super::definition::Named;
use super::indices::project;
use super::stages::{Aggregate, Run, Score};

/// Why a layer of a model cannot have them.
pub(super) const OUTSIDE: Option<&str> = Some("it scores encoder states for decoder states, without heads");
/// Decoder states and encoder states.
pub(super) const STATES: &[Named] = &[("q", "[B,N,Dq]"), ("k", "[B,M,Dk]")];

/// `vec^T tanh(W q + U k)`, with the names of q and W and of k and U.
pub(super) struct Additive {
    pub(super) query: (&'static str, &'static str),
    pub(super) key: (&'static str, &'static str),
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

/// `vec^T tanh(q_i + k_j)` for q `[B, N, A]`, k `[B, M, A]` and vec `[A]`: `[B, N, M]`.
pub(super) fn additive(q: &Tensor, k: &Tensor, vec: &Tensor) -> Result<Tensor> {
    let hidden = q.unsqueeze(2)?.broadcast_add(&k.unsqueeze(1)?)?.tanh()?;
    hidden.broadcast_mul(vec)?.sum(D::Minus1)
}

/// The weighted sum of the keys.
pub(super) struct Keys;

impl Aggregate for Keys {
    fn name(&self) -> &'static str {
        "keys"
    }

    fn aggregate(&self, weights: &Tensor, run: &mut Run) -> Result<Tensor> {
        weights.matmul(&run.inputs.get("k")?.contiguous()?)
    }
}
