//! Every estimator's gradient against finite differences of the function it is the gradient of.
//!
//! `surrogate` writes that function down from the definitions: the exact blend, plus the hard share
//! with the choice held fixed. It takes only the forward parts (energies, barrier, residual query,
//! density) from the reference, never its gradients.

use gd_kernels::reference::scan::energy;
use gd_kernels::reference::select::{Round, Row, estimator_candidates};
use gd_kernels::reference::{
    Candidates, Gradients, Params, Problem, backward, barrier, distance2, dot, logsumexp, refine, scan,
    select, sigmoid, theory,
};
use gd_kernels::{Barrier, CandidateGradient, CoherenceMode, Estimator, Gate, Mask, Score};

use crate::naive::{assert_close, assert_gradient, finite_difference, problem, rng, uniform};

const ALL: [Estimator; 5] =
    [Estimator::Candidates, Estimator::Winner, Estimator::Dense, Estimator::Reinmax, Estimator::Blend];

/// `sum softmax(ln base - change / T)_j a_j`: its gradient at no change is `-J(base) a / T`.
fn mixture(base: &[f64], change: &[f64], temperature: f64, a: &[f64]) -> f64 {
    let logits: Vec<f64> = base.iter().zip(change).map(|(p, c)| p.ln() - c / temperature).collect();
    let total = logsumexp(logits.iter().copied());
    logits.iter().zip(a).map(|(l, a)| (l - total).exp() * a).sum()
}

