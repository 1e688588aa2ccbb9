//! The input of the reference operators.
//!
//! Shapes: q `[B, Hq, N, D]`, k `[B, Hk, M, D]`, v `[B, Hk, M, Dv]`, prior `[B, Hq, M]`, protected
//! `[B, Hq, N, P]`, per-head parameters `[Hq]`, refinement weights `[Hq, R]`; all row-major.

use std::ops::Range;

use crate::mask::Mask;
use crate::options::{Barrier, CandidateGradient, CoherenceMode, Estimator, Gate, Score, TieBreak};

/// Sizes, tensors and scoring rules of one call.
#[derive(Debug, Clone, Default)]
pub struct Problem {
    /// B.
    pub batch: usize,
    /// Hq, a multiple of Hk.
    pub q_heads: usize,
    /// Hk.
    pub kv_heads: usize,
    /// N.
    pub queries: usize,
    /// M.
    pub keys: usize,
    /// D.
    pub dim: usize,
    /// Dv.
    pub value_dim: usize,
    /// Queries `[B, Hq, N, D]`.
    pub q: Vec<f64>,
    /// Keys `[B, Hk, M, D]`.
    pub k: Vec<f64>,
    /// Values `[B, Hk, M, Dv]`; may be empty for a scan.
    pub v: Vec<f64>,
    /// Inverse bandwidth `[Hq]`.
    pub beta: Vec<f64>,
    /// Key prior `[B, Hq, M]`.
    pub prior: Option<Vec<f64>>,
    /// Protected keys `[B, Hq, N, P]`, padded with -1.
    pub protected: Option<Vec<i32>>,
    /// Which keys a query may see.
    pub mask: Mask,
    /// How a key is scored.
    pub score: Score,
    /// Which of several keys with the same energy comes first.
    pub tie: TieBreak,
}

/// The parameters of the choice among the candidates.
#[derive(Debug, Clone)]
pub struct Params {
    /// Threshold tau `[Hq]` or `[B, Hq, N]`; without one every candidate is admitted and there is no null slot.
    pub threshold: Option<Vec<f64>>,
    /// Weight of the query's well `[Hq]`, in (0, 1).
    pub alpha: Option<Vec<f64>>,
    /// Refinement weights `[Hq, R]`; without them one round of weight 1.
    pub rounds: Option<Vec<f64>>,
    /// The factor of the selected row.
    pub gate: Gate,
    /// The least energy gate of a candidate that can be selected.
    pub exclude_below: f64,
    /// The number of candidates that are read.
    pub picks: usize,
    /// The gradient of the choice.
    pub estimator: Estimator,
    /// The temperature T of the soft choice.
    pub temperature: f64,
    /// The preserve floor f.
    pub preserve_floor: f64,
    /// Temperature, scale and null slot of the soft choice that the estimators use.
    pub gradient: CandidateGradient,
    /// The share lambda of the gradient of the values that is weighted by the soft choice.
    pub value_floor: f64,
    /// The share h of the hard choice in the forward pass.
    pub hardness: f64,
    /// Conditional protection.
    pub barrier: Option<Barrier>,
    /// Which root of the coherence equation is taken.
    pub coherence: CoherenceMode,
}

impl Default for Params {
    fn default() -> Self {
        Self {
            threshold: None,
            alpha: None,
            rounds: None,
            gate: Gate::None,
            exclude_below: 0.5,
            picks: 1,
            estimator: Estimator::Candidates,
            temperature: 1.0,
            preserve_floor: 0.0,
            gradient: CandidateGradient::default(),
            value_floor: 0.0,
            hardness: 1.0,
            barrier: None,
            coherence: CoherenceMode::Global,
        }
    }
}

impl Params {
    /// The number R of refinement rounds.
    pub fn round_count(&self, q_heads: usize) -> usize {
        self.rounds.as_ref().map_or(1, |w| w.len() / q_heads)
    }

    /// The index of the threshold of row `row`, which is of head `h`, among `rows` rows.
    pub fn threshold_at(&self, (row, h): (usize, usize), rows: usize) -> usize {
        if self.threshold.as_ref().is_some_and(|tau| tau.len() == rows) { row } else { h }
    }

    /// Whether a candidate of this energy can be selected at this threshold.
    pub fn admits(&self, energy: f64, threshold: Option<f64>) -> bool {
        let Some(tau) = threshold else { return true };
        match self.gate {
            // Compared as energies: rho rounds to 0 and 1.
            Gate::Energy { temperature } | Gate::Margin { temperature } => {
                energy <= tau + temperature * (1.0 / self.exclude_below - 1.0).ln()
            }
            Gate::None | Gate::Coherence => energy <= tau,
        }
    }

    /// The share of the hard choice: `Blend` has none.
    pub fn hard_share(&self) -> f64 {
        if self.estimator == Estimator::Blend { 0.0 } else { self.hardness }
    }
}

impl Problem {
    /// The rows `(b, h, i)` (batch entry, query head, query) in storage order, each with its number.
    pub fn rows(&self) -> impl Iterator<Item = (usize, (usize, usize, usize))> + use<> {
        let (heads, queries) = (self.q_heads, self.queries);
        (0..self.row_count())
            .map(move |row| (row, (row / (heads * queries), row / queries % heads, row % queries)))
    }

    /// The number of rows B Hq N.
    pub fn row_count(&self) -> usize {
        self.batch * self.q_heads * self.queries
    }

    /// The range of a query in `q`.
    pub fn q_at(&self, b: usize, h: usize, i: usize) -> Range<usize> {
        span((b * self.q_heads + h) * self.queries + i, self.dim)
    }

    /// The range in `k` of key `j` as query head `h` reads it.
    pub fn k_at(&self, b: usize, h: usize, j: usize) -> Range<usize> {
        span(self.kv_row(b, h, j), self.dim)
    }

    /// The range in `v` of key `j` as query head `h` reads it.
    pub fn v_at(&self, b: usize, h: usize, j: usize) -> Range<usize> {
        span(self.kv_row(b, h, j), self.value_dim)
    }

    /// The index in `prior` of key `j` for query head `h`.
    pub fn prior_at(&self, b: usize, h: usize, j: usize) -> usize {
        (b * self.q_heads + h) * self.keys + j
    }

    /// The prior of key `j` for query head `h`; 0 without a prior.
    pub fn prior_of(&self, b: usize, h: usize, j: usize) -> f64 {
        self.prior.as_ref().map_or(0.0, |prior| prior[self.prior_at(b, h, j)])
    }

    fn kv_row(&self, b: usize, h: usize, j: usize) -> usize {
        (b * self.kv_heads + h / (self.q_heads / self.kv_heads)) * self.keys + j
    }
}

fn span(row: usize, width: usize) -> Range<usize> {
    row * width..(row + 1) * width
}
