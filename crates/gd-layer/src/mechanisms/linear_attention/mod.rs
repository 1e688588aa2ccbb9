//! Linear attention (Katharopoulos et al. 2020, arXiv 2006.16236): a kernel in place of the softmax, with a state of
//! constant size in place of a cache of keys and values.

mod chunk;
mod recurrence;
mod state;

use candle_core::{Result, bail};
use serde::{Deserialize, Serialize};

pub use self::recurrence::{linear_attention, packed_linear_attention};
pub use self::state::LinearAttentionState;
use super::definition::{Definition, Info, Reads, Sizes, State};
use super::inputs::{Inputs, Outputs};
use super::stages::Computation;

/// Linear attention with the features elu(x) + 1.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct LinearAttention {
    /// Whether a query reads keys at or before its own position only.
    pub causal: bool,
}

impl Default for LinearAttention {
    fn default() -> Self {
        Self { causal: true }
    }
}

impl Definition for LinearAttention {
    const INFO: Info = Info {
        formula: "f(q) . sum_j f(k_j) v_j^T / (f(q) . sum_j f(k_j)), f(x) = elu(x) + 1",
        source: "Katharopoulos et al. 2020",
        constants: &[
            ("outer", "[B,Hk,D,Dv], state, optional"),
            ("normaliser", "[B,Hk,D,1], state, optional"),
            ("query_positions", "[B,N], optional: positions within the own sequence, if causal"),
        ],
        parameters: &[("causal", "true: keys at or before the query, N = M")],
        memory: "N x 64 + D x Dv per head",
        independent_queries: false,
        reads: Reads::Sequence,
        state: State::Constant(&["outer", "normaliser"]),
        ..Info::DEFAULT
    };

    fn computation(&self) -> Computation<'_> {
        Computation::whole("features > sums over keys > quotient", |inputs| {
            let (q, k, v) = (inputs.get("q")?, inputs.get("k")?, inputs.get("v")?);
            let state = given_state(inputs)?;
            let (out, state) = match inputs.optional("query_positions").filter(|_| self.causal) {
                Some(at) => packed_linear_attention(q, k, v, at, state.as_ref())?,
                None => linear_attention(q, k, v, self.causal, state.as_ref())?,
            };
            let mut outputs = Outputs::default();
            outputs.insert("out", out);
            outputs.insert("outer", state.outer);
            outputs.insert("normaliser", state.normaliser);
            Ok(outputs)
        })
    }

    fn validate_in_layer(&self, _sizes: &Sizes) -> Result<()> {
        if !self.causal {
            bail!("causal false: a layer of a model reads earlier positions only");
        }
        Ok(())
    }
}

/// The state among the inputs.
fn given_state(inputs: &Inputs) -> Result<Option<LinearAttentionState>> {
    let Some(outer) = inputs.optional("outer") else { return Ok(None) };
    Ok(Some(LinearAttentionState { outer: outer.clone(), normaliser: inputs.get("normaliser")?.clone() }))
}
