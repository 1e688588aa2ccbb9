//! The theorems about one query and its keys, as properties of the f64 reference.

use gd_kernels::reference::theory::{
    Coherence, Pair, coherence, coherence_defect, density, minimal_energy, passage_energy,
};
use gd_kernels::reference::{Problem, barrier, dot, logsumexp, refine, scan};
use gd_kernels::{Barrier, CoherenceMode, Score, TieBreak};
use gd_testing::properties;
use proptest::prelude::*;

use crate::naive::{assert_gradient, finite_difference};

const MODES: [CoherenceMode; 2] = [CoherenceMode::Global, CoherenceMode::Passage];

fn vector(d: usize) -> impl Strategy<Value = Vec<f64>> {
    prop::collection::vec(-2.0..2.0, d)
}

fn alphas() -> impl Strategy<Value = f64> {
    prop_oneof![3 => 0.02..0.98, 1 => Just(0.5)]
}

/// The passage energy on an even grid of fractions, ends included.
fn grid(t: f64, alpha: f64, cells: usize) -> Vec<f64> {
    let at = |n: usize| Coherence { u: n as f64 / cells as f64, rest: (cells - n) as f64 / cells as f64 };
    (0..=cells).map(|n| passage_energy(t, at(n), alpha)).collect()
}

/// How often the coherence defect changes its sign on a fine grid.
fn sign_changes(t: f64, alpha: f64) -> usize {
    // An odd number of cells keeps the grid off u = 1/2, a root for alpha = 1/2.
    let signs: Vec<bool> =
        (0..=20_001).map(|n| coherence_defect(n as f64 / 20_001.0, t, alpha) > 0.0).collect();
    signs.windows(2).filter(|w| w[0] != w[1]).count()
}

