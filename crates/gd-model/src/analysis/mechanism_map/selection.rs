//! Selection attention on the map, by the operators `scan` and `select`.

use candle_core::{DType, Tensor};
use gd_kernels::{Barrier, Gate, Mask, Scan, Select, scan, select};

use super::quantile;
use super::recall::Recall;
use super::responses::{Responses, Tuned, tuned_beta};
use crate::error::Result;

/// Candidates of a query, besides the protected keys.
const CANDIDATES: usize = 8;
/// Protected keys: the first ones of the bank.
const PROTECTED: i32 = 8;
/// The barrier of the recorded demo (`tests/fixtures/beacon`).
const BARRIER: Barrier =
    Barrier { floor: 0.18, margin: 1.45, strength: 2.8, entropy_trigger: 0.63, slack: 0.45 };
/// Temperature of the consistency gate.
const TEMPERATURE: f64 = 1.0;
/// Weight of the query's well.
const ALPHA: f64 = 0.5;
/// Share of the tuning split that a threshold on the energy rejects, and that one on the margin rejects.
const REJECTED_BY_ENERGY: f64 = 0.1;
const REJECTED_BY_MARGIN: f64 = 0.2;

/// Which part of selection attention the map shows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Selection {
    /// A threshold on the energy.
    Threshold(Protection),
    /// A threshold and the consistency gate, which is the confidence.
    EnergyGate,
    /// The coherence gate, which is the confidence.
    CoherenceGate,
    /// A threshold on the margin, applied to the answers.
    Margin,
}

/// Whether keys are protected.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Protection {
    None,
    Barrier,
}

/// Results of one run of the operators, for queries `[Q]`.
struct Run {
    out: Tensor,
    index: Vec<i32>,
    /// Plus infinity where the head abstained.
    energy: Vec<f64>,
    margin: Vec<f64>,
    gate: Vec<f64>,
}

impl Selection {
    /// Whether it abstains by a rule.
    pub(super) fn abstains(self) -> bool {
        self != Self::CoherenceGate
    }

    fn run(self, [q, k, v]: [&Tensor; 3], beta: f64, threshold: Option<f64>) -> Result<Run> {
        let batch = |x: &Tensor| x.unsqueeze(0)?.unsqueeze(0);
        let (q, k, v) = (batch(q)?, batch(k)?, batch(v)?);
        let number = |x: f64| Tensor::new(&[x], q.device());
        let (beta, alpha, mask) = (number(beta)?, number(ALPHA)?, Mask::none());
        let threshold = threshold.map(number).transpose()?;
        let protected = Tensor::arange(0, PROTECTED, q.device())?.reshape((1, 1, 1, ()))?;
        let mut scan_options = Scan::new(&beta, &mask, CANDIDATES);
        let mut options = Select::new(&beta).with_threshold(&threshold);
        match self {
            Self::Threshold(Protection::Barrier) => {
                scan_options = scan_options.with_protected(&protected);
                options = options.with_barrier(BARRIER);
            }
            // Without a threshold, in a first run to find one, there is no gate.
            Self::EnergyGate if threshold.is_some() => {
                options = options.with_gate(Gate::Energy { temperature: TEMPERATURE });
            }
            Self::CoherenceGate => options = options.with_alpha(&alpha).with_gate(Gate::Coherence),
            Self::Threshold(Protection::None) | Self::EnergyGate | Self::Margin => {}
        }
        let selected = select(&q, &k, &v, &scan(&q, &k, &scan_options)?, &options)?;
        let numbers = |t: &Tensor| t.to_dtype(DType::F64)?.flatten_all()?.to_vec1::<f64>();
        Ok(Run {
            out: selected.y.squeeze(0)?.squeeze(0)?,
            index: selected.index.flatten_all()?.to_vec1()?,
            energy: numbers(&selected.energy)?,
            margin: numbers(&selected.margin)?,
            gate: numbers(&selected.gate)?,
        })
    }

    /// The threshold that rejects its share of the queries: on the energy, or for [`Selection::Margin`] on the margin.
    fn threshold(self, [q, k, v]: [&Tensor; 3], beta: f64) -> Result<f64> {
        let run = self.run([q, k, v], beta, None)?;
        let (mut figures, share) = match self {
            Self::Margin => (run.margin, REJECTED_BY_MARGIN),
            _ => (run.energy, 1.0 - REJECTED_BY_ENERGY),
        };
        figures.sort_by(f64::total_cmp);
        Ok(quantile(&figures, share))
    }

    /// Tunes the inverse bandwidth, with a threshold of its own for each, by the mean squared error.
    pub(super) fn tune(self, recall: &Recall) -> Result<Tuned> {
        let tensors = [&recall.tuning.q, &recall.keys, &recall.values];
        let tuned =
            |beta: f64| Ok::<_, crate::Error>(Tuned { beta, threshold: self.threshold(tensors, beta)? });
        let [q, k, v] = tensors;
        let beta = tuned_beta(recall, |beta| self.respond(q, k, v, tuned(beta)?))?;
        tuned(beta)
    }

    /// The answers to q `[Q, 16]` over k `[n, 16]` and v `[n, Dv]`.
    pub(super) fn respond(self, q: &Tensor, k: &Tensor, v: &Tensor, tuned: Tuned) -> Result<Responses> {
        let threshold = matches!(self, Self::Threshold(_) | Self::EnergyGate).then_some(tuned.threshold);
        let run = self.run([q, k, v], tuned.beta, threshold)?;
        match self {
            Self::Threshold(_) => {
                let confidence: Vec<f64> = run.energy.iter().map(|energy| -energy).collect();
                Responses::of_selection(run.out, &run.index, &confidence)
            }
            Self::EnergyGate | Self::CoherenceGate => Responses::of_selection(run.out, &run.index, &run.gate),
            Self::Margin => {
                let answers = Responses::of_selection(run.out, &run.index, &run.margin)?;
                answers.rejected_below(tuned.threshold, run.margin)
            }
        }
    }

    /// The weights `[R, n]` of q `[R, D]` over k `[n, D]`; 0 in rows that are not answered.
    pub(super) fn weights(self, q: &Tensor, k: &Tensor, beta: f64) -> Result<Tensor> {
        // With the unit matrix as values, outputs are weights.
        let values = Tensor::eye(k.dim(0)?, k.dtype(), k.device())?;
        let threshold = self.threshold([q, k, &values], beta)?;
        Ok(self.respond(q, k, &values, Tuned { beta, threshold })?.out)
    }
}