/// The function whose gradient `backward` must return, with the choices, soft weights and gates of
/// `frozen` (the rounds at the base point `at`) where an estimator holds them fixed.
fn surrogate(
    problem: &Problem,
    params: &Params,
    at: (&Problem, &Params),
    frozen: &[Vec<Round>],
    scanned: &Candidates,
    dy: &[f64],
) -> f64 {
    let hard = if params.estimator == Estimator::Blend { 0.0 } else { params.hardness };
    let (floor, lambda) = (params.preserve_floor, params.value_floor);
    let mut total = 0.0;
    for (number, (b, h, i)) in problem.rows() {
        let dy = &dy[number * problem.value_dim..][..problem.value_dim];
        let slots: Vec<usize> =
            (0..scanned.width).filter(|c| scanned.index[number * scanned.width + c] >= 0).collect();
        let key_of = |slot: usize| scanned.index[number * scanned.width + slots[slot]] as usize;
        let at_row = params.threshold_at((number, h), problem.row_count());
        let mut query = problem.q[problem.q_at(b, h, i)].to_vec();
        for (r, round) in frozen[number].iter().enumerate() {
            let weight = |p: &Params| p.rounds.as_ref().map_or(1.0, |w| w[h * p.round_count(4) + r]);
            let keys: Vec<usize> = round.members.iter().map(|&m| key_of(m)).collect();
            let key = |j: usize| &problem.k[problem.k_at(b, h, keys[j])];
            let value = |p: &Problem, j: usize| dot(dy, &p.v[p.v_at(b, h, keys[j])]);
            let raw = |j: usize| {
                energy(&query, key(j), problem.beta[h], problem.prior_of(b, h, keys[j]), problem.score)
            };
            let mut eps: Vec<f64> = (0..keys.len()).map(raw).collect();
            if let Some(rule) = &params.barrier {
                let scores: Vec<f64> = eps.iter().map(|e| -e).collect();
                let flags: Vec<bool> = round
                    .members
                    .iter()
                    .map(|&m| scanned.protected[number * scanned.width + slots[m]])
                    .collect();
                eps = barrier(&scores, &flags, rule).scores.iter().map(|s| -s).collect();
            }
            let tau = params.threshold.as_ref().map(|t| match params.gate {
                Gate::Margin { .. } => t[at_row] + eps[params.picks],
                _ => t[at_row],
            });
            let mut change: Vec<f64> = eps.iter().zip(&round.energy).map(|(e, e0)| e - e0).collect();
            change.extend(tau.zip(round.threshold).map(|(t, t0)| t - t0));

            // With weight 0 for the null slot where there is none, `mixture` ignores it.
            let with_null = |mut p: Vec<f64>, null: f64| {
                p.extend(tau.map(|_| null));
                p
            };
            let p = with_null(round.p.candidates.clone(), round.p.null);
            let (estimated, temperature) = &round.estimated;
            let temperature = *temperature;
            let estimated = with_null(estimated.candidates.clone(), estimated.null);
            let count = keys.len() as f64;
            let preserved: Vec<f64> = estimated
                .iter()
                .enumerate()
                .map(|(j, p)| (1.0 - floor) * p + if j < keys.len() { floor / count } else { 0.0 })
                .collect();
            let a0 = with_null((0..keys.len()).map(|j| value(at.0, j)).collect(), 0.0);
            let a = with_null((0..keys.len()).map(|j| value(problem, j)).collect(), 0.0);

            // The output of the round, which the refinement weight multiplies.
            total += weight(params) * dot(dy, &round.output);
            let w = weight(at.1);
            total += w * (1.0 - hard) * mixture(&p, &change, params.temperature, &a);
            let rho0 = round.gate.rho;
            let floored = match params.gate {
                Gate::Energy { .. } | Gate::Margin { .. } => rho0.max(params.gradient.gate_floor),
                _ => rho0,
            };
            let chosen = |j: usize| if round.admitted && j == round.winner { 1.0 } else { 0.0 };
            let one_hot =
                with_null((0..keys.len()).map(chosen).collect(), 1.0 - f64::from(u8::from(round.admitted)));
            let scores = match params.estimator {
                Estimator::Candidates | Estimator::Dense => mixture(&preserved, &change, temperature, &a0),
                Estimator::Reinmax => {
                    let middle: Vec<f64> =
                        estimated.iter().zip(&one_hot).map(|(p, d)| 0.5 * (p + d)).collect();
                    2.0 * mixture(&middle, &change, temperature, &a0)
                        - 0.5 * mixture(&estimated, &change, temperature, &a0)
                }
                Estimator::Winner | Estimator::Blend => 0.0,
            };
            let shares: Vec<f64> = match params.estimator {
                Estimator::Winner => (0..keys.len()).map(chosen).collect(),
                _ => (0..keys.len()).map(|j| (1.0 - lambda) * chosen(j) + lambda * preserved[j]).collect(),
            };
            total += w * hard * (floored * scores + rho0 * dot(&shares, &a[..keys.len()]));
            if round.admitted {
                let rho = match params.gate {
                    Gate::None => 1.0,
                    Gate::Energy { temperature } | Gate::Margin { temperature } => {
                        sigmoid((tau.expect("gate") - eps[round.winner]) / temperature)
                    }
                    Gate::Coherence => {
                        let t = problem.beta[h] * distance2(&query, key(round.winner));
                        let alpha = params.alpha.as_ref().expect("gate")[h];
                        (-theory::minimal_energy(t, alpha, params.coherence).value).exp()
                    }
                };
                total += w * hard * rho * a0[round.winner];
            }
            query = refine::residual_query(&query, key(round.winner));
        }
    }
    total
}