proptest! {
    #![proptest_config(properties(256))]

    #[test]
    fn energy_off_the_passage_is_higher_by_the_squared_residual(
        q in vector(6), k in vector(6), s in vector(6), alpha in alphas(), beta in 0.05..4.0
    ) {
        let pair = Pair::new(&q, &k);
        let (x, y) = pair.split(&s);
        let off = pair.energy(&s, alpha, beta);
        let on = pair.energy(&pair.passage(x), alpha, beta);
        let expected = beta * dot(&y, &y);
        prop_assert!(dot(&y, &pair.direction).abs() <= 1e-12);
        prop_assert!((off - on - expected).abs() <= 1e-11 * (1.0 + off.abs()), "{off} - {on} != {expected}");
    }

    #[test]
    fn the_coherence_point_is_the_least_energy_of_the_whole_space(
        q in vector(4), k in vector(4), shift in vector(4), alpha in alphas(), beta in 0.05..4.0
    ) {
        let pair = Pair::new(&q, &k);
        let point = pair.coherence_point(alpha, beta, CoherenceMode::Global);
        let least = pair.energy(&point, alpha, beta);
        let star = minimal_energy(beta * pair.length * pair.length, alpha, CoherenceMode::Global);
        prop_assert!((least - star.value).abs() <= 1e-11 * (1.0 + least.abs()));
        for scale in [1e-3, 0.1, 1.0] {
            let near: Vec<f64> = point.iter().zip(&shift).map(|(b, d)| b + scale * d).collect();
            prop_assert!(pair.energy(&near, alpha, beta) >= least - 1e-12);
        }
    }

    #[test]
    fn minimal_energy_rises_strictly(t in 1e-6..60.0f64, more in 1.0001..3.0f64, alpha in alphas()) {
        for mode in MODES {
            let (low, high) = (minimal_energy(t, alpha, mode), minimal_energy(t * more, alpha, mode));
            // E* is concave, so the smaller slope bounds the rise from below. Where the bound is
            // within f64's rounding of E* the two cannot be distinguished.
            let rise = high.d_t.min(low.d_t) * t * (more - 1.0);
            prop_assert!(high.d_t > 0.0 && low.d_t > 0.0);
            if rise > 1e-14 {
                prop_assert!(high.value > low.value, "{mode:?}: E*({t}) = {} but E*({}) = {}",
                    low.value, t * more, high.value);
            }
            prop_assert!(high.value >= low.value - 4.0 * f64::EPSILON);
        }
    }

    #[test]
    fn derivatives_of_energy_and_density(t in 0.01..12.0f64, alpha in 0.05..0.95f64) {
        // At alpha = 1/2 the two wells change places, and at t = 2 there the slope has a kink.
        prop_assume!((alpha - 0.5).abs() > 1e-3);
        for mode in MODES {
            for (name, of) in [("energy", minimal_energy as fn(f64, f64, _) -> _), ("density", density)] {
                let at = of(t, alpha, mode);
                let quotient = finite_difference(&[t, alpha], |x| of(x[0], x[1], mode).value);
                assert_gradient(name, &[at.d_t, at.d_alpha], &quotient);
            }
            let at = minimal_energy(t, alpha, mode);
            prop_assert_eq!(at.d_t, at.at.u * at.at.rest);
        }
    }

    #[test]
    fn one_root_up_to_two(t in 0.0..2.0f64, alpha in alphas()) {
        prop_assert_eq!(sign_changes(t, alpha), 1);
        for mode in MODES {
            let u = coherence(t, alpha, mode).u;
            prop_assert!(coherence_defect(u, t, alpha).abs() <= 1e-14);
        }
        // With m = 2u - 1 the same equation reads m = tanh((l + t m) / 2).
        let m = 2.0 * coherence(t, alpha, CoherenceMode::Global).u - 1.0;
        let l = ((1.0 - alpha) / alpha).ln();
        prop_assert!((m - ((l + t * m) / 2.0).tanh()).abs() <= 1e-13);
    }

    #[test]
    fn the_global_well_beyond_two(t in 2.0..400.0f64, alpha in alphas()) {
        let star = minimal_energy(t, alpha, CoherenceMode::Global);
        prop_assert!(coherence_defect(star.at.u, t, alpha).abs() <= 1e-12);
        let cells = 20_000;
        let on_grid = grid(t, alpha, cells).into_iter().fold(f64::INFINITY, f64::min);
        // The curvature of the energy is at most 2t, the grid's least point half a cell away.
        let slack = t / (4.0 * (cells * cells) as f64);
        prop_assert!(star.value <= on_grid + 1e-13, "{} above the grid's {on_grid}", star.value);
        prop_assert!(star.value >= on_grid - slack - 1e-13, "{} below the grid's {on_grid}", star.value);
        prop_assert_eq!(star.at.u <= 0.5, alpha >= 0.5, "the heavier well, a tie toward the query");
    }

    #[test]
    fn nearest_key_has_the_least_minimal_energy(
        q in vector(5), keys in prop::collection::vec(vector(5), 1..12), alpha in alphas(), beta in 0.05..2.0
    ) {
        let problem = one_query(&q, &keys, beta);
        let scanned = scan(&problem, 1);
        let t: Vec<f64> = keys.iter().map(|k| beta * Pair::new(&q, k).length.powi(2)).collect();
        for mode in MODES {
            let e: Vec<f64> = t.iter().map(|&t| minimal_energy(t, alpha, mode).value).collect();
            let nearest = scanned.index[0] as usize;
            for j in 0..keys.len() {
                // Where the energies differ by more than rounding they must order as the distances.
                prop_assert!(e[nearest] <= e[j] + 8.0 * f64::EPSILON, "{mode:?}: key {j} has less energy");
                prop_assert!(t[nearest] <= t[j] * (1.0 + 8.0 * f64::EPSILON));
            }
        }
    }

    #[test]
    fn equal_energies_go_to_the_first_or_the_last(
        q in vector(3), k in vector(3), copies in 2usize..6, far in vector(3)
    ) {
        let far: Vec<f64> = far.iter().map(|x| x + 10.0).collect();
        let mut keys = vec![far];
        keys.extend(std::iter::repeat_n(k, copies));
        let mut problem = one_query(&q, &keys, 1.0);
        let ascending: Vec<i32> = (1..=copies as i32).collect();
        for score in [Score::Energy, Score::Dot] {
            problem.score = score;
            if score == Score::Dot {
                // Every key scores 0.
                problem.q = vec![0.0; 3];
                problem.tie = TieBreak::First;
                prop_assert_eq!(scan(&problem, 1).index[0], 0);
                continue;
            }
            problem.tie = TieBreak::First;
            prop_assert_eq!(&scan(&problem, copies).index, &ascending);
            problem.tie = TieBreak::Last;
            let descending: Vec<i32> = ascending.iter().rev().copied().collect();
            prop_assert_eq!(&scan(&problem, copies).index, &descending);
        }
    }

    #[test]
    fn barrier_identities(scores in prop::collection::vec(-4.0..4.0, 2..9), at in 0usize..8, rule in rules()) {
        let flags: Vec<bool> = (0..scores.len()).map(|j| j == at % scores.len()).collect();
        let lift = barrier(&scores, &flags, &rule);
        let p = at % scores.len();
        prop_assert_eq!(lift.protected, Some(p));
        for (j, (new, old)) in lift.scores.iter().zip(&scores).enumerate() {
            prop_assert!(new >= old, "the barrier lowered score {j} from {old} to {new}");
            prop_assert!(j == p || new == old, "the barrier moved the unprotected score {j}");
        }
        let weight = (lift.scores[p] - logsumexp(lift.scores.iter().copied())).exp();
        if lift.activated {
            prop_assert!(weight >= rule.floor - 1e-12, "weight {weight} below the floor {}", rule.floor);
        } else {
            prop_assert_eq!(&lift.scores, &scores);
        }
        // A better protected score never ends lower while the rule stays in force.
        let mut better = scores.clone();
        better[p] += 0.05;
        let again = barrier(&better, &flags, &rule);
        if lift.activated && again.activated && rule.strength <= 1.0 {
            prop_assert!(again.scores[p] >= lift.scores[p] - 1e-12);
        }
        // Without a protected candidate nothing changes.
        let open = barrier(&scores, &vec![false; scores.len()], &rule);
        prop_assert!(!open.activated && open.protected.is_none() && open.scores == scores);
    }

    #[test]
    fn barrier_slope(scores in prop::collection::vec(-4.0..4.0, 2..9), at in 0usize..8, rule in rules()) {
        let flags: Vec<bool> = (0..scores.len()).map(|j| j == at % scores.len()).collect();
        let lift = barrier(&scores, &flags, &rule);
        let p = at % scores.len();
        let steady = scores.iter().enumerate().all(|(j, _)| [-1e-5, 1e-5].iter().all(|step| {
            let mut moved = scores.clone();
            moved[j] += step;
            let other = barrier(&moved, &flags, &rule);
            let apart = other.slope.iter().zip(&lift.slope).any(|(x, y)| (x - y).abs() > 1e-3);
            other.activated == lift.activated && !apart
        }));
        prop_assume!(steady);
        let quotient = finite_difference(&scores, |s| barrier(s, &flags, &rule).scores[p]);
        assert_gradient("slope", &lift.slope, &quotient);
        let sum = |s: &[f64]| -> f64 {
            barrier(s, &flags, &rule).scores.iter().enumerate().map(|(j, s)| (j + 1) as f64 * s).sum()
        };
        let weights: Vec<f64> = (0..scores.len()).map(|j| (j + 1) as f64).collect();
        assert_gradient("pull_back", &lift.pull_back(&weights), &finite_difference(&scores, sum));
    }

    #[test]
    fn refinement_identities(q in vector(5), k in vector(5), dy in vector(5)) {
        let pair = Pair::new(&q, &k);
        prop_assume!(pair.length > 1e-2);
        let rest = refine::residual_query(&q, &k);
        prop_assert!(dot(&rest, &pair.direction).abs() <= 1e-12);
        prop_assert!(dot(&rest, &rest) <= dot(&q, &q) * (1.0 + 1e-12));
        let again: f64 = rest.iter().zip(&q).map(|(r, q)| (q - r).powi(2)).sum();
        prop_assert!((dot(&rest, &rest) + again - dot(&q, &q)).abs() <= 1e-12 * (1.0 + dot(&q, &q)));
        let (dq, dk) = refine::residual_query_backward(&q, &k, &dy);
        let of = |q: &[f64], k: &[f64]| dot(&refine::residual_query(q, k), &dy);
        assert_gradient("dq", &dq, &finite_difference(&q, |q| of(q, &k)));
        assert_gradient("dk", &dk, &finite_difference(&k, |k| of(&q, k)));
    }
}

