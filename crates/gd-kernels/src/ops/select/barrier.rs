//! Conditional protection: lifts the best protected candidate that is about to be drowned.

use std::sync::Arc;

use candle_core::backend::BackendStorage;
use candle_core::{CpuStorage, CustomOp1, Layout, Result, Shape, Tensor, WithDType};

use crate::backend::cpu::element::Real;
use crate::backend::cpu::view::flat;
use crate::by_float;
use crate::ops::select::cpu::rows::for_rows;
use crate::options::{Barrier, TieBreak};

/// `energy [B, Hq, N, K] -> energy` with the barrier of `options::Barrier` applied to every row.
pub(crate) struct BarrierOp {
    pub(crate) barrier: Barrier,
    pub(crate) tie: TieBreak,
    pub(crate) slots: usize,
    pub(crate) index: Arc<Vec<i32>>,
    pub(crate) protected: Arc<Vec<u8>>,
}

/// What the barrier does to a row.
enum Effect {
    /// Nothing.
    Idle,
    /// Raises slot `at` by `strength * (margin - (s_best - s))`.
    Lift { at: usize, best: usize, score: f64, strength: f64 },
    /// Raises slot `at` to `ln(floor / (1 - floor)) + logsumexp(others)`.
    Floor { at: usize, score: f64 },
}

impl BarrierOp {
    /// Decides for one row; energies with +inf where `key` is negative.
    fn effect<A: Real>(&self, energy: &[A], key: &[i32], protected: &[u8]) -> Effect {
        let score = |j: usize| -energy[j].wide();
        let used: Vec<usize> = (0..energy.len()).filter(|&j| key[j] >= 0).collect();
        let best = |slots: &mut dyn Iterator<Item = usize>| {
            slots.reduce(|a, b| {
                let earlier = (key[b] < key[a]) == (self.tie == TieBreak::First);
                let closer = score(b) > score(a) || (score(b) == score(a) && earlier);
                if closer { b } else { a }
            })
        };
        let Some(at) = best(&mut used.iter().copied().filter(|&j| protected[j] != 0)) else {
            return Effect::Idle;
        };
        let Some(other) = best(&mut used.iter().copied().filter(|&j| j != at)) else { return Effect::Idle };
        let b = &self.barrier;
        let top = score(at).max(score(other));
        let total: f64 = used.iter().map(|&j| (score(j) - top).exp()).sum();
        let share = |j: usize| (score(j) - top).exp() / total;
        let gap = score(other) - score(at);
        let entropy = || -> f64 {
            let h: f64 = used.iter().map(|&j| share(j)).filter(|&w| w > 0.0).map(|w| -w * w.ln()).sum();
            h / (used.len() as f64).ln()
        };
        let drowned = share(at) < b.floor && gap <= b.margin + b.slack;
        let contested = || gap <= b.margin && entropy() >= b.entropy_trigger;
        if !(drowned || contested()) {
            return Effect::Idle;
        }
        let (lifted, strength) = match b.margin - gap {
            room if room > 0.0 => (score(at) + b.strength * room, b.strength),
            _ => (score(at), 0.0),
        };
        let others: f64 = used.iter().filter(|&&j| j != at).map(|&j| (score(j) - score(other)).exp()).sum();
        let others = score(other) + others.ln();
        let weight = 1.0 / (1.0 + (others - lifted).exp());
        if weight < b.floor {
            Effect::Floor { at, score: (b.floor / (1.0 - b.floor)).ln() + others }
        } else {
            Effect::Lift { at, best: other, score: lifted, strength }
        }
    }

    fn row(&self, row: usize) -> (&[i32], &[u8]) {
        let range = row * self.slots..(row + 1) * self.slots;
        (&self.index[range.clone()], &self.protected[range])
    }

    fn forward<A: Real>(&self, energy: &[A]) -> Vec<A> {
        let mut out = energy.to_vec();
        for_rows(
            &mut out,
            self.slots,
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

    fn backward<A: Real>(&self, energy: &[A], grad: &[A]) -> Vec<A> {
        let mut out = grad.to_vec();
        for_rows(
            &mut out,
            self.slots,
            || (),
            |row, (), out| {
                let (key, protected) = self.row(row);
                let energy = &energy[row * self.slots..(row + 1) * self.slots];
                match self.effect(energy, key, protected) {
                    Effect::Idle => {}
                    Effect::Lift { at, best, strength, .. } => {
                        let g = out[at].wide();
                        out[at] = A::of(g * (1.0 + strength));
                        out[best] += A::of(-g * strength);
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

impl CustomOp1 for BarrierOp {
    fn name(&self) -> &'static str {
        "barrier"
    }

    fn cpu_fwd(&self, energy: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        by_float!("select", energy.dtype(), T => {
            type A = <T as crate::backend::cpu::element::Element>::Acc;
            let out = self.forward(flat::<A>(energy, layout)?);
            Ok((A::to_cpu_storage_owned(out), layout.shape().clone()))
        })
    }

    fn bwd(&self, energy: &Tensor, _: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
        by_float!("select", energy.dtype(), T => {
            type A = <T as crate::backend::cpu::element::Element>::Acc;
            let (e, g) = (energy.flatten_all()?.to_vec1::<A>()?, grad.flatten_all()?.to_vec1::<A>()?);
            Ok(Some(Tensor::from_vec(self.backward(&e, &g), energy.shape(), energy.device())?))
        })
    }
}