/// Compares every gradient with the finite differences of the surrogate; returns the gradients.
#[track_caller]
fn check(name: &str, base: &Problem, params: &Params, candidates: usize, dy: &[f64]) -> Gradients {
    let scanned = scan(base, candidates);
    let scanned = estimator_candidates(base, &scanned, params);
    let rows: Vec<Vec<Round>> =
        base.rows().map(|(row, _)| Row::new(base, params, &scanned, row).rounds()).collect();
    let gradients = backward(base, &scanned, params, dy);
    let of =
        |problem: &Problem, moved: &Params| surrogate(problem, moved, (base, params), &rows, &scanned, dy);
    let in_problem = |field: &str, x: &[f64], set: &dyn Fn(&mut Problem, &[f64]), actual: &[f64]| {
        let quotient = finite_difference(x, |x| {
            let mut moved = base.clone();
            set(&mut moved, x);
            of(&moved, params)
        });
        assert_gradient(&format!("{name}: {field}"), actual, &quotient);
    };
    in_problem("q", &base.q, &|p, x| p.q = x.to_vec(), &gradients.q);
    in_problem("k", &base.k, &|p, x| p.k = x.to_vec(), &gradients.k);
    in_problem("v", &base.v, &|p, x| p.v = x.to_vec(), &gradients.v);
    in_problem("beta", &base.beta, &|p, x| p.beta = x.to_vec(), &gradients.beta);
    let prior = base.prior.clone().expect("the generator gives one");
    in_problem("prior", &prior, &|p, x| p.prior = Some(x.to_vec()), &gradients.prior);
    let in_params =
        |field: &str, x: &Option<Vec<f64>>, set: &dyn Fn(&mut Params, Vec<f64>), actual: &[f64]| {
            if let Some(x) = x {
                let quotient = finite_difference(x, |x| {
                    let mut moved = params.clone();
                    set(&mut moved, x.to_vec());
                    of(base, &moved)
                });
                assert_gradient(&format!("{name}: {field}"), actual, &quotient);
            }
        };
    in_params("threshold", &params.threshold, &|p, x| p.threshold = Some(x), &gradients.threshold);
    in_params("alpha", &params.alpha, &|p, x| p.alpha = Some(x), &gradients.alpha);
    in_params("rounds", &params.rounds, &|p, x| p.rounds = Some(x), &gradients.rounds);
    gradients
}

fn settings(estimator: Estimator) -> Params {
    Params {
        estimator,
        temperature: 0.9,
        preserve_floor: 0.1,
        value_floor: 0.3,
        threshold: Some(vec![0.6, 0.9, 1.2, 1.6]),
        alpha: Some(vec![0.3, 0.45, 0.6, 0.8]),
        ..Params::default()
    }
}

#[test]
fn every_estimator_and_gate() {
    let mut seed = 1;
    for estimator in ALL {
        for gate in [Gate::None, Gate::Energy { temperature: 0.7 }, Gate::Coherence] {
            for (hardness, score) in [(1.0, Score::Energy), (0.4, Score::Energy), (0.7, Score::Dot)] {
                seed += 1;
                let mut rng = rng(seed);
                let base = Problem { score, mask: Mask::causal(4), ..problem(&mut rng, 7) };
                let mut params = Params { gate, hardness, ..settings(estimator) };
                if score == Score::Dot {
                    params.threshold = Some(vec![-0.2, 0.0, 0.2, 0.4]);
                }
                let dy = uniform(&mut rng, 2 * 4 * 3 * 3);
                let name = format!("{estimator:?} {gate:?} h {hardness} {score:?}");
                let chosen = select(&base, &scan(&base, 4), &params).index;
                assert!(chosen.iter().any(|&j| j >= 0), "{name}: every row abstains");
                check(&name, &base, &params, 4, &dy);
            }
        }
    }
}

#[test]
fn a_temperature_by_the_spread_a_floor_of_the_gate_and_no_null() {
    let mut seed = 200;
    for estimator in [Estimator::Candidates, Estimator::Reinmax] {
        for (exclude_below, null) in [(0.0, true), (0.0, false), (0.2, false)] {
            seed += 1;
            let mut rng = rng(seed);
            let base = Problem { mask: Mask::causal(4), ..problem(&mut rng, 7) };
            let gradient = CandidateGradient { temperature_spread: 0.4, gate_floor: 0.6, null };
            let gate = Gate::Energy { temperature: 0.7 };
            let params = Params { gate, exclude_below, gradient, hardness: 0.8, ..settings(estimator) };
            let dy = uniform(&mut rng, 2 * 4 * 3 * 3);
            let name = format!("{estimator:?} {gradient:?} below {exclude_below}");
            let out = select(&base, &scan(&base, 4), &params);
            let [low, high] = [out.gate.iter().any(|&g| g < 0.6), out.gate.iter().any(|&g| g > 0.6)];
            assert!(low && high, "{name}: the floor has to matter for some rows and not for others");
            assert!(out.gate.iter().all(|&g| g == 0.0 || g >= exclude_below), "{name}");
            assert_eq!(out.index.iter().all(|&j| j >= 0), exclude_below == 0.0, "{name}");
            check(&name, &base, &params, 4, &dy);
        }
    }
}

