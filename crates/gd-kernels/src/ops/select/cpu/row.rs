//! One row of a selection: threshold, winner, gate, and the gradient of every estimator.
//!
//! A row has K slots (energy, key or -1) and a null slot whose energy is the threshold. `p` is the
//! softmax of `-eps / T` over the slots in use and the null slot.

use crate::backend::cpu::element::Real;
use crate::ops::select::Rule;
use crate::options::{Estimator, TieBreak};

/// The options of a row in the accumulator type.
#[derive(Debug, Clone, Copy)]
pub(super) struct RowRule<A> {
    tie: TieBreak,
    estimator: Estimator,
    /// Temperature T of the estimator's softmax.
    temperature: A,
    /// Preserve floor f.
    preserve_floor: A,
    /// Value floor lambda.
    value_floor: A,
    /// Share h of the hard forward pass; 1 - h is the soft mixture over the candidates.
    hardness: A,
    /// Temperature of the energy gate; none without that gate.
    gate_temperature: Option<A>,
}

impl<A: Real> RowRule<A> {
    /// The options of a selection.
    pub(super) fn of(rule: &Rule) -> Self {
        Self {
            tie: rule.tie,
            estimator: rule.estimator,
            temperature: A::of(rule.temperature),
            preserve_floor: A::of(rule.preserve_floor),
            value_floor: A::of(rule.value_floor),
            hardness: A::of(rule.hard_share()),
            gate_temperature: rule.gate_temperature.map(A::of),
        }
    }
}

/// The candidates of a row: energies and keys of its slots, and the threshold.
#[derive(Debug, Clone, Copy)]
pub(super) struct Row<'a, A> {
    /// Energies `[K]`.
    pub(super) energy: &'a [A],
    /// Keys `[K]`, -1 where a slot is unused.
    pub(super) key: &'a [i32],
    /// The threshold tau, the energy of the null slot.
    pub(super) threshold: A,
}

/// The choice of a row.
#[derive(Debug, Clone, Copy)]
pub(super) struct RowChoice<A> {
    /// The slot of least energy, admitted or not; none if the row has no candidate.
    pub(super) nearest: Option<usize>,
    /// The winning slot; none if the row abstains.
    pub(super) winner: Option<usize>,
    /// Energy of the next admitted candidate minus that of the winner; +inf if there is none.
    pub(super) margin: A,
    /// Consistency gate of the nearest candidate, admitted or not; 1 without an energy gate.
    pub(super) rho: A,
}

/// Finds the winner among slots with a key, ties by the rule.
pub(super) fn choose<A: Real>(rule: &RowRule<A>, row: Row<'_, A>) -> RowChoice<A> {
    let Row { energy, key, threshold: tau } = row;
    let mut nearest: Option<usize> = None;
    for (slot, (&e, &j)) in energy.iter().zip(key).enumerate().filter(|(_, (_, j))| **j >= 0) {
        let wins = nearest.is_none_or(|other| {
            let earlier = (j < key[other]) == (rule.tie == TieBreak::First);
            e < energy[other] || (e == energy[other] && earlier)
        });
        if wins {
            nearest = Some(slot);
        }
    }
    let Some(nearest) = nearest else {
        return RowChoice { nearest: None, winner: None, margin: A::infinity(), rho: A::one() };
    };
    let e = energy[nearest];
    let rho = rule.gate_temperature.map_or(A::one(), |t| sigmoid((tau - e) / t));
    if e > tau {
        return RowChoice { nearest: Some(nearest), winner: None, margin: A::infinity(), rho };
    }
    let rivals = energy.iter().zip(key).enumerate().filter(|(slot, (_, j))| *slot != nearest && **j >= 0);
    let margin = rivals.map(|(_, (&x, _))| x).filter(|&x| x <= tau).fold(A::infinity(), |m, x| {
        let difference = x - e;
        if difference < m { difference } else { m }
    });
    RowChoice { nearest: Some(nearest), winner: Some(nearest), margin, rho }
}

/// The logistic function.
fn sigmoid<A: Real>(x: A) -> A {
    // exp never overflows to a NaN here: exp(+big) = inf gives 0.
    (A::one() + (-x).exp()).recip()
}

/// Writes the softmax of `-eps / T` over the used slots into `p`; returns the share of the null slot.
fn softmax<A: Real>(rule: &RowRule<A>, row: Row<'_, A>, p: &mut [A]) -> A {
    let Row { energy, key, threshold: tau } = row;
    let used = |(e, j): (&A, &i32)| if *j < 0 { A::infinity() } else { *e };
    let least = energy.iter().zip(key).map(used).fold(tau, |least, e| if e < least { e } else { least });
    if !least.is_finite() {
        p.fill(A::zero());
        return A::zero();
    }
    let weight = |e: A| ((least - e) / rule.temperature).exp();
    let mut total = weight(tau);
    let null = total;
    for (p, x) in p.iter_mut().zip(energy.iter().zip(key)) {
        *p = weight(used(x));
        total += *p;
    }
    p.iter_mut().for_each(|p| *p /= total);
    null / total
}

