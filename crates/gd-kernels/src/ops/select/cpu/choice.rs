//! The choice of one value row, or of none, from the energies of the candidates.

use std::sync::Arc;

use super::Keys;
use super::loops::{for_rows, for_rows2, head_sums, key_gradient};
use super::row::{Row, RowRule, Scratch, backward, choose, weights};
use crate::backend::cpu::element::{Element, Real, sum2};
use crate::backend::cpu::view::View;
use crate::ops::select::Rule;

/// `(energy [B, Hq, N, K], v [B, Hk, M, Dv], threshold [Hq] or [B, Hq, N]) -> y [B, Hq, N, Dv]`; energy and
/// threshold in the accumulator type, a threshold of +inf excludes nothing.
pub(super) struct Choice {
    pub(super) rule: Rule,
    pub(super) keys: Arc<Keys>,
}

/// The choice of every row, `[B, Hq, N]` each.
pub(super) struct Choices<A> {
    /// The winning slot of the row; -1 where it abstains.
    pub(super) slot: Vec<i32>,
    /// Its key; -1 where the row abstains.
    pub(super) index: Vec<i32>,
    /// The key of least energy, admitted or not; -1 in a row without candidates.
    pub(super) nearest: Vec<i32>,
    /// The energy of the winner; +inf where the row abstains.
    pub(super) energy: Vec<A>,
    /// Energy of the runner-up that the threshold admits minus that of the winner; +inf without one.
    pub(super) margin: Vec<A>,
    /// The energy gate, 1 without one; 0 where the row abstains.
    pub(super) gate: Vec<A>,
}

impl Choice {
    /// The threshold of a row, from one per row or one per head.
    #[inline(always)]
    fn threshold<A: Copy>(&self, tau: &[A], row: usize) -> A {
        let sizes = &self.keys.sizes;
        if tau.len() == sizes.q_heads { tau[sizes.coordinates(row)[1]] } else { tau[row] }
    }

    /// The choices at these energies.
    pub(super) fn choices<A: Real>(&self, energy: &[A], tau: &[A]) -> Choices<A> {
        let (rule, sizes) = (RowRule::<A>::of(&self.rule), &self.keys.sizes);
        let n = sizes.rows();
        let mut out = Choices {
            slot: Vec::with_capacity(n),
            index: Vec::with_capacity(n),
            nearest: Vec::with_capacity(n),
            energy: Vec::with_capacity(n),
            margin: Vec::with_capacity(n),
            gate: Vec::with_capacity(n),
        };
        for (row, energy) in energy.chunks(sizes.slots).enumerate() {
            let key = self.keys.row(row);
            let c = choose(&rule, Row { energy, key, threshold: self.threshold(tau, row) });
            out.slot.push(c.winner.map_or(-1, |slot| slot as i32));
            out.index.push(c.winner.map_or(-1, |j| key[j]));
            out.nearest.push(c.nearest.map_or(-1, |j| key[j]));
            out.energy.push(c.winner.map_or(A::of(f64::INFINITY), |j| energy[j]));
            out.margin.push(c.margin);
            out.gate.push(if c.winner.is_some() { c.rho } else { A::of(0.0) });
        }
        out
    }

    /// The output of every row, from values of any element type with the accumulator of T.
    pub(super) fn forward<T: Element, S: Element<Acc = T::Acc>>(
        &self,
        energy: &[T::Acc],
        v: View<'_, S>,
        tau: &[T::Acc],
    ) -> Vec<T> {
        let (rule, sizes) = (RowRule::<T::Acc>::of(&self.rule), &self.keys.sizes);
        let (slots, len, zero) = (sizes.slots, v.dims[3], T::Acc::of(0.0));
        let mut y = vec![T::down(zero); sizes.rows() * len];
        for_rows(
            &mut y,
            len,
            || (vec![zero; slots], vec![zero; len]),
            #[inline(always)]
            |row, (w, sum), out| {
                let [b, _, hk, _] = sizes.coordinates(row);
                let (energy, key) = (&energy[row * slots..(row + 1) * slots], self.keys.row(row));
                let candidates = Row { energy, key, threshold: self.threshold(tau, row) };
                weights(&rule, &choose(&rule, candidates), candidates, w);
                sum.fill(zero);
                // A row of weight 0 is not read: a NaN in it must not reach the output.
                for (&w, &j) in w.iter().zip(key).filter(|(w, _)| **w != zero) {
                    let v = v.row(b, hk, j as usize);
                    sum.iter_mut().zip(v).for_each(|(s, v)| *s += w * v.up());
                }
                out.iter_mut().zip(sum).for_each(|(o, &mut s)| *o = T::down(s));
            },
        );
        y
    }

    /// Gradients of energy, v and threshold.
    pub(super) fn backward<T: Element>(
        &self,
        energy: &[T::Acc],
        v: View<'_, T>,
        tau: &[T::Acc],
        dy: View<'_, T>,
    ) -> (Vec<T::Acc>, Vec<T>, Vec<T::Acc>) {
        let (rule, sizes) = (RowRule::<T::Acc>::of(&self.rule), &self.keys.sizes);
        let (slots, zero) = (sizes.slots, T::Acc::of(0.0));
        let mut de = vec![zero; sizes.rows() * slots];
        // For each row K value weights and the gradient of the threshold.
        let mut rest = vec![zero; sizes.rows() * (slots + 1)];
        for_rows2(
            (&mut de, slots),
            (&mut rest, slots + 1),
            || (vec![zero; slots], Scratch::new(slots)),
            #[inline(always)]
            |row, (a, scratch), de, rest| {
                let [b, h, hk, i] = sizes.coordinates(row);
                let (energy, key) = (&energy[row * slots..(row + 1) * slots], self.keys.row(row));
                let candidates = Row { energy, key, threshold: self.threshold(tau, row) };
                let dy = dy.row(b, h, i);
                for (a, &j) in a.iter_mut().zip(key) {
                    *a =
                        if j < 0 { zero } else { sum2(dy, v.row(b, hk, j as usize), |d, v| d.up() * v.up()) };
                }
                let c = choose(&rule, candidates);
                let (dv, dtau) = rest.split_at_mut(slots);
                dtau[0] = backward(&rule, &c, candidates, a, scratch, de, dv);
            },
        );
        let dtau: Vec<T::Acc> = rest.iter().skip(slots).step_by(slots + 1).copied().collect();
        let dv = key_gradient::<T>(
            &self.keys,
            v.dims[3],
            #[inline(always)]
            |slot, _, sum| {
                let (row, s) = (slot / slots, slot % slots);
                let w = rest[row * (slots + 1) + s];
                if w != zero {
                    let [b, h, _, i] = sizes.coordinates(row);
                    sum.iter_mut().zip(dy.row(b, h, i)).for_each(|(s, d)| *s += w * d.up());
                }
            },
        );
        let dtau = if tau.len() == sizes.q_heads { head_sums(sizes, &dtau) } else { dtau };
        (de, dv, dtau)
    }
}