#[test]
fn rows_that_abstain_give_the_threshold_a_gradient() {
    let mut rng = rng(77);
    let base = problem(&mut rng, 6);
    let dy = uniform(&mut rng, 2 * 4 * 3 * 3);
    for estimator in ALL {
        let params = Params { threshold: Some(vec![-9.0; 4]), temperature: 4.0, ..settings(estimator) };
        let out = select(&base, &scan(&base, 4), &params);
        assert!(out.index.iter().all(|&j| j == -1) && out.gate.iter().all(|&g| g == 0.0));
        assert!(estimator == Estimator::Blend || out.y.iter().all(|&y| y == 0.0));
        let gradients = check(&format!("{estimator:?} abstains"), &base, &params, 4, &dy);
        let silent = gradients.threshold.iter().all(|&g| g == 0.0);
        assert_eq!(silent, estimator == Estimator::Winner, "{estimator:?}");
    }
}

#[test]
fn without_a_threshold_there_is_no_null() {
    let mut rng = rng(5);
    let base = problem(&mut rng, 6);
    let dy = uniform(&mut rng, 2 * 4 * 3 * 3);
    for estimator in ALL {
        let params = Params { threshold: None, ..settings(estimator) };
        let gradients = check(&format!("{estimator:?} no threshold"), &base, &params, 4, &dy);
        assert!(gradients.threshold.iter().all(|&g| g == 0.0));
    }
}

#[test]
fn barrier_and_protected_keys() {
    let mut rng = rng(11);
    let mut base = problem(&mut rng, 9);
    base.protected = Some((0..24).flat_map(|row| [row % 9, -1, (row + 4) % 9]).collect());
    let dy = uniform(&mut rng, 2 * 4 * 3 * 3);
    let rule = Barrier { floor: 0.22, margin: 0.5, strength: 0.6, entropy_trigger: 0.98, slack: 0.4 };
    for estimator in ALL {
        let rounds = Some(vec![0.8; 8]);
        let threshold = Some(vec![2.5; 4]);
        let params = Params { barrier: Some(rule), threshold, rounds, ..settings(estimator) };
        let scanned = scan(&base, 3);
        let lifts: Vec<_> = (0..24)
            .filter_map(|row| Row::new(&base, &params, &scanned, row).rounds().swap_remove(0).lift)
            .collect();
        let raised = lifts.iter().filter(|l| l.slope[l.protected.expect("one a row")] == 0.0).count();
        let lifted = lifts.iter().filter(|l| l.activated).count() - raised;
        assert!(raised > 0 && lifted > 0 && raised + lifted < 24, "{raised} raised, {lifted} lifted of 24");
        check(&format!("{estimator:?} barrier"), &base, &params, 3, &dy);
    }
}

#[test]
fn thresholds_per_query() {
    let mut rng = rng(22);
    let base = problem(&mut rng, 6);
    let dy = uniform(&mut rng, 2 * 4 * 3 * 3);
    for estimator in ALL {
        let threshold = Some(uniform(&mut rng, 24).iter().map(|x| 1.5 + x).collect());
        let gate = Gate::Energy { temperature: 0.8 };
        let params = Params { threshold, gate, hardness: 0.6, exclude_below: 0.2, ..settings(estimator) };
        let gradients = check(&format!("{estimator:?} threshold per query"), &base, &params, 4, &dy);
        assert_eq!(gradients.threshold.len(), 24);
    }
}

