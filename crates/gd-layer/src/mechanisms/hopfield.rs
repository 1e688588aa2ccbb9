//! Modern Hopfield networks (Ramsauer et al., arXiv 2008.02217): attention as retrieval of stored patterns.

use candle_core::{D, Result, Tensor};
use serde::{Deserialize, Serialize};

use super::definition::{Definition, Info};
use super::dot::{dot, grouped_matmul};
use super::masks::Given;
use super::rows::{count, log_sum_exp, row_max, softmax};
use super::stages::{Computation, Mask, Run, Score, Stages};

/// The state starts at the query, moves `updates` times to the retrieved pattern, xi <- softmax(beta xi k^T) k, and then
/// reads the values with softmax(beta xi k^T) v. Without updates and with beta 1/sqrt(D) it is softmax attention.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Hopfield {
    /// The inverse temperature beta, above 0; none for 1/sqrt(D).
    pub beta: Option<f64>,
    /// Updates T of the state.
    #[serde(rename = "T")]
    pub updates: usize,
}

impl Definition for Hopfield {
    const INFO: Info = Info {
        formula: "T times xi <- softmax(beta xi k^T) k from xi = q; softmax(beta xi k^T) v",
        source: "Ramsauer et al. 2021",
        parameters: &[
            ("beta", "inverse temperature, above 0; 1/sqrt(D) if absent"),
            ("T", "updates of the state, 0 or more"),
        ],
        memory: "(T + 1) N x M",
        ..Info::DEFAULT
    };

    fn computation(&self) -> Computation<'_> {
        Computation::Stages(Stages { score: Box::new(Retrieval(self.clone())), ..Stages::default() })
    }

    /// At least one update: without updates it is softmax attention.
    fn at_context(&self, _tokens: usize) -> Self {
        Self { updates: self.updates.max(1), ..self.clone() }
    }

    fn validate(&self) -> Result<()> {
        match self.beta {
            Some(beta) if !(beta > 0.0 && beta.is_finite()) => {
                candle_core::bail!("beta {beta}: a number above 0 expected")
            }
            _ => Ok(()),
        }
    }
}

/// The scores of the keys for the state after all updates. Without a mask it also returns that state as `state.T`, and
/// the energies of the states on the way as `E.0`, `E.1`, ..
struct Retrieval(Hopfield);

impl Score for Retrieval {
    fn name(&self) -> &'static str {
        "retrieval"
    }

    fn score(&self, run: &mut Run) -> Result<Tensor> {
        let (q, k) = (run.inputs.get("q")?, run.inputs.get("k")?);
        let beta = self.0.beta.unwrap_or((q.dim(D::Minus1)? as f64).sqrt().recip());
        let mut state = q.clone();
        let mut scores = (dot(&state, k)? * beta)?;
        let visible = Given.mask(&scores, run)?;
        let unmasked = run.inputs.optional("mask").is_none();
        for update in 0..=self.0.updates {
            if unmasked {
                let energy = energy(&state, k, &scores, &visible, beta)?;
                run.outputs.insert(&format!("E.{update}"), energy);
            }
            if update < self.0.updates {
                state = grouped_matmul(&softmax(&scores, &visible)?, k)?;
                scores = (dot(&state, k)? * beta)?;
            }
        }
        if unmasked {
            run.outputs.insert(&format!("state.{}", self.0.updates), state);
        }
        Ok(scores)
    }
}

/// The energy `-lse(beta xi k^T) / beta + |xi|^2 / 2 + ln(n) / beta + max |k|^2 / 2` of states `[B, H, N, D]` with their
/// scores `[B, H, N, M]`, over the n visible keys: `[B, H, N]`. Updates never increase it.
fn energy(state: &Tensor, k: &Tensor, scores: &Tensor, visible: &Tensor, beta: f64) -> Result<Tensor> {
    let lse = (log_sum_exp(scores, visible)? / beta)?;
    let keys = (count(visible, scores.dtype())?.log()? / beta)?;
    let half_norm = |t: &Tensor| t.sqr()?.sum_keepdim(D::Minus1)? * 0.5;
    // The norms of the keys for every query: 1 times |k|^2.
    let ones = half_norm(state)?.ones_like()?;
    let norms = grouped_matmul(&ones, &half_norm(k)?.transpose(2, 3)?)?;
    let greatest = row_max(&norms, visible)?;
    ((half_norm(state)? - lse)? + (keys + greatest)?)?.squeeze(D::Minus1)
}
