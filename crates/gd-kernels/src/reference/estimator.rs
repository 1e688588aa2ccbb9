//! The soft choice over the candidates `[C]` of a row and the null slot, and the gradients that each estimator defines
//! by it. `a` are the inner products of the output's gradient with the values; the value of the null slot is 0, and so
//! is its `a`.

use super::logsumexp;
use crate::options::Estimator;

/// One number per candidate and one for the null slot (0 where there is none).
#[derive(Debug, Clone, PartialEq)]
pub struct Slots {
    /// The candidates `[C]`.
    pub candidates: Vec<f64>,
    /// The null slot.
    pub null: f64,
}

impl Slots {
    /// Applies `f` to the slots of two rows.
    fn zip(&self, other: &Self, f: impl Fn(f64, f64) -> f64) -> Self {
        let pairs = self.candidates.iter().zip(&other.candidates);
        Self { candidates: pairs.map(|(x, y)| f(*x, *y)).collect(), null: f(self.null, other.null) }
    }
}

/// The softmax of `-energy / temperature` over the candidates and, with a threshold, the null slot.
pub fn soft_choice(energy: &[f64], threshold: Option<f64>, temperature: f64) -> Slots {
    let logits = energy.iter().chain(&threshold).map(|e| -e / temperature);
    let total = logsumexp(logits.clone());
    let mut candidates: Vec<f64> = logits.map(|x| (x - total).exp()).collect();
    let null = if threshold.is_some() { candidates.pop().unwrap_or(0.0) } else { 0.0 };
    Slots { candidates, null }
}

/// `(1 - floor) p + floor / C` for the candidates, `(1 - floor) p` for the null slot.
pub fn preserved(p: &Slots, floor: f64) -> Slots {
    let even = floor / p.candidates.len() as f64;
    let candidates = p.candidates.iter().map(|p| (1.0 - floor) * p + even).collect();
    Slots { candidates, null: (1.0 - floor) * p.null }
}

/// The Jacobian of the softmax times `a`: `J(p) a = p (a - <p, a>)`.
pub fn jacobian(p: &Slots, a: &[f64]) -> Slots {
    let mean = super::dot(&p.candidates, a);
    let candidates = p.candidates.iter().zip(a).map(|(p, a)| p * (a - mean)).collect();
    Slots { candidates, null: -p.null * mean }
}

/// The gradient of the logits as an estimator defines it, for the candidates `[C]` and the null slot. `chosen` is the
/// winner, none where the row abstained.
///
/// `J(p~) a` with the preserve floor for [`Estimator::Candidates`] and [`Estimator::Dense`], `J(p) a` for
/// [`Estimator::Blend`], 0 for [`Estimator::Winner`], and for [`Estimator::Reinmax`] `2 J((p + d) / 2) a - J(p) a / 2`
/// with the one-hot choice d (Liu et al., arXiv 2304.08612).
pub fn logit_gradient(
    estimator: Estimator,
    p: &Slots,
    chosen: Option<usize>,
    a: &[f64],
    floor: f64,
) -> Slots {
    match estimator {
        Estimator::Candidates | Estimator::Dense => jacobian(&preserved(p, floor), a),
        Estimator::Blend => jacobian(p, a),
        Estimator::Winner => Slots { candidates: vec![0.0; a.len()], null: 0.0 },
        Estimator::Reinmax => {
            let hard = Slots {
                candidates: (0..a.len()).map(|j| f64::from(u8::from(Some(j) == chosen))).collect(),
                null: f64::from(u8::from(chosen.is_none())),
            };
            let middle = jacobian(&p.zip(&hard, |p, d| 0.5 * (p + d)), a);
            middle.zip(&jacobian(p, a), |middle, plain| 2.0 * middle - 0.5 * plain)
        }
    }
}

/// The factor by which the gradient of the output is added to the gradient of each candidate's value `[C]`.
pub fn value_weights(
    estimator: Estimator,
    p: &Slots,
    chosen: Option<usize>,
    floor: f64,
    value_floor: f64,
) -> Vec<f64> {
    let hard = |j| f64::from(u8::from(Some(j) == chosen));
    match estimator {
        Estimator::Blend => p.candidates.clone(),
        Estimator::Winner => (0..p.candidates.len()).map(hard).collect(),
        Estimator::Candidates | Estimator::Dense | Estimator::Reinmax => {
            let soft = preserved(p, floor).candidates;
            let mixed = |(j, p)| (1.0 - value_floor) * hard(j) + value_floor * p;
            soft.into_iter().enumerate().map(mixed).collect()
        }
    }
}
