//! The naive backward pass of [`select`](super::select()): the gradient of the energies by the estimator, then the
//! chain rule through barrier, scores and refinement to every input.

use super::estimator::{Slots, jacobian, logit_gradient, preserved, value_weights};
use super::problem::{Params, Problem};
use super::refine::residual_query_backward;
use super::scan::Candidates;
use super::select::{Round, Row, estimator_candidates};
use super::{add_scaled, distance2, dot};
use crate::options::{Estimator, Gate, Score};

/// The gradients, each in the shape of its input. Those of the prior and of the parameters are computed even where
/// these are not given.
#[derive(Debug, Clone)]
pub struct Gradients {
    /// `[B, Hq, N, D]`.
    pub q: Vec<f64>,
    /// `[B, Hk, M, D]`.
    pub k: Vec<f64>,
    /// `[B, Hk, M, Dv]`.
    pub v: Vec<f64>,
    /// `[Hq]`.
    pub beta: Vec<f64>,
    /// `[B, Hq, M]`.
    pub prior: Vec<f64>,
    /// `[Hq]`.
    pub threshold: Vec<f64>,
    /// `[Hq]`.
    pub alpha: Vec<f64>,
    /// `[Hq, R]`.
    pub rounds: Vec<f64>,
}

/// The gradients of one round.
#[derive(Debug, Clone)]
pub struct RoundGradient {
    /// The gradient of the energies before the barrier, by member.
    pub energy: Vec<f64>,
    /// The factors of the output's gradient in the gradients of the values, by member.
    pub value: Vec<f64>,
    /// The gradient of the threshold.
    pub threshold: f64,
    /// The gradient of `t = beta |q - k|^2` of the member of least energy, through the coherence gate.
    pub t: f64,
    /// The gradient of alpha.
    pub alpha: f64,
}

/// The gradients of one round from `a_j = <dy, v_j>` by member: exact for the share of the blend, by the estimator for
/// the share of the hard choice.
pub fn round_gradient(round: &Round, params: &Params, a: &[f64]) -> RoundGradient {
    let mut out = gradient_at_threshold(round, params, a);
    // Where the threshold is measured from the runner-up, so is its gradient.
    if let (Gate::Margin { .. }, true) = (params.gate, params.picks < a.len()) {
        out.energy[params.picks] += out.threshold;
    }
    out
}

/// [`round_gradient`] with the threshold of the row as a parameter of its own.
fn gradient_at_threshold(round: &Round, params: &Params, a: &[f64]) -> RoundGradient {
    let hard = params.hard_share();
    let chosen = round.admitted.then_some(round.winner);
    let mut out = RoundGradient {
        energy: vec![0.0; a.len()],
        value: vec![0.0; a.len()],
        threshold: 0.0,
        t: 0.0,
        alpha: 0.0,
    };
    if let Some(picked) = &round.picked {
        return gradient_of_picks(round, picked, params, a, out);
    }
    // The gate scales the selected row, and with it the gradient of the estimator, that of the scores with a floor.
    let rho = round.gate.rho;
    let floored = match params.gate {
        Gate::Energy { .. } | Gate::Margin { .. } => rho.max(params.gradient.gate_floor),
        Gate::None | Gate::Coherence => rho,
    };
    let forward = (&round.p, params.temperature);
    let (estimated, temperature) = &round.estimated;
    for (estimator, share, value_share, (p, temperature)) in [
        (Estimator::Blend, 1.0 - hard, 1.0 - hard, forward),
        (params.estimator, hard * floored, hard * rho, (estimated, *temperature)),
    ] {
        // A share of 0 is skipped: `a` may be NaN by a value that is not used.
        if share == 0.0 {
            continue;
        }
        let logits = logit_gradient(estimator, p, chosen, a, params.preserve_floor);
        add_scaled(&mut out.energy, -share / temperature, &logits.candidates);
        out.threshold -= share / temperature * logits.null;
        let weights = value_weights(estimator, p, chosen, params.preserve_floor, params.value_floor);
        add_scaled(&mut out.value, value_share, &weights);
    }
    if let Some(winner) = chosen {
        let d_rho = hard * a[winner];
        out.energy[winner] += d_rho * round.gate.d_energy;
        out.threshold += d_rho * round.gate.d_threshold;
        out.t += d_rho * round.gate.d_t;
        out.alpha += d_rho * round.gate.d_alpha;
    }
    if let Some(lift) = &round.lift {
        // Scores are minus energies on both sides of the barrier, so the signs cancel.
        out.energy = lift.pull_back(&out.energy);
    }
    out
}

