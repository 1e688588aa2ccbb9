//! Softmax over the k greatest scores of every query: exactly k (Gupta et al., arXiv 2106.06899), or with all ties of
//! the k-th (Explicit Sparse Transformer, Zhao et al., arXiv 1912.11637).

use candle_core::{Result, Tensor};
use serde::{Deserialize, Serialize};

use super::definition::{Definition, Info};
use super::rows;
use super::stages::{Computation, Run, Stages, Support};

/// Softmax over the k greatest visible scores; the key at the lower position wins a tie. All keys where fewer are
/// visible.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct TopK {
    /// Keys per query.
    pub k: usize,
}

impl Default for TopK {
    fn default() -> Self {
        Self { k: 8 }
    }
}

impl Definition for TopK {
    const INFO: Info = Info {
        formula: "softmax over the k greatest scores, the lower position at a tie",
        source: "Gupta et al. 2021",
        parameters: &[("k", "keys per query, 1 or more")],
        ..Info::DEFAULT
    };

    fn computation(&self) -> Computation<'_> {
        let support = Greatest { k: self.k, ties: false };
        Computation::Stages(Stages { support: Some(Box::new(support)), ..Stages::default() })
    }

    fn validate(&self) -> Result<()> {
        positive(self.k)
    }
}

/// Softmax over all visible scores that are at least the k-th greatest.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ExplicitSparse {
    /// Keys per query, without further ones that tie with the last.
    pub k: usize,
}

impl Default for ExplicitSparse {
    fn default() -> Self {
        Self { k: 8 }
    }
}

impl Definition for ExplicitSparse {
    const INFO: Info = Info {
        formula: "softmax over all scores that are at least the k-th greatest",
        source: "Zhao et al. 2019",
        ..TopK::INFO
    };

    fn computation(&self) -> Computation<'_> {
        let support = Greatest { k: self.k, ties: true };
        Computation::Stages(Stages { support: Some(Box::new(support)), ..Stages::default() })
    }

    fn validate(&self) -> Result<()> {
        positive(self.k)
    }
}

fn positive(k: usize) -> Result<()> {
    if k == 0 {
        candle_core::bail!("k is 0: at least 1 key per query expected");
    }
    Ok(())
}

/// The k greatest scores of a row.
struct Greatest {
    k: usize,
    /// Whether further scores that equal the k-th belong to it.
    ties: bool,
}

impl Support for Greatest {
    fn name(&self) -> &'static str {
        if self.ties { "top-k with ties" } else { "top-k" }
    }

    fn support(&self, scores: &Tensor, visible: &Tensor, _: &mut Run) -> Result<Tensor> {
        if !self.ties {
            return rows::top_k(scores, visible, self.k);
        }
        let kth = rows::kth_greatest(scores, visible, self.k)?;
        rows::both(&scores.detach().broadcast_ge(&kth)?, visible)
    }
}
