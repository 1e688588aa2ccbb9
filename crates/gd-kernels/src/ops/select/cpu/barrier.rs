//! Conditional protection: raises the score of the protected candidate of least energy where the barrier is active.

use std::sync::Arc;

use super::Keys;
use super::loops::for_rows;
use crate::backend::cpu::element::Real;
use crate::options::{Barrier, TieBreak};

/// `energy [B, Hq, N, K] -> energy` with the [`Barrier`] applied to every row.
pub(super) struct Lift {
    pub(super) barrier: Barrier,
    pub(super) tie: TieBreak,
    pub(super) keys: Arc<Keys>,
    /// 1 for protected candidates `[B, Hq, N, K]`.
    pub(super) protected: Vec<u8>,
}

/// The change of a row by the barrier.
enum Effect {
    /// Nothing.
    Idle,
    /// Raises slot `at` by `strength * (margin - (s_rival - s))`.
    Lift { at: usize, rival: usize, score: f64, strength: f64 },
    /// Raises slot `at` to `ln(floor / (1 - floor)) + logsumexp(others)`.
    Floor { at: usize, score: f64 },
}

impl Lift {
    /// The change of one row, of which slots with a negative `key` are unused.
    fn effect<A: Real>(&self, energy: &[A], key: &[i32], protected: &[u8]) -> Effect {
        let score = |j: usize| -energy[j].wide();
        let used: Vec<usize> = (0..energy.len()).filter(|&j| key[j] >= 0).collect();
        let lowest_energy = |slots: &mut dyn Iterator<Item = usize>| {
            slots.reduce(|a, b| {
                let earlier = (key[b] < key[a]) == (self.tie == TieBreak::First);
                let closer = score(b) > score(a) || (score(b) == score(a) && earlier);
                if closer { b } else { a }
            })
        };
        let Some(at) = lowest_energy(&mut used.iter().copied().filter(|&j| protected[j] != 0)) else {
            return Effect::Idle;
        };
        let Some(other) = lowest_energy(&mut used.iter().copied().filter(|&j| j != at)) else {
            return Effect::Idle;
        };
        let b = &self.barrier;
        let top = score(at).max(score(other));
        let total: f64 = used.iter().map(|&j| (score(j) - top).exp()).sum();
        let share = |j: usize| (score(j) - top).exp() / total;
        let gap = score(other) - score(at);
        let entropy = || -> f64 {
            let h: f64 = used.iter().map(|&j| share(j)).filter(|&w| w > 0.0).map(|w| -w * w.ln()).sum();
            h / (used.len() as f64).ln()
        };
        let below_floor = share(at) < b.floor && gap <= b.margin + b.slack;
        let contested = || gap <= b.margin && entropy() >= b.entropy_trigger;
        if !(below_floor || contested()) {
            return Effect::Idle;
        }
        let (lifted, strength) = match b.margin - gap {
            shortfall if shortfall > 0.0 => (score(at) + b.strength * shortfall, b.strength),
            _ => (score(at), 0.0),
        };
        let others: f64 = used.iter().filter(|&&j| j != at).map(|&j| (score(j) - score(other)).exp()).sum();
        let others = score(other) + others.ln();
        let weight = 1.0 / (1.0 + (others - lifted).exp());
        if weight < b.floor {
            Effect::Floor { at, score: (b.floor / (1.0 - b.floor)).ln() + others }
        } else {
            Effect::Lift { at, rival: other, score: lifted, strength }
        }
    }

    fn row(&self, row: usize) -> (&[i32], &[u8]) {
        let slots = self.keys.sizes.slots;
        (self.keys.row(row), &self.protected[row * slots..(row + 1) * slots])
    }

    /// The energies after the barrier.
    pub(super) fn forward<A: Real>(&self, energy: &[A]) -> Vec<A> {
        let mut out = energy.to_vec();
        for_rows(
            &mut out,
            self.keys.sizes.slots,
            || (),
            |row, (), out| {
                let (key, protected) = self.row(row);
                match self.effect(out, key, protected) {
                    Effect::Idle => {}
                    Effect::Lift { at, score, .. } | Effect::Floor { at, score } => out[at] = A::of(-score),
                }
            },
        );
        out
    }

    /// The gradient of the energies before the barrier.
    pub(super) fn backward<A: Real>(&self, energy: &[A], grad: &[A]) -> Vec<A> {
        let mut out = grad.to_vec();
        for_rows(
            &mut out,
            self.keys.sizes.slots,
            || (),
            |row, (), out| {
                let (key, protected) = self.row(row);
                let energy = &energy[row * key.len()..(row + 1) * key.len()];
                match self.effect(energy, key, protected) {
                    Effect::Idle => {}
                    Effect::Lift { at, rival, strength, .. } => {
                        let g = out[at].wide();
                        out[at] = A::of(g * (1.0 + strength));
                        out[rival] += A::of(-g * strength);
                    }
                    Effect::Floor { at, .. } => {
                        let g = out[at].wide();
                        out[at] = A::of(0.0);
                        let others: Vec<usize> = (0..key.len()).filter(|&j| key[j] >= 0 && j != at).collect();
                        let least = others.iter().map(|&j| energy[j].wide()).fold(f64::INFINITY, f64::min);
                        let weight = |j: usize| (least - energy[j].wide()).exp();
                        let total: f64 = others.iter().map(|&j| weight(j)).sum();
                        others.iter().for_each(|&j| out[j] += A::of(g * weight(j) / total));
                    }
                }
            },
        );
        out
    }
}