/// Adds the gradients with several picks to `out`: of the soft share as in [`round_gradient`], of the weights of the picks
/// exactly, and of the other candidates by the estimator, scaled by the weight of all picks.
fn gradient_of_picks(
    round: &Round,
    picked: &Slots,
    params: &Params,
    a: &[f64],
    mut out: RoundGradient,
) -> RoundGradient {
    let (hard, picks) = (params.hard_share(), params.picks.min(a.len()));
    if hard < 1.0 {
        let soft = jacobian(&round.p, a);
        let rate = (1.0 - hard) / params.temperature;
        add_scaled(&mut out.energy, -rate, &soft.candidates);
        out.threshold -= rate * soft.null;
        add_scaled(&mut out.value, 1.0 - hard, &round.p.candidates);
    }
    let threshold = round.threshold;
    let read: Vec<f64> = (0..a.len())
        .map(|j| if j < picks && params.admits(round.energy[j], threshold) { a[j] } else { 0.0 })
        .collect();
    let exact = jacobian(picked, &read);
    let gate_temperature = match params.gate {
        Gate::Energy { temperature } | Gate::Margin { temperature } => temperature,
        Gate::None | Gate::Coherence => 1.0,
    };
    add_scaled(&mut out.energy, -hard / gate_temperature, &exact.candidates);
    out.threshold -= hard / gate_temperature * exact.null;
    let lambda = if params.estimator == Estimator::Winner { 0.0 } else { params.value_floor };
    for j in (0..picks).filter(|&j| params.admits(round.energy[j], threshold)) {
        out.value[j] += hard * (1.0 - lambda) * picked.candidates[j];
    }
    if params.estimator == Estimator::Winner {
        return out;
    }
    let (estimated, temperature) = &round.estimated;
    let mixed = preserved(estimated, params.preserve_floor);
    let mass = 1.0 - picked.null;
    add_scaled(&mut out.value, hard * mass * lambda, &mixed.candidates);
    let others: Vec<f64> = (0..a.len()).map(|j| if j < picks { 0.0 } else { a[j] }).collect();
    let rest = jacobian(&mixed, &others);
    let rate = hard * mass.max(params.gradient.gate_floor) / temperature;
    add_scaled(&mut out.energy, -rate, &rest.candidates);
    out.threshold -= rate * rest.null;
    out
}

/// The gradients of every input from `dy` `[B, Hq, N, Dv]`.
pub fn backward(problem: &Problem, candidates: &Candidates, params: &Params, dy: &[f64]) -> Gradients {
    let candidates = estimator_candidates(problem, candidates, params);
    let (heads, count) = (problem.q_heads, params.round_count(problem.q_heads));
    let mut out = Gradients {
        q: vec![0.0; problem.q.len()],
        k: vec![0.0; problem.k.len()],
        v: vec![0.0; problem.v.len()],
        beta: vec![0.0; heads],
        prior: vec![0.0; problem.batch * heads * problem.keys],
        threshold: vec![0.0; params.threshold.as_ref().map_or(heads, Vec::len)],
        alpha: vec![0.0; heads],
        rounds: vec![0.0; heads * count],
    };
    for (number, (b, h, i)) in problem.rows() {
        let row = Row::new(problem, params, &candidates, number);
        let (rounds, weights) = (row.rounds(), row.weights());
        let dy = &dy[number * problem.value_dim..][..problem.value_dim];
        // The gradient of the next round's query.
        let mut next: Option<Vec<f64>> = None;
        for (r, round) in rounds.iter().enumerate().rev() {
            out.rounds[h * count + r] += dot(dy, &round.output);
            let mut d_query = vec![0.0; problem.dim];
            let winner = round.members[round.winner];
            if let Some(next) = &next {
                let (dq, dk) = residual_query_backward(&round.query, row.key(winner), next);
                d_query = dq;
                add_scaled(&mut out.k[problem.k_at(b, h, row.keys[winner])], 1.0, &dk);
            }
            let a: Vec<f64> =
                round.members.iter().map(|&slot| weights[r] * dot(dy, row.value(slot))).collect();
            let gradient = round_gradient(round, params, &a);
            out.threshold[params.threshold_at((number, h), problem.row_count())] += gradient.threshold;
            out.alpha[h] += gradient.alpha;
            for (j, &slot) in round.members.iter().enumerate() {
                let d_t = if j == round.winner { gradient.t } else { 0.0 };
                let key = row.keys[slot];
                add_scaled(&mut out.v[problem.v_at(b, h, key)], weights[r] * gradient.value[j], dy);
                out.prior[problem.prior_at(b, h, key)] -= gradient.energy[j];
                let d_key = &mut out.k[problem.k_at(b, h, key)];
                let beta = problem.beta[h];
                // The coherence gate depends on the distance for either score.
                let (d_distance, d_dot) = match problem.score {
                    Score::Energy => (d_t + gradient.energy[j], 0.0),
                    Score::Dot => (d_t, gradient.energy[j]),
                };
                let (q, k) = (&round.query, row.key(slot));
                let difference: Vec<f64> = q.iter().zip(k).map(|(q, k)| q - k).collect();
                out.beta[h] += d_distance * distance2(q, k) - d_dot * dot(q, k);
                add_scaled(&mut d_query, 2.0 * beta * d_distance, &difference);
                add_scaled(d_key, -2.0 * beta * d_distance, &difference);
                add_scaled(&mut d_query, -beta * d_dot, k);
                add_scaled(d_key, -beta * d_dot, q);
            }
            next = Some(d_query);
        }
        if let Some(d_query) = next {
            add_scaled(&mut out.q[problem.q_at(b, h, i)], 1.0, &d_query);
        }
    }
    out
}
