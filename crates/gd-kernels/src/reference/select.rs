//! The naive selection: barrier, threshold, winner, gate and refinement, one row at a time.

use std::borrow::Cow;

use super::barrier::{Lift, barrier};
use super::estimator::{Slots, soft_choice};
use super::gate::{GateValue, gate};
use super::problem::{Params, Problem};
use super::refine::residual_query;
use super::scan::{Candidates, energy, scan};
use super::{add_scaled, distance2, theory};
use crate::options::{Estimator, Gate, TieBreak};

/// The result of [`select`]: the choice of the first round, and the sum of the outputs of all rounds.
#[derive(Debug, Clone)]
pub struct Selected {
    /// The output `[B, Hq, N, Dv]`.
    pub y: Vec<f64>,
    /// The winner `[B, Hq, N]`; -1 where the row abstained.
    pub index: Vec<i32>,
    /// The energy of the winner after the barrier `[B, Hq, N]`; +infinity where the row abstained.
    pub energy: Vec<f64>,
    /// The energy of the runner-up minus that of the winner, after the barrier and among the candidates that the
    /// threshold admits; +infinity without a runner-up.
    pub margin: Vec<f64>,
    /// The gate rho; 0 where the row abstained.
    pub gate: Vec<f64>,
    /// The coherence point u* of query and winner where alpha is given; 0 where the row abstained.
    pub coherence: Option<Vec<f64>>,
}

/// One row `(b, h, i)` with its candidates, by slot.
#[derive(Debug)]
pub struct Row<'a> {
    pub(crate) problem: &'a Problem,
    pub(crate) params: &'a Params,
    pub(crate) place: (usize, usize, usize),
    pub(crate) keys: Vec<usize>,
    protected: Vec<bool>,
}

/// One round of a row. `members` are the slots that earlier rounds have not selected, `[C]`; other vectors of C have an
/// element for each member.
#[derive(Debug, Clone)]
pub struct Round {
    /// The query of this round `[D]`.
    pub query: Vec<f64>,
    /// The slots that earlier rounds have not selected.
    pub members: Vec<usize>,
    /// The result of the barrier, if there is one.
    pub lift: Option<Lift>,
    /// The energies after the barrier.
    pub energy: Vec<f64>,
    /// The member of least energy.
    pub winner: usize,
    /// The threshold of the row, with the margin gate relative to no other energy.
    pub threshold: Option<f64>,
    /// Whether the threshold admits it; otherwise the round abstains.
    pub admitted: bool,
    /// The energy of the next admitted member minus that of the winner; +infinity without one.
    pub margin: f64,
    /// The gate of the member of least energy, admitted or not, so that it is continuous at the threshold.
    pub gate: GateValue,
    /// The soft choice of the forward pass.
    pub p: Slots,
    /// The soft choice of the estimator, and its temperature.
    pub estimated: (Slots, f64),
    /// With several picks: the weight of every member, 0 from the pick after the last on, and of the null slot.
    pub picked: Option<Slots>,
    /// The round's output before its refinement weight `[Dv]`.
    pub output: Vec<f64>,
}

impl<'a> Row<'a> {
    /// Row number `row` of a problem.
    pub fn new(problem: &'a Problem, params: &'a Params, candidates: &Candidates, row: usize) -> Self {
        let (heads, queries) = (problem.q_heads, problem.queries);
        let slots =
            (row * candidates.width..(row + 1) * candidates.width).filter(|&c| candidates.index[c] >= 0);
        Self {
            problem,
            params,
            place: (row / (heads * queries), row / queries % heads, row % queries),
            keys: slots.clone().map(|c| candidates.index[c] as usize).collect(),
            protected: slots.map(|c| candidates.protected[c]).collect(),
        }
    }