fn rules() -> impl Strategy<Value = Barrier> {
    (0.05..0.6, 0.0..3.0, 0.0..3.0, 0.0..1.0, 0.0..1.0).prop_map(
        |(floor, margin, strength, entropy_trigger, slack)| Barrier {
            floor,
            margin,
            strength,
            entropy_trigger,
            slack,
        },
    )
}

fn one_query(q: &[f64], keys: &[Vec<f64>], beta: f64) -> Problem {
    Problem {
        batch: 1,
        q_heads: 1,
        kv_heads: 1,
        queries: 1,
        keys: keys.len(),
        dim: q.len(),
        q: q.to_vec(),
        k: keys.concat(),
        beta: vec![beta],
        ..Problem::default()
    }
}

#[test]
fn three_roots_or_one_beyond_two() {
    assert_eq!(sign_changes(2.5, 0.5), 3);
    assert_eq!(sign_changes(8.0, 0.45), 3);
    assert_eq!(sign_changes(2.5, 0.1), 1, "a well that light is none");
}

#[test]
fn passage_mode_stays_on_the_saddle() {
    for t in [0.0, 0.3, 2.0, 7.0, 1e3, 1e6] {
        let at = minimal_energy(t, 0.5, CoherenceMode::Passage);
        assert_eq!(at.at.u, 0.5);
        assert!((at.value - t / 4.0).abs() <= 1e-12 * (1.0 + t), "{t}: {}", at.value);
    }
    let (well, saddle) =
        (minimal_energy(7.0, 0.5, CoherenceMode::Global), minimal_energy(7.0, 0.5, CoherenceMode::Passage));
    assert!(well.value < saddle.value && well.at.u < 0.01);
}

