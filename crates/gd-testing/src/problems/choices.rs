//! Options of `select` for generated problems, and bounds on what rounding may change in a choice.

use candle_core::Tensor;
use gd_kernels::reference::refine::residual_query;
use gd_kernels::reference::scan::energy;
use gd_kernels::reference::select::Row;
use gd_kernels::reference::{Candidates, Params, distance2, logsumexp};
use gd_kernels::{Barrier, CandidateGradient, CoherenceMode, Estimator, Gate, Score, Select};
use rand::RngExt;

use super::{Case, acc, pick, rng, rounded, roundoff, uniform};

/// All estimators.
pub const ESTIMATORS: [Estimator; 5] =
    [Estimator::Candidates, Estimator::Winner, Estimator::Dense, Estimator::Reinmax, Estimator::Blend];

/// The parameters of a choice, for the reference and for the operator.
#[derive(Debug, Clone)]
pub struct Choice {
    /// For the reference.
    pub params: Params,
    /// Thresholds `[Hq]` or `[B, Hq, N]`.
    pub threshold: Option<Tensor>,
    /// Mixture weights `[Hq]`.
    pub alpha: Option<Tensor>,
    /// Weights of the rounds of refinement.
    pub rounds: Option<Tensor>,
}

/// The estimator of a seed. It determines which scan produces the candidates.
pub fn estimator(seed: u64) -> Estimator {
    ESTIMATORS[(seed % ESTIMATORS.len() as u64) as usize]
}

impl Choice {
    /// Options of a seed for a problem whose candidates have these energies `[B, Hq, N, slots]`.
    pub fn new(seed: u64, case: &Case, energies: &[f64]) -> Self {
        let mut rng = rng(seed ^ 0x5e1e_c700);
        let (p, acc) = (&case.problem, acc(case.dtype));
        let heads = p.q_heads;
        let gate = match rng.random_range(0..3) {
            0 => Gate::None,
            1 => Gate::Energy { temperature: pick(&mut rng, &[0.5, 1.0, 3.0]) },
            _ => Gate::Coherence,
        };
        let needed = matches!(gate, Gate::Energy { .. });
        let kind = rng.random_range(if needed { 0..6 } else { 0..9 });
        let tau = (kind < 6).then(|| {
            let per_head = energies.len() / (p.batch * heads);
            let head = |h: usize| match kind {
                0 => -1e6,
                1 => f64::INFINITY,
                _ => {
                    // Near one of the head's energies, so that some rows abstain and some do not.
                    let finite: Vec<f64> = energies[h * per_head..(h + 1) * per_head]
                        .iter()
                        .copied()
                        .filter(|e| e.is_finite())
                        .collect();
                    if finite.is_empty() {
                        return 1.0;
                    }
                    let e = pick(&mut rng, &finite);
                    e + rng.random_range(0.01..0.1) * (0.1 + e.abs())
                }
            };
            (0..heads).map(head).collect::<Vec<_>>()
        });
        let alpha = (gate == Gate::Coherence || rng.random_bool(0.5)).then(|| {
            let even = rng.random_bool(0.2);
            (0..heads).map(|_| if even { 0.5 } else { rng.random_range(0.05..0.95) }).collect::<Vec<_>>()
        });
        let count = pick(&mut rng, &[0, 0, 1, 2, 3]);
        let rounds = (count > 0).then(|| uniform(&mut rng, heads * count));
        let barrier = (p.protected.is_some() && rng.random_bool(0.7)).then(|| Barrier {
            floor: rng.random_range(0.05..0.6),
            margin: rng.random_range(0.0..1.5),
            strength: pick(&mut rng, &[0.0, 0.3, 1.0, 1.7]),
            entropy_trigger: rng.random_range(0.2..1.0),
            slack: rng.random_range(0.0..2.0),
        });
        let one = |x: Option<Vec<f64>>| x.map(|x| rounded(&x, &[heads], acc)).unzip();
        let (threshold, threshold_values) = one(tau);
        let (alpha, alpha_values) = one(alpha);
        let (rounds, round_values) = rounds.map(|x| rounded(&x, &[heads, count], acc)).unzip();
        let params = Params {
            threshold: threshold_values,
            alpha: alpha_values,
            rounds: round_values,
            gate,
            estimator: estimator(seed),
            temperature: pick(&mut rng, &[0.5, 1.0, 3.0]),
            preserve_floor: pick(&mut rng, &[0.0, 0.1, 0.5]),
            value_floor: pick(&mut rng, &[0.0, 0.2, 1.0]),
            hardness: pick(&mut rng, &[0.0, 0.3, 1.0, 1.0]),
            barrier,
            coherence: pick(&mut rng, &[CoherenceMode::Global, CoherenceMode::Passage]),
            picks: 1,
            exclude_below: pick(&mut rng, &[0.5, 0.5, 0.0, 0.2]),
            gradient: CandidateGradient {
                temperature_spread: pick(&mut rng, &[0.0, 0.0, 0.3]),
                gate_floor: pick(&mut rng, &[0.0, 0.0, 0.25]),
                null: rng.random_bool(0.7),
            },
        };
        let mut choice = Self { params, threshold, alpha, rounds };
        let ranked = matches!(choice.params.estimator, Estimator::Candidates | Estimator::Winner);
        let alone = choice.rounds.is_none() && choice.params.barrier.is_none() && gate != Gate::Coherence;
        if ranked && alone && rng.random_bool(0.5) {
            choice.params.picks = pick(&mut rng, &[2, 3, 4]);
        }
        choice
    }