    pub(crate) fn key(&self, slot: usize) -> &'a [f64] {
        &self.problem.k[self.problem.k_at(self.place.0, self.place.1, self.keys[slot])]
    }

    pub(crate) fn value(&self, slot: usize) -> &'a [f64] {
        &self.problem.v[self.problem.v_at(self.place.0, self.place.1, self.keys[slot])]
    }

    /// The parameter of this row's head.
    pub(crate) fn of_head(&self, parameter: &Option<Vec<f64>>) -> Option<f64> {
        parameter.as_ref().map(|p| p[self.place.1])
    }

    /// The refinement weights `[R]` of this row's head.
    pub(crate) fn weights(&self) -> Vec<f64> {
        let r = self.params.round_count(self.problem.q_heads);
        self.params.rounds.as_ref().map_or(vec![1.0], |w| w[self.place.1 * r..][..r].to_vec())
    }

    /// All rounds: they end after the last weight, or where a round abstains or leaves no candidate.
    pub fn rounds(&self) -> Vec<Round> {
        let (b, h, i) = self.place;
        let mut query = self.problem.q[self.problem.q_at(b, h, i)].to_vec();
        let mut members: Vec<usize> = (0..self.keys.len()).collect();
        let mut rounds = vec![];
        for _ in self.weights() {
            if members.is_empty() {
                break;
            }
            let round = self.round(query, members);
            let winner = round.members[round.winner];
            query = residual_query(&round.query, self.key(winner));
            members = round.members.iter().copied().filter(|&slot| slot != winner).collect();
            let admitted = round.admitted;
            rounds.push(round);
            if !admitted {
                break;
            }
        }
        rounds
    }

    fn round(&self, query: Vec<f64>, members: Vec<usize>) -> Round {
        let ((b, h, i), params, beta) = (self.place, self.params, self.problem.beta[self.place.1]);
        let row = (b * self.problem.q_heads + h) * self.problem.queries + i;
        let at = params.threshold_at((row, h), self.problem.row_count());
        let score = |&slot: &usize| {
            let prior = self.problem.prior_of(b, h, self.keys[slot]);
            -energy(&query, self.key(slot), beta, prior, self.problem.score)
        };
        let scores: Vec<f64> = members.iter().map(score).collect();
        let flags: Vec<bool> = members.iter().map(|&slot| self.protected[slot]).collect();
        let lift = params.barrier.as_ref().map(|rule| barrier(&scores, &flags, rule));
        let energy: Vec<f64> = lift.as_ref().map_or(&scores, |l| &l.scores).iter().map(|s| -s).collect();

        let threshold = params.threshold.as_ref().map(|tau| match params.gate {
            // The candidates are in ascending order.
            Gate::Margin { .. } => energy.get(params.picks).map_or(f64::INFINITY, |next| next + tau[at]),
            _ => tau[at],
        });
        let admits = |e: f64| params.admits(e, threshold);
        let earlier = |x: usize, y: usize| match self.problem.tie {
            TieBreak::First => self.keys[members[x]] < self.keys[members[y]],
            TieBreak::Last => self.keys[members[x]] > self.keys[members[y]],
        };
        let wins = |x: usize, y: usize| energy[x] < energy[y] || energy[x] == energy[y] && earlier(x, y);
        let winner = (0..members.len()).fold(0, |winner, j| if wins(j, winner) { j } else { winner });
        let rivals = (0..members.len()).filter(|&j| j != winner && admits(energy[j]));
        let margin = rivals.map(|j| energy[j] - energy[winner]).fold(f64::INFINITY, f64::min);

        let t = beta * distance2(&query, self.key(members[winner]));
        let alpha = self.of_head(&params.alpha);
        let gate = gate(params.gate, energy[winner], t, threshold, alpha, params.coherence);
        let p = soft_choice(&energy, threshold, params.temperature);
        let mean = energy.iter().sum::<f64>() / energy.len() as f64;
        let temperature = params.temperature + params.gradient.temperature_spread * (mean - energy[winner]);
        let null = threshold.filter(|_| params.gradient.null);
        let estimated = (soft_choice(&energy, null, temperature), temperature);
        let (hard, admitted) = (params.hard_share(), admits(energy[winner]));
        let mut output = vec![0.0; self.problem.value_dim];
        // Without a soft share the values are not read: they may hold a NaN.
        if hard < 1.0 {
            for (&slot, p) in members.iter().zip(&p.candidates) {
                add_scaled(&mut output, (1.0 - hard) * p, self.value(slot));
            }
        }
        let picked = (params.picks > 1).then(|| picked(&energy, threshold, params));
        match &picked {
            Some(weights) => {
                for (j, weight) in weights.candidates.iter().enumerate() {
                    if *weight > 0.0 && admits(energy[j]) && hard > 0.0 {
                        add_scaled(&mut output, hard * weight, self.value(members[j]));
                    }
                }
            }
            None if hard > 0.0 && admitted => {
                add_scaled(&mut output, hard * gate.rho, self.value(members[winner]));
            }
            None => {}
        }
        Round {
            query,
            members,
            lift,
            energy,
            winner,
            threshold,
            admitted,
            margin,
            gate,
            p,
            estimated,
            picked,
            output,
        }
    }
}