#[test]
fn a_gate_by_the_margin_to_the_runner_up() {
    let mut seed = 300;
    for estimator in ALL {
        for (exclude_below, null) in [(0.0, true), (0.0, false), (0.4, false)] {
            seed += 1;
            let mut rng = rng(seed);
            let base = Problem { mask: Mask::causal(4), ..problem(&mut rng, 7) };
            let gradient = CandidateGradient { gate_floor: 0.6, null, ..CandidateGradient::default() };
            let (gate, threshold) = (Gate::Margin { temperature: 0.3 }, Some(vec![-0.2, 0.1, 0.3, -0.4]));
            let params =
                Params { gate, exclude_below, gradient, threshold, hardness: 0.8, ..settings(estimator) };
            let dy = uniform(&mut rng, 2 * 4 * 3 * 3);
            let name = format!("{estimator:?}, margin gate, {gradient:?} below {exclude_below}");
            let out = select(&base, &scan(&base, 4), &params);
            let rho = |margin: f64, tau: f64| sigmoid((margin + tau) / 0.3);
            for (row, (&margin, &rho_of_row)) in out.margin.iter().zip(&out.gate).enumerate() {
                let tau = [-0.2, 0.1, 0.3, -0.4][row / 3 % 4];
                let abstains = out.index[row] < 0;
                assert!(abstains || margin.is_infinite() || (rho_of_row - rho(margin, tau)).abs() < 1e-12);
            }
            assert_eq!(out.index.iter().all(|&j| j >= 0), exclude_below == 0.0, "{name}");
            check(&name, &base, &params, 4, &dy);
        }
    }
}

#[test]
fn refinement_rounds() {
    let mut rng = rng(21);
    let base = problem(&mut rng, 6);
    let dy = uniform(&mut rng, 2 * 4 * 3 * 3);
    for estimator in ALL {
        for gate in [Gate::None, Gate::Coherence] {
            let rounds = Some(uniform(&mut rng, 12));
            let params =
                Params { rounds, gate, hardness: 0.6, threshold: Some(vec![2.0; 4]), ..settings(estimator) };
            let depth: Vec<usize> =
                (0..24).map(|row| Row::new(&base, &params, &scan(&base, 4), row).rounds().len()).collect();
            assert!(depth.contains(&3), "no row refines to the end: {depth:?}");
            check(&format!("{estimator:?} {gate:?} rounds"), &base, &params, 4, &dy);
        }
    }
}

#[test]
fn blend_is_the_gradient_of_its_own_forward() {
    let mut rng = rng(31);
    let base = problem(&mut rng, 7);
    let dy = uniform(&mut rng, 2 * 4 * 3 * 3);
    let params = settings(Estimator::Blend);
    let scanned = scan(&base, 4);
    let gradients = backward(&base, &scanned, &params, &dy);
    let loss = |p: &Problem, params: &Params| dot(&select(p, &scanned, params).y, &dy);
    let q = finite_difference(&base.q, |x| loss(&Problem { q: x.to_vec(), ..base.clone() }, &params));
    let k = finite_difference(&base.k, |x| loss(&Problem { k: x.to_vec(), ..base.clone() }, &params));
    let v = finite_difference(&base.v, |x| loss(&Problem { v: x.to_vec(), ..base.clone() }, &params));
    let beta =
        finite_difference(&base.beta, |x| loss(&Problem { beta: x.to_vec(), ..base.clone() }, &params));
    let tau = finite_difference(params.threshold.as_ref().expect("set"), |x| {
        loss(&base, &Params { threshold: Some(x.to_vec()), ..params.clone() })
    });
    for (name, actual, quotient) in [
        ("q", &gradients.q, &q),
        ("k", &gradients.k, &k),
        ("v", &gradients.v, &v),
        ("beta", &gradients.beta, &beta),
        ("threshold", &gradients.threshold, &tau),
    ] {
        assert_gradient(name, actual, quotient);
    }
}

