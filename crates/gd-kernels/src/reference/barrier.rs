//! Conditional protection of one row of scores `[C]` (a score is minus an energy).

use super::logsumexp;
use crate::options::Barrier;

/// What the barrier made of a row.
#[derive(Debug, Clone)]
pub struct Lift {
    /// The scores after it `[C]`; at most the protected one differs.
    pub scores: Vec<f64>,
    /// The protected candidate of greatest score, if the row has one.
    pub protected: Option<usize>,
    /// Whether the conditions were met.
    pub activated: bool,
    /// The greatest score after it, the first of equals; 0 for an empty row.
    pub selected: usize,
    /// The derivative of the protected candidate's new score in the old scores `[C]`, with the
    /// conditions held fixed.
    pub slope: Vec<f64>,
}

impl Lift {
    /// Carries a gradient of the new scores back to the old ones.
    pub fn pull_back(&self, gradient: &[f64]) -> Vec<f64> {
        let mut out = gradient.to_vec();
        if let Some(p) = self.protected {
            out[p] = 0.0;
            super::add_scaled(&mut out, gradient[p], &self.slope);
        }
        out
    }
}

/// Entropy of a row of weights over its maximum, in [0, 1]; 0 for fewer than two.
pub fn normalised_entropy(weights: &[f64]) -> f64 {
    if weights.len() < 2 {
        return 0.0;
    }
    let entropy: f64 = weights.iter().filter(|w| **w > 0.0).map(|w| -w * w.ln()).sum();
    entropy / (weights.len() as f64).ln()
}

/// Applies the barrier to the protected candidate with the greatest score.
pub fn barrier(scores: &[f64], protected: &[bool], barrier: &Barrier) -> Lift {
    let guarded = (0..scores.len()).filter(|&j| protected[j]);
    let p = guarded.reduce(|greatest, j| if scores[j] > scores[greatest] { j } else { greatest });
    let slope = (0..scores.len()).map(|j| f64::from(u8::from(Some(j) == p))).collect();
    let mut lift = Lift { scores: scores.to_vec(), protected: p, activated: false, selected: 0, slope };
    if let (Some(p), true) = (p, scores.len() > 1) {
        let total = logsumexp(scores.iter().copied());
        let weights: Vec<f64> = scores.iter().map(|s| (s - total).exp()).collect();
        let rival = greatest(scores, Some(p));
        let gap = scores[rival] - scores[p];
        let faint = weights[p] < barrier.floor && gap <= barrier.margin + barrier.slack;
        let contested = gap <= barrier.margin && normalised_entropy(&weights) >= barrier.entropy_trigger;
        if faint || contested {
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

/// The first greatest score, `except` left out.
fn greatest(scores: &[f64], except: Option<usize>) -> usize {
    let open = (0..scores.len()).filter(|&j| Some(j) != except);
    open.reduce(|greatest, j| if scores[j] > scores[greatest] { j } else { greatest }).unwrap_or(0)
}