/// The softmax over the first picks and, with the energy gate, the null slot, at the temperature of that gate.
fn picked(energy: &[f64], threshold: Option<f64>, params: &Params) -> Slots {
    let count = params.picks.min(energy.len());
    let (null, temperature) = match params.gate {
        Gate::Energy { temperature } | Gate::Margin { temperature } => (threshold, temperature),
        Gate::None | Gate::Coherence => (None, 1.0),
    };
    let mut slots = soft_choice(&energy[..count], null, temperature);
    slots.candidates.resize(energy.len(), 0.0);
    slots
}

/// The candidates that the estimator uses: all visible keys for [`Estimator::Dense`], else those of the scan.
pub fn estimator_candidates<'a>(
    problem: &Problem,
    candidates: &'a Candidates,
    params: &Params,
) -> Cow<'a, Candidates> {
    match params.estimator {
        Estimator::Dense => Cow::Owned(scan(problem, problem.keys)),
        _ => Cow::Borrowed(candidates),
    }
}

/// Selects among the candidates of every row, with energies computed from q and k.
pub fn select(problem: &Problem, candidates: &Candidates, params: &Params) -> Selected {
    let candidates = estimator_candidates(problem, candidates, params);
    let (mut y, mut index, mut energy) = (vec![], vec![], vec![]);
    let (mut margin, mut gate, mut coherence) = (vec![], vec![], vec![]);
    for (number, (_, h, _)) in problem.rows() {
        let row = Row::new(problem, params, &candidates, number);
        let rounds = row.rounds();
        let mut out = vec![0.0; problem.value_dim];
        for (round, weight) in rounds.iter().zip(row.weights()) {
            add_scaled(&mut out, weight, &round.output);
        }
        y.extend(out);
        let chosen = rounds.first().filter(|r| r.admitted);
        let slot = chosen.map(|r| r.members[r.winner]);
        index.push(slot.map_or(-1, |slot| row.keys[slot] as i32));
        energy.push(chosen.map_or(f64::INFINITY, |r| r.energy[r.winner]));
        margin.push(chosen.map_or(f64::INFINITY, |r| r.margin));
        let weight = |r: &Round| r.picked.as_ref().map_or(r.gate.rho, |w| w.candidates[r.winner]);
        gate.push(chosen.map_or(0.0, weight));
        if let Some(alpha) = row.of_head(&params.alpha) {
            coherence.push(chosen.zip(slot).map_or(0.0, |(round, slot)| {
                let t = problem.beta[h] * distance2(&round.query, row.key(slot));
                theory::coherence(t, alpha, params.coherence).u
            }));
        }
    }
    let coherence = params.alpha.as_ref().map(|_| coherence);
    Selected { y, index, energy, margin, gate, coherence }
}