/// Weights of the value rows in the forward pass.
pub(super) fn weights<A: Real>(rule: &RowRule<A>, c: &RowChoice<A>, row: Row<'_, A>, w: &mut [A]) {
    if rule.hardness < A::one() {
        softmax(rule, row, w);
        let share = A::one() - rule.hardness;
        w.iter_mut().for_each(|w| *w *= share);
    } else {
        w.fill(A::zero());
    }
    if let Some(j) = c.winner {
        w[j] += rule.hardness * c.rho;
    }
}

/// Scratch for the backward pass of a row of K slots.
pub(super) struct Scratch<A> {
    p: Vec<A>,
    mixed: Vec<A>,
}

impl<A: Real> Scratch<A> {
    pub(super) fn new(slots: usize) -> Self {
        Self { p: vec![A::zero(); slots], mixed: vec![A::zero(); slots] }
    }
}

/// The backward pass of a row. From `a[j] = <dy, v_j>` it computes the gradient `de` of the energies and the weights
/// `dv` by which `dy` is added to the gradients of the value rows; returns the gradient of the threshold.
pub(super) fn backward<A: Real>(
    rule: &RowRule<A>,
    c: &RowChoice<A>,
    row: Row<'_, A>,
    a: &[A],
    s: &mut Scratch<A>,
    de: &mut [A],
    dv: &mut [A],
) -> A {
    let Row { key, .. } = row;
    de.fill(A::zero());
    dv.fill(A::zero());
    let mut dtau = A::zero();
    let (hard, soft_share) = (rule.hardness, A::one() - rule.hardness);
    let null = softmax(rule, row, &mut s.p);
    if soft_share > A::zero() {
        dtau += jacobian(rule, &s.p, null, a, soft_share, de);
        dv.iter_mut().zip(&s.p).for_each(|(d, &p)| *d = soft_share * p);
    }
    if hard == A::zero() {
        return dtau;
    }
    let scale = hard * c.rho;
    let floor = |s: &mut Scratch<A>| {
        let used = key.iter().filter(|&&j| j >= 0).count();
        let each = rule.preserve_floor / A::of(used.max(1) as f64);
        for ((m, &p), &j) in s.mixed.iter_mut().zip(&s.p).zip(key) {
            *m = (A::one() - rule.preserve_floor) * p + if j < 0 { A::zero() } else { each };
        }
        (A::one() - rule.preserve_floor) * null
    };
    match rule.estimator {
        Estimator::Blend | Estimator::Winner => {}
        Estimator::Candidates | Estimator::Dense => {
            let null = floor(s);
            dtau += jacobian(rule, &s.mixed, null, a, scale, de);
        }
        Estimator::Reinmax => {
            let half = A::of(0.5);
            dtau += jacobian(rule, &s.p, null, a, -half * scale, de);
            s.mixed.iter_mut().zip(&s.p).for_each(|(m, &p)| *m = half * p);
            if let Some(j) = c.winner {
                s.mixed[j] += half;
            }
            let null = half * null + if c.winner.is_none() { half } else { A::zero() };
            dtau += jacobian(rule, &s.mixed, null, a, A::of(2.0) * scale, de);
            floor(s);
        }
    }
    let lambda = if rule.estimator == Estimator::Winner { A::zero() } else { rule.value_floor };
    if lambda > A::zero() {
        dv.iter_mut().zip(&s.mixed).for_each(|(d, &m)| *d += scale * lambda * m);
    }
    if let Some(j) = c.winner {
        dv[j] += scale * (A::one() - lambda);
        if let Some(t) = rule.gate_temperature {
            // rho = sigmoid((tau - eps) / T) multiplies the selected row.
            let d = hard * a[j] * c.rho * (A::one() - c.rho) / t;
            de[j] += -d;
            dtau += d;
        }
    }
    dtau
}

/// Adds `scale * J(p) a`, carried from scores `-eps / T` to energies, to `de`; returns the null
/// slot's share, whose `a` is 0.
fn jacobian<A: Real>(rule: &RowRule<A>, p: &[A], null: A, a: &[A], scale: A, de: &mut [A]) -> A {
    let mean = p.iter().zip(a).fold(A::zero(), |m, (&p, &a)| p.mul_add(a, m));
    let rate = -scale / rule.temperature;
    for ((d, &p), &a) in de.iter_mut().zip(p).zip(a) {
        *d += rate * p * (a - mean);
    }
    -rate * null * mean
}
