//! Conditional protection of one row of scores `[C]` (a score is minus an energy).

use super::logsumexp;
use crate::options::Barrier;

/// A row after the barrier.
#[derive(Debug, Clone)]
pub struct Lift {
    /// The scores after the barrier `[C]`; at most that of the protected candidate differs.
    pub scores: Vec<f64>,
    /// The protected candidate of greatest score, if the row has one.
    pub protected: Option<usize>,
    /// Whether the conditions of the barrier were met.
    pub activated: bool,
    /// The candidate of greatest score after the barrier, the first of several; 0 for an empty row.
    pub selected: usize,
    /// The derivative of the protected candidate's new score with respect to the old scores `[C]`, with the conditions
    /// held fixed.
    pub slope: Vec<f64>,
}

impl Lift {
    /// The gradient of the old scores `[C]` from that of the new ones.
    pub fn pull_back(&self, gradient: &[f64]) -> Vec<f64> {
        let mut out = gradient.to_vec();
        if let Some(p) = self.protected {
            out[p] = 0.0;
            super::add_scaled(&mut out, gradient[p], &self.slope);
        }
        out
    }
}

/// The entropy of a row of weights divided by its maximum `ln C`, in [0, 1]; 0 for less than two weights.
pub fn normalised_entropy(weights: &[f64]) -> f64 {
    if weights.len() < 2 {
        return 0.0;
    }
    let entropy: f64 = weights.iter().filter(|w| **w > 0.0).map(|w| -w * w.ln()).sum();
    entropy / (weights.len() as f64).ln()
}

/// Applies the barrier to the protected candidate with the greatest score: where its softmax weight is below the floor,
/// or the row is contested, its score is raised towards that of the rival, and at least to the weight of the floor; see
/// [`Barrier`].
pub fn barrier(scores: &[f64], protected: &[bool], barrier: &Barrier) -> Lift {
    let candidates = (0..scores.len()).filter(|&j| protected[j]);
    let p = candidates.reduce(|greatest, j| if scores[j] > scores[greatest] { j } else { greatest });
    let slope = (0..scores.len()).map(|j| f64::from(u8::from(Some(j) == p))).collect();
    let mut lift = Lift { scores: scores.to_vec(), protected: p, activated: false, selected: 0, slope };
    if let (Some(p), true) = (p, scores.len() > 1) {
        let total = logsumexp(scores.iter().copied());
        let weights: Vec<f64> = scores.iter().map(|s| (s - total).exp()).collect();
        let rival = greatest(scores, Some(p));
        let gap = scores[rival] - scores[p];
        let below_floor = weights[p] < barrier.floor && gap <= barrier.margin + barrier.slack;
        let contested = gap <= barrier.margin && normalised_entropy(&weights) >= barrier.entropy_trigger;
        if below_floor || contested {
            lift.activated = true;
            if gap < barrier.margin {
                lift.scores[p] += barrier.strength * (barrier.margin - gap);
                lift.slope[p] += barrier.strength;
                lift.slope[rival] -= barrier.strength;
            }
            let others = logsumexp((0..scores.len()).filter(|&j| j != p).map(|j| scores[j]));
            let weight = super::sigmoid(lift.scores[p] - others);
            if weight < barrier.floor {
                lift.scores[p] = (barrier.floor / (1.0 - barrier.floor)).ln() + others;
                lift.slope = scores.iter().map(|s| (s - others).exp()).collect();
                lift.slope[p] = 0.0;
            }
        }
    }
    lift.selected = greatest(&lift.scores, None);
    lift
}

/// The position of the first greatest score, other than `except`.
fn greatest(scores: &[f64], except: Option<usize>) -> usize {
    let others = (0..scores.len()).filter(|&j| Some(j) != except);
    others.reduce(|greatest, j| if scores[j] > scores[greatest] { j } else { greatest }).unwrap_or(0)
}