    /// The same with a threshold for every query in the place of one for every head, around that of its head.
    pub fn with_threshold_per_query(mut self, seed: u64, case: &Case) -> Self {
        let (p, mut rng) = (&case.problem, rng(seed ^ 0x7a11));
        if let Some(tau) = self.params.threshold.take() {
            let mut near = |tau: f64| tau + rng.random_range(-0.2..0.2) * (0.1 + tau.abs().min(1e6));
            let of_queries: Vec<f64> = p.rows().map(|(_, (_, h, _))| near(tau[h])).collect();
            let (tensor, values) = rounded(&of_queries, &[p.batch, p.q_heads, p.queries], acc(case.dtype));
            (self.threshold, self.params.threshold) = (Some(tensor), Some(values));
        }
        self
    }

    /// The same with the gate by the margin to the runner-up, where the other options admit it; its thresholds are small, so
    /// that some rows abstain and some do not.
    pub fn with_margin_gate(mut self, seed: u64, case: &Case) -> Self {
        let (p, mut rng) = (&case.problem, rng(seed ^ 0x3a96));
        if self.params.rounds.is_some() || self.params.barrier.is_some() {
            return self;
        }
        self.params.gate = Gate::Margin { temperature: pick(&mut rng, &[0.5, 1.0, 3.0]) };
        let per_query = self.params.threshold.as_ref().is_some_and(|tau| tau.len() != p.q_heads);
        let shape = if per_query { vec![p.batch, p.q_heads, p.queries] } else { vec![p.q_heads] };
        let tau: Vec<f64> = (0..shape.iter().product()).map(|_| rng.random_range(-1.0..1.0)).collect();
        let (tensor, values) = rounded(&tau, &shape, acc(case.dtype));
        (self.threshold, self.params.threshold) = (Some(tensor), Some(values));
        self
    }

    /// The options of the operator for a problem, without its prior.
    pub fn select<'a>(&'a self, case: &Case, beta: &'a Tensor) -> Select<'a> {
        let (p, params) = (&case.problem, &self.params);
        Select {
            score: p.score,
            tie: p.tie,
            threshold: self.threshold.as_ref(),
            alpha: self.alpha.as_ref(),
            gate: params.gate,
            exclude_below: params.exclude_below,
            picks: params.picks,
            estimator: params.estimator,
            temperature: params.temperature,
            preserve_floor: params.preserve_floor,
            gradient: params.gradient,
            value_floor: params.value_floor,
            hardness: params.hardness,
            barrier: params.barrier,
            rounds: self.rounds.as_ref(),
            coherence: params.coherence,
            ..Select::new(beta)
        }
    }

    /// A name for messages.
    pub fn name(&self) -> String {
        let p = &self.params;
        let threshold = p.threshold.as_ref().map(|t| t[0]);
        let rounds = p.rounds.as_ref().map(Vec::len);
        format!(
            "{:?} {:?} below {} {:?} h {} T {} f {} lambda {} tau {threshold:?} alpha {:?} {:?} rounds {rounds:?} {:?} picks {}",
            p.estimator,
            p.gate,
            p.exclude_below,
            p.gradient,
            p.hardness,
            p.temperature,
            p.preserve_floor,
            p.value_floor,
            p.alpha.as_ref().map(|a| a[0]),
            p.coherence,
            p.barrier,
            p.picks
        )
    }
}