#[test]
fn finite_and_saturated_far_away() {
    for alpha in [1e-9, 0.3, 0.5, 0.9] {
        for mode in MODES {
            let mut last = f64::NEG_INFINITY;
            for t in [0.0, 1e-300, 1e-12, 1.0, 2.0, 10.0, 700.0, 1e4, 1e6] {
                let at = minimal_energy(t, alpha, mode);
                assert!(at.value.is_finite() && at.d_t.is_finite() && at.d_alpha.is_finite());
                assert!((0.0..=1.0).contains(&at.at.u) && at.value >= last - 1e-15, "{alpha} {t} {at:?}");
                last = at.value;
            }
        }
        let far = minimal_energy(1e6, alpha, CoherenceMode::Global).value;
        assert!((far + alpha.max(1.0 - alpha).ln()).abs() <= 1e-12, "{alpha}: {far}");
        let near = density(0.0, alpha, CoherenceMode::Global);
        assert!((near.value - 1.0).abs() <= 1e-12 && (near.at.u - (1.0 - alpha)).abs() <= 1e-12);
    }
}

#[test]
fn coinciding_query_and_key_have_no_direction() {
    let q = [1.0, -2.0];
    let pair = Pair::new(&q, &q);
    assert_eq!((pair.length, pair.direction.clone()), (0.0, vec![0.0, 0.0]));
    assert_eq!(pair.passage(3.0), q);
    assert_eq!(refine::residual_query(&q, &q), q);
    assert_eq!(refine::residual_query_backward(&q, &q, &[3.0, 4.0]), (vec![3.0, 4.0], vec![0.0, 0.0]));
}
