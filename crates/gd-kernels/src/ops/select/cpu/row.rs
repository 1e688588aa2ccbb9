//! One row of a selection: threshold, winner, gate, and the gradient of every estimator.
//!
//! A row has K slots (energy, key or -1) and a null slot whose energy is the threshold. `p` is the
//! softmax of `-eps / T` over the slots in use and the null slot; that of an estimator may have a temperature of its own
//! for every row, and no null slot.

use crate::backend::cpu::element::Real;
use crate::ops::scan::cpu::block::is_overflowed;
use crate::ops::select::{MAX_PICKS, Rule};
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
    /// Factor of the spread of the candidates in the estimator's temperature.
    temperature_spread: A,
    /// Least factor of the gradient of the scores.
    gate_floor: A,
    /// Whether the estimator's softmax has the null slot.
    null: bool,
    /// Value floor lambda.
    value_floor: A,
    /// Share h of the hard forward pass; 1 - h is the soft mixture over the candidates.
    hardness: A,
    /// Temperature of the energy gate; none without that gate.
    gate_temperature: Option<A>,
    /// By how much the energy of a winner may exceed the threshold.
    admission: A,
    /// Rows that a query reads.
    picks: usize,
}

impl<A: Real> RowRule<A> {
    /// The options of a selection.
    pub(super) fn of(rule: &Rule) -> Self {
        Self {
            tie: rule.tie,
            estimator: rule.estimator,
            temperature: A::of(rule.temperature),
            preserve_floor: A::of(rule.preserve_floor),
            temperature_spread: A::of(rule.gradient.temperature_spread),
            gate_floor: A::of(rule.gradient.gate_floor),
            null: rule.gradient.null,
            value_floor: A::of(rule.value_floor),
            hardness: A::of(rule.hard_share()),
            gate_temperature: rule.gate_temperature.map(A::of),
            admission: A::of(rule.admission),
            picks: rule.picks,
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
    /// Consistency gate of the nearest candidate, admitted or not; 1 without an energy gate. With several picks the
    /// weight of the first.
    pub(super) rho: A,
}

/// The weights of several picks, the first slots of a row: `e^(-eps / T)` beside the null slot of the energy gate, by
/// their sum. Returns the weight of the null slot.
fn pick_weights<A: Real>(rule: &RowRule<A>, row: Row<'_, A>, w: &mut [A]) -> A {
    let picks = rule.picks.min(w.len());
    w.fill(A::zero());
    let null = if rule.gate_temperature.is_some() { row.threshold } else { A::infinity() };
    let first = Row { energy: &row.energy[..picks], key: &row.key[..picks], threshold: null };
    softmax(rule.gate_temperature.unwrap_or(A::one()), first, &mut w[..picks])
}

/// Finds the winner among slots with a key, ties by the rule.
pub(super) fn choose<A: Real>(rule: &RowRule<A>, row: Row<'_, A>) -> RowChoice<A> {
    let Row { energy, key, threshold: tau } = row;
    let mut nearest: Option<usize> = None;
    for (slot, (&e, &j)) in energy.iter().zip(key).enumerate().filter(|(_, (_, j))| **j >= 0) {
        let wins = nearest.is_none_or(|other| {
            let earlier = (j < key[other]) == (rule.tie == TieBreak::First);
            // Energies that overflowed are equal; a scan has sorted their keys by what they were.
            e < energy[other] || (e == energy[other] && earlier && !is_overflowed(e))
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
    let limit = tau + rule.admission;
    let rho = if rule.picks > 1 { first_weight(rule, row) } else { rho };
    if e > limit {
        return RowChoice { nearest: Some(nearest), winner: None, margin: A::infinity(), rho };
    }
    let rivals = energy.iter().zip(key).enumerate().filter(|(slot, (_, j))| *slot != nearest && **j >= 0);
    let margin = rivals.map(|(_, (&x, _))| x).filter(|&x| x <= limit).fold(A::infinity(), |m, x| {
        let difference = x - e;
        if difference < m { difference } else { m }
    });
    RowChoice { nearest: Some(nearest), winner: Some(nearest), margin, rho }
}

/// The weight of the first of several picks.
fn first_weight<A: Real>(rule: &RowRule<A>, row: Row<'_, A>) -> A {
    let (mut w, count) = ([A::zero(); MAX_PICKS], rule.picks.min(row.key.len()));
    pick_weights(rule, Row { energy: &row.energy[..count], key: &row.key[..count], ..row }, &mut w[..count]);
    w[0]
}

/// The logistic function.
fn sigmoid<A: Real>(x: A) -> A {
    // exp never overflows to a NaN here: exp(+big) = inf gives 0.
    (A::one() + (-x).exp()).recip()
}

/// The estimator's temperature in this row: `T + c * (mean eps - min eps)` over the used slots.
fn row_temperature<A: Real>(rule: &RowRule<A>, row: Row<'_, A>) -> A {
    if rule.temperature_spread == A::zero() {
        return rule.temperature;
    }
    let (mut sum, mut least, mut count) = (A::zero(), A::infinity(), A::zero());
    for (&e, _) in row.energy.iter().zip(row.key).filter(|(_, j)| **j >= 0) {
        sum += e;
        count += A::one();
        least = if e < least { e } else { least };
    }
    let spread = sum / count - least;
    // Without candidates, and beside energies beyond the range of the type, there is no spread.
    if spread.is_finite() {
        rule.temperature_spread.mul_add(spread, rule.temperature)
    } else {
        rule.temperature
    }
}

/// Writes the softmax of `-eps / temperature` over the used slots into `p`; returns the share of the null slot, whose
/// energy is the row's threshold (+inf for none).
fn softmax<A: Real>(temperature: A, row: Row<'_, A>, p: &mut [A]) -> A {
    let Row { energy, key, threshold: tau } = row;
    let used = |(e, j): (&A, &i32)| if *j < 0 { A::infinity() } else { *e };
    let least = energy.iter().zip(key).map(used).fold(tau, |least, e| if e < least { e } else { least });
    if !least.is_finite() {
        p.fill(A::zero());
        return A::zero();
    }
    let weight = |e: A| ((least - e) / temperature).exp();
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
        softmax(rule.temperature, row, w);
        let share = A::one() - rule.hardness;
        w.iter_mut().for_each(|w| *w *= share);
    } else {
        w.fill(A::zero());
    }
    if rule.picks > 1 && rule.hardness > A::zero() {
        let (mut picked, count) = ([A::zero(); MAX_PICKS], rule.picks.min(w.len()));
        let first = Row { energy: &row.energy[..count], key: &row.key[..count], ..row };
        pick_weights(rule, first, &mut picked[..count]);
        for ((w, picked), &e) in w.iter_mut().zip(picked).zip(first.energy) {
            *w += if admits(rule, row, e) { rule.hardness * picked } else { A::zero() };
        }
    } else if let Some(j) = c.winner {
        w[j] += rule.hardness * c.rho;
    }
}

/// Whether a candidate of this energy can be selected.
fn admits<A: Real>(rule: &RowRule<A>, row: Row<'_, A>, energy: A) -> bool {
    energy <= row.threshold + rule.admission
}

/// Scratch for the backward pass of a row of K slots.
pub(super) struct Scratch<A> {
    p: Vec<A>,
    mixed: Vec<A>,
    /// Weights of several picks.
    picked: Vec<A>,
    /// `a` of the picks, or of the others.
    part: Vec<A>,
}

impl<A: Real> Scratch<A> {
    pub(super) fn new(slots: usize) -> Self {
        let zeros = || vec![A::zero(); slots];
        Self { p: zeros(), mixed: zeros(), picked: zeros(), part: zeros() }
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
    if soft_share > A::zero() {
        let null = softmax(rule.temperature, row, &mut s.p);
        dtau += jacobian(rule.temperature, &s.p, null, a, soft_share, de);
        dv.iter_mut().zip(&s.p).for_each(|(d, &p)| *d = soft_share * p);
    }
    if hard == A::zero() {
        return dtau;
    }
    let temperature = row_temperature(rule, row);
    let estimated = Row { threshold: if rule.null { row.threshold } else { A::infinity() }, ..row };
    let null = softmax(temperature, estimated, &mut s.p);
    if rule.picks > 1 {
        return dtau + backward_of_picks(rule, row, a, (null, temperature), s, de, dv);
    }
    let value_scale = hard * c.rho;
    let scale = hard * if c.rho < rule.gate_floor { rule.gate_floor } else { c.rho };
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
            dtau += jacobian(temperature, &s.mixed, null, a, scale, de);
        }
        Estimator::Reinmax => {
            let half = A::of(0.5);
            dtau += jacobian(temperature, &s.p, null, a, -half * scale, de);
            s.mixed.iter_mut().zip(&s.p).for_each(|(m, &p)| *m = half * p);
            if let Some(j) = c.winner {
                s.mixed[j] += half;
            }
            let null = half * null + if c.winner.is_none() { half } else { A::zero() };
            dtau += jacobian(temperature, &s.mixed, null, a, A::of(2.0) * scale, de);
            floor(s);
        }
    }
    let lambda = if rule.estimator == Estimator::Winner { A::zero() } else { rule.value_floor };
    if lambda > A::zero() {
        dv.iter_mut().zip(&s.mixed).for_each(|(d, &m)| *d += value_scale * lambda * m);
    }
    if let Some(j) = c.winner {
        dv[j] += value_scale * (A::one() - lambda);
        if let Some(t) = rule.gate_temperature {
            // rho = sigmoid((tau - eps) / T) multiplies the selected row.
            let d = hard * a[j] * c.rho * (A::one() - c.rho) / t;
            de[j] += -d;
            dtau += d;
        }
    }
    dtau
}

/// The hard share of [`backward`] with several picks: their weights have an exact gradient, and the estimator adds that of
/// the other candidates, scaled by the weight of all picks.
fn backward_of_picks<A: Real>(
    rule: &RowRule<A>,
    row: Row<'_, A>,
    a: &[A],
    (null, temperature): (A, A),
    s: &mut Scratch<A>,
    de: &mut [A],
    dv: &mut [A],
) -> A {
    let (hard, lambda, key) = (rule.hardness, rule.value_floor, row.key);
    let lambda = if rule.estimator == Estimator::Winner { A::zero() } else { lambda };
    let rejected = pick_weights(rule, row, &mut s.picked);
    let mass = A::one() - rejected;
    let used = key.iter().filter(|&&j| j >= 0).count();
    let each = rule.preserve_floor / A::of(used.max(1) as f64);
    for ((m, &p), &j) in s.mixed.iter_mut().zip(&s.p).zip(key) {
        *m = (A::one() - rule.preserve_floor) * p + if j < 0 { A::zero() } else { each };
    }
    let is_pick = |slot: usize| slot < rule.picks;
    // An excluded pick keeps its weight and has the value 0.
    for (slot, ((part, &a), &e)) in s.part.iter_mut().zip(a).zip(row.energy).enumerate() {
        *part = if is_pick(slot) && admits(rule, row, e) { a } else { A::zero() };
    }
    let gate_temperature = rule.gate_temperature.unwrap_or(A::one());
    let mut dtau = jacobian(gate_temperature, &s.picked, rejected, &s.part, hard, de);
    for (slot, (&picked, &e)) in s.picked.iter().zip(row.energy).enumerate() {
        if is_pick(slot) && admits(rule, row, e) {
            dv[slot] += hard * (A::one() - lambda) * picked;
        }
    }
    if rule.estimator == Estimator::Winner {
        return dtau;
    }
    dv.iter_mut().zip(&s.mixed).for_each(|(d, &m)| *d += hard * mass * lambda * m);
    for (slot, (part, &a)) in s.part.iter_mut().zip(a).enumerate() {
        *part = if is_pick(slot) { A::zero() } else { a };
    }
    let scale = hard * if mass < rule.gate_floor { rule.gate_floor } else { mass };
    let null = (A::one() - rule.preserve_floor) * null;
    dtau += jacobian(temperature, &s.mixed, null, &s.part, scale, de);
    dtau
}

/// Adds `scale * J(p) a`, carried from scores `-eps / T` to energies, to `de`; returns the null
/// slot's share, whose `a` is 0.
fn jacobian<A: Real>(temperature: A, p: &[A], null: A, a: &[A], scale: A, de: &mut [A]) -> A {
    let mean = p.iter().zip(a).fold(A::zero(), |m, (&p, &a)| p.mul_add(a, m));
    let rate = -scale / temperature;
    for ((d, &p), &a) in de.iter_mut().zip(p).zip(a) {
        *d += rate * p * (a - mean);
    }
    -rate * null * mean
}