/// What rounding errors may change in the choice of a row.
#[derive(Debug, Clone, Default)]
pub struct Uncertainty {
    /// Error bounds of the energies of the first round after the barrier, by member.
    pub bounds: Vec<f64>,
    /// Relative error that the soft weights and gates of any round may have.
    pub relative: f64,
    /// Within the bounds, the first round may have another winner, or admit it or not.
    pub first: bool,
    /// Within the bounds, another key may be admitted in the first round, which changes the margin.
    pub margin: bool,
    /// Within the bounds, a condition of the barrier or the choice of a later round may change.
    pub hidden: bool,
}

/// Examines row `number` with all its rounds. The candidates' energies have the bound of
/// [`Case::energy_bound`]. A residual query is stored in the tensors' dtype: its error is
/// `u_T |r| + (2D + 8) u |q|`, plus the previous one's times at most `1 + 4 |q| / L`, L the jump.
pub fn uncertainty(case: &Case, params: &Params, candidates: &Candidates, number: usize) -> Uncertainty {
    let p = &case.problem;
    let row = Row::new(p, params, candidates, number);
    let per_head = p.q_heads * p.queries;
    let (b, h) = (number / per_head, number / p.queries % p.q_heads);
    let slots: Vec<usize> = (number * candidates.width..(number + 1) * candidates.width)
        .filter(|&c| candidates.index[c] >= 0)
        .collect();
    let (u, stored) = (roundoff(acc(case.dtype)), roundoff(case.dtype));
    let norm = |x: &[f64]| x.iter().map(|x| x * x).sum::<f64>().sqrt();
    let mut out = Uncertainty::default();
    let mut moved = 0.0;
    for (r, round) in row.rounds().iter().enumerate() {
        let keys: Vec<usize> = round.members.iter().map(|&m| candidates.index[slots[m]] as usize).collect();
        let key = |j: usize| &p.k[p.k_at(b, h, keys[j])];
        let raw = |j: usize| energy(&round.query, key(j), p.beta[h], p.prior_of(b, h, keys[j]), p.score);
        let raw: Vec<f64> = (0..keys.len()).map(raw).collect();
        let bound = |j: usize| {
            let carried = match p.score {
                Score::Energy => moved * (2.0 * distance2(&round.query, key(j)).sqrt() + moved),
                Score::Dot => moved * norm(key(j)),
            };
            let rounding = case.energy_bound(&round.query, (b, h), keys[j]);
            // Residual queries are no integers.
            let rounding = if r > 0 && case.exact() { 16.0 * u * (1.0 + raw[j].abs()) } else { rounding };
            rounding + p.beta[h] * carried
        };
        let mut bounds: Vec<f64> = (0..keys.len()).map(bound).collect();
        let same =
            |x: usize, y: usize| case.same_key(b, h, keys[x], keys[y]) && round.energy[x] == round.energy[y];
        if let Some(rule) = &params.barrier {
            let flags: Vec<bool> = round.members.iter().map(|&m| candidates.protected[slots[m]]).collect();
            let largest = bounds.iter().copied().fold(0.0, f64::max);
            out.hidden |= barrier_is_uncertain(rule, &raw, &flags, &bounds, &|x, y| {
                case.same_key(b, h, keys[x], keys[y])
            });
            if round.lift.as_ref().is_some_and(|l| l.activated) {
                let largest_energy = round.energy.iter().map(|e| e.abs()).fold(1.0, f64::max);
                bounds.fill((1.0 + 2.0 * rule.strength) * largest + 4.0 * u * largest_energy);
            }
        }
        let near = |j: usize| {
            let reach = bounds[j] + bounds[round.winner];
            j != round.winner
                && reach > 0.0
                && round.energy[j] - round.energy[round.winner] <= reach
                && !same(j, round.winner)
        };
        // By whether the choice changes: the limit is not at the threshold with every gate.
        let tau = round.threshold;
        let measured = matches!(params.gate, Gate::Margin { .. }).then_some(params.picks);
        let of_runner_up = measured.filter(|&next| next < keys.len());
        let tau_bound =
            of_runner_up.map_or(0.0, |next| bounds[next] + 4.0 * u * (1.0 + round.energy[next].abs()));
        let admission = |j: usize| {
            let reach = bounds[j] + tau_bound;
            tau.is_some_and(|t| t.is_finite())
                && params.admits(round.energy[j] - reach, tau) != params.admits(round.energy[j] + reach, tau)
        };
        let picks = params.picks.min(keys.len());
        let ranks = |r: usize| {
            let reach = bounds[r] + bounds[r + 1];
            reach > 0.0 && round.energy[r + 1] - round.energy[r] <= reach && !same(r, r + 1)
        };
        let ranked = params.picks > 1 && (0..picks.min(keys.len() - 1)).any(ranks);
        let excluded = params.picks > 1 && (0..picks).any(admission);
        let choice = (0..keys.len()).any(near) || admission(round.winner) || ranked || excluded;
        out.margin |= r == 0 && (0..keys.len()).any(admission);
        match r {
            0 => out.first = choice,
            _ => out.hidden |= choice,
        }
        let largest = bounds.iter().copied().fold(0.0, f64::max);
        let gate = match params.gate {
            Gate::Energy { temperature } => largest / temperature,
            Gate::Margin { temperature } => 2.0 * largest / temperature,
            Gate::Coherence => {
                p.beta[h] * moved * (2.0 * distance2(&round.query, key(round.winner)).sqrt() + moved)
            }
            Gate::None if params.picks > 1 => largest,
            Gate::None => 0.0,
        };
        out.relative += 2.0 * largest / params.temperature + gate;
        let winner = key(round.winner);
        let (size, jump) = (norm(&round.query), distance2(&round.query, winner).sqrt());
        if r + 1 < params.round_count(p.q_heads) && jump > 0.0 {
            out.relative += 4.0 * moved / jump;
            moved = stored * norm(&residual_query(&round.query, winner))
                + (2.0 * p.dim as f64 + 8.0) * u * size
                + moved * (1.0 + 4.0 * size / jump);
        }
        if r == 0 {
            out.bounds = bounds;
        }
    }
    out
}