#[test]
fn the_gate_is_the_gradient_of_the_hard_forward() {
    let mut rng = rng(32);
    let base = problem(&mut rng, 7);
    let dy = uniform(&mut rng, 2 * 4 * 3 * 3);
    for gate in [Gate::Energy { temperature: 0.8 }, Gate::Coherence] {
        for coherence in [CoherenceMode::Global, CoherenceMode::Passage] {
            let params = Params { gate, coherence, ..settings(Estimator::Winner) };
            let scanned = scan(&base, 2);
            let gradients = backward(&base, &scanned, &params, &dy);
            let loss = |p: &Problem| dot(&select(p, &scanned, &params).y, &dy);
            let q = finite_difference(&base.q, |x| loss(&Problem { q: x.to_vec(), ..base.clone() }));
            let v = finite_difference(&base.v, |x| loss(&Problem { v: x.to_vec(), ..base.clone() }));
            assert_gradient("q", &gradients.q, &q);
            assert_gradient("v", &gradients.v, &v);
        }
    }
}

#[test]
fn dense_is_candidates_with_every_key() {
    let mut rng = rng(41);
    let base = Problem { mask: Mask::causal(2), ..problem(&mut rng, 5) };
    let dy = uniform(&mut rng, 2 * 4 * 3 * 3);
    let dense = backward(&base, &scan(&base, 1), &settings(Estimator::Dense), &dy);
    let all = backward(&base, &scan(&base, 5), &settings(Estimator::Candidates), &dy);
    let one_candidate = backward(&base, &scan(&base, 1), &settings(Estimator::Candidates), &dy);
    for (x, y) in [(&dense.q, &all.q), (&dense.k, &all.k), (&dense.v, &all.v), (&dense.prior, &all.prior)] {
        assert_close("dense", x, y, 0.0);
    }
    assert_ne!(one_candidate.k, dense.k);
    let y = |estimator, k| select(&base, &scan(&base, k), &settings(estimator)).y;
    assert_eq!(y(Estimator::Dense, 1), y(Estimator::Candidates, 1));
}

#[test]
fn values_that_are_not_selected_are_not_read() {
    let mut rng = rng(51);
    let mut base = problem(&mut rng, 6);
    let params = settings(Estimator::Winner);
    let scanned = scan(&base, 4);
    let clean = select(&base, &scanned, &params);
    let used: Vec<_> = base
        .rows()
        .filter(|(row, _)| clean.index[*row] >= 0)
        .flat_map(|(row, (b, h, _))| base.v_at(b, h, clean.index[row] as usize))
        .collect();
    let unused: Vec<_> = (0..base.v.len()).filter(|at| !used.contains(at)).collect();
    assert!(!unused.is_empty());
    unused.iter().for_each(|&at| base.v[at] = f64::NAN);
    assert_eq!(select(&base, &scanned, &params).y, clean.y);
    let gradients = backward(&base, &scanned, &params, &vec![1.0; clean.y.len()]);
    assert!(gradients.q.iter().chain(&gradients.k).chain(&gradients.v).all(|g| g.is_finite()));
}

#[test]
fn a_row_without_a_key_abstains() {
    let mut rng = rng(61);
    let base = Problem { mask: Mask::causal(-2), ..problem(&mut rng, 4) };
    for estimator in ALL {
        let params = Params { threshold: None, ..settings(estimator) };
        let scanned = scan(&base, 2);
        let out = select(&base, &scanned, &params);
        let gradients = backward(&base, &scanned, &params, &vec![1.0; out.y.len()]);
        for (row, (b, h, i)) in base.rows() {
            assert_eq!(out.index[row] >= 0, i == 2, "row {row}");
            if i < 2 {
                assert!(out.y[row * 3..][..3].iter().all(|&y| y == 0.0));
                assert!(gradients.q[base.q_at(b, h, i)].iter().all(|&g| g == 0.0));
            }
        }
    }
}