/// Whether errors within the bounds of the energies may change a condition of the barrier.
fn barrier_is_uncertain(
    rule: &Barrier,
    energy: &[f64],
    flags: &[bool],
    bounds: &[f64],
    same: &dyn Fn(usize, usize) -> bool,
) -> bool {
    let reach = 2.0 * bounds.iter().copied().fold(0.0, f64::max);
    // The operator and the reference round differently in f64, too.
    let tiny = 1e-12;
    let lowest = |open: &dyn Fn(usize) -> bool| {
        let all = (0..energy.len()).filter(|&j| open(j));
        all.reduce(|low, j| if energy[j] < energy[low] { j } else { low })
    };
    let Some(at) = lowest(&|j| flags[j]) else { return false };
    let Some(rival) = lowest(&|j| j != at) else { return false };
    let contested = |lowest: usize, open: &dyn Fn(usize) -> bool| {
        (0..energy.len()).any(|j| {
            j != lowest && open(j) && energy[j] - energy[lowest] <= reach && reach > 0.0 && !same(j, lowest)
        })
    };
    if contested(at, &|j| flags[j]) || contested(rival, &|j| j != at) {
        return true;
    }
    let total = logsumexp(energy.iter().map(|e| -e));
    let weight = |j: usize| (-energy[j] - total).exp();
    let gap = energy[at] - energy[rival];
    let close = |x: f64, y: f64, by: f64| (x - y).abs() < by + tiny * (1.0 + y.abs());
    let entropy: f64 = (0..energy.len()).map(weight).filter(|w| *w > 0.0).map(|w| -w * w.ln()).sum::<f64>();
    let entropy = entropy / (energy.len() as f64).ln();
    let others = logsumexp((0..energy.len()).filter(|&j| j != at).map(|j| -energy[j]));
    let lifted = -energy[at] + rule.strength * (rule.margin - gap).max(0.0);
    let after = 1.0 / (1.0 + (others - lifted).exp());
    let steps = (1.0 + rule.strength) * reach;
    close(gap, rule.margin, reach)
        || close(gap, rule.margin + rule.slack, reach)
        || close(weight(at), rule.floor, steps)
        || close(after, rule.floor, steps)
        || close(entropy, rule.entropy_trigger, 4.0 * reach)
}
