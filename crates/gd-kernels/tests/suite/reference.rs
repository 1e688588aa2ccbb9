//! The reference checked against itself: masks by position and by interval, the scan's order, the
//! choice on a worked example, the running average as recurrence and as closed form.

use gd_kernels::reference::average::{average, average_backward, average_direct, shares};
use gd_kernels::reference::scan::may_see;
use gd_kernels::reference::{Params, Problem, dot, scan, select};
use gd_kernels::{Gate, Mask, Score, TieBreak};
use gd_testing::properties;
use proptest::prelude::*;

use crate::naive::{assert_close, assert_gradient, finite_difference, problem, rng, uniform};

fn masks() -> impl Strategy<Value = (Mask, usize)> {
    let base = prop_oneof![
        Just(Mask::none()),
        (-6i64..12).prop_map(Mask::causal),
        (1usize..7, -6i64..12).prop_map(|(w, o)| Mask::window(w, o)),
        any::<i64>().prop_map(Mask::causal),
        (1usize.., any::<i64>()).prop_map(|(w, o)| Mask::window(w, o)),
        (1usize..7, prop_oneof![Just(i64::MIN), Just(i64::MAX)]).prop_map(|(w, o)| Mask::window(w, o)),
    ];
    (
        base,
        1usize..14,
        prop::option::of(prop::collection::vec(0usize..14, 0..4)),
        prop::option::of(0usize..14),
    )
        .prop_map(|(mut mask, keys, cuts, length)| {
            if let Some(mut cuts) = cuts {
                cuts.iter_mut().for_each(|c| *c = (*c).min(keys));
                cuts.extend([0, keys]);
                cuts.sort_unstable();
                mask = mask.packed(vec![cuts]);
            }
            if let Some(length) = length {
                mask = mask.kv_len(vec![length.min(keys)]);
            }
            (mask, keys)
        })
}

proptest! {
    #![proptest_config(properties(512))]

    #[test]
    fn a_mask_is_the_same_by_position_and_by_interval((mask, keys) in masks()) {
        mask.validate(1, keys).expect("a sound mask");
        for i in 0..16 {
            let range = mask.visible(0, i, keys);
            for j in 0..keys {
                prop_assert_eq!(may_see(&mask, 0, i, j, keys), range.contains(&j), "{:?} i {} j {}", mask, i, j);
            }
        }
    }

    #[test]
    fn average_recurrence_and_closed_form(seed in 0u64..10_000, n in 1usize..20) {
        let mut rng = rng(seed);
        let decay: Vec<f64> = uniform(&mut rng, n).iter().map(|x| 4.0 * x).collect();
        let write: Vec<f64> = uniform(&mut rng, n).iter().map(|x| 3.0 * x).collect();
        let v = uniform(&mut rng, 2 * n);
        let (m, state) = average(&decay, &write, &v, 2, None);
        assert_close("m", &m, &average_direct(&decay, &write, &v, 2), 1e-12);
        prop_assert!(m.iter().all(|x| x.abs() <= 1.0), "an average leaves the range of its values");
        // In two parts, with the state between them.
        let cut = n / 2;
        let (head, carried) = average(&decay[..cut], &write[..cut], &v[..2 * cut], 2, None);
            let (tail, end) = average(&decay[cut..], &write[cut..], &v[2 * cut..], 2, Some(&carried));
        prop_assert_eq!([head, tail].concat(), m);
        prop_assert_eq!(end, state);
    }
}

#[test]
fn average_gradient() {
    let mut rng = rng(9);
    let n = 7;
    let decay: Vec<f64> = uniform(&mut rng, n).iter().map(|x| 3.0 * x).collect();
    let write = uniform(&mut rng, n);
    let (v, dm) = (uniform(&mut rng, 3 * n), uniform(&mut rng, 3 * n));
    let (d_decay, d_write, d_v) = average_backward(&decay, &write, &v, 3, &dm);
    let loss = |decay: &[f64], write: &[f64], v: &[f64]| dot(&average(decay, write, v, 3, None).0, &dm);
    assert_gradient("decay", &d_decay, &finite_difference(&decay, |x| loss(x, &write, &v)));
    assert_gradient("write", &d_write, &finite_difference(&write, |x| loss(&decay, x, &v)));
    assert_gradient("v", &d_v, &finite_difference(&v, |x| loss(&decay, &write, x)));
}

#[test]
fn average_shares_do_not_overflow() {
    let shares = shares(&[0.0, -900.0, 900.0], &[5000.0, -5000.0, 5000.0], 2);
    assert!(shares.iter().all(|s| s.is_finite()) && (shares.iter().sum::<f64>() - 1.0).abs() < 1e-12);
    assert!((shares[2] - 1.0).abs() < 1e-12, "{shares:?}");
}

#[test]
fn scan_sorts_pads_and_shares_heads() {
    let mut rng = rng(3);
    let base = Problem { mask: Mask::causal(0), ..problem(&mut rng, 6) };
    for score in [Score::Energy, Score::Dot] {
        let scanned = scan(&Problem { score, ..base.clone() }, 4);
        for (row, (b, h, i)) in base.rows() {
            let index = &scanned.index[row * 4..][..4];
            let energy = &scanned.energy[row * 4..][..4];
            assert_eq!(index.iter().filter(|&&j| j >= 0).count(), i + 1, "query {i} sees {} keys", i + 1);
            assert!(energy.is_sorted());
            for (&j, &e) in index.iter().zip(energy) {
                if j < 0 {
                    assert_eq!(e, f64::INFINITY);
                    continue;
                }
                // Query heads 0, 1 read key-value head 0 and 2, 3 read 1.
                let key = &base.k[((b * 2 + h / 2) * 6 + j as usize) * 4..][..4];
                let query = &base.q[((b * 4 + h) * 3 + i) * 4..][..4];
                let prior = base.prior.as_ref().expect("given")[(b * 4 + h) * 6 + j as usize];
                let norms = dot(query, query) + dot(key, key);
                let plain = match score {
                    Score::Energy => base.beta[h] * (norms - 2.0 * dot(query, key)) - prior,
                    Score::Dot => -base.beta[h] * dot(query, key) - prior,
                };
                assert!((e - plain).abs() <= 1e-12, "{e} against {plain}");
            }
        }
    }
}

#[test]
fn scan_drops_what_is_not_finite_and_keeps_what_is_protected() {
    let mut base = Problem {
        batch: 1,
        q_heads: 1,
        kv_heads: 1,
        queries: 1,
        keys: 6,
        dim: 1,
        q: vec![0.0],
        k: vec![1.0, f64::NAN, 1.0, 3.0, 2.0, f64::INFINITY],
        beta: vec![1.0],
        prior: Some(vec![0.0; 6]),
        protected: Some(vec![3, 5, -1, 0]),
        ..Problem::default()
    };
    let scanned = scan(&base, 2);
    assert_eq!(scanned.width, 6);
    assert_eq!(scanned.index, [0, 2, 3, -1, -1, -1], "keys 1 and 5 have no finite energy, 4 is beyond K");
    assert_eq!(scanned.protected, [true, false, true, false, false, false]);
    base.tie = TieBreak::Last;
    assert_eq!(scan(&base, 2).index[..3], [2, 0, 3]);
    base.prior = Some(vec![0.0, 0.0, f64::NEG_INFINITY, 0.0, 0.0, 0.0]);
    assert_eq!(scan(&base, 2).index[..3], [0, 4, 3], "a prior of minus infinity hides a key");
}

/// Query (3, 0) and three keys with values 1, 10, 100: at energies 4, 9.25 and 13. Without its part
/// along the first jump the query is (0, 0), and the other two stand at 0.25 and 4.
fn worked() -> Problem {
    Problem {
        batch: 1,
        q_heads: 1,
        kv_heads: 1,
        queries: 1,
        keys: 3,
        dim: 2,
        value_dim: 1,
        q: vec![3.0, 0.0],
        k: vec![5.0, 0.0, 0.0, 0.5, 0.0, 2.0],
        v: vec![1.0, 10.0, 100.0],
        beta: vec![1.0],
        ..Problem::default()
    }
}

#[test]
fn refinement_adds_the_next_choice_and_ends_with_abstention() {
    let base = worked();
    let run = |tau: f64, rounds: &[f64]| {
        let (threshold, rounds) = (Some(vec![tau]), Some(rounds.to_vec()));
        let params = Params { threshold, rounds, ..Params::default() };
        select(&base, &scan(&base, 3), &params)
    };
    let out = run(5.0, &[1.0, 0.5]);
    assert_eq!((out.y, out.index), (vec![6.0], vec![0]));
    // From the origin the jump to (0, 1/2) leaves the query where it is: the third key is next.
    assert_eq!(run(5.0, &[1.0, 0.5, 0.25]).y, [31.0]);
    assert_eq!(run(5.0, &[1.0, 0.5, 0.25, 7.0]).y, [31.0], "no candidate is left");
    assert_eq!(run(3.9, &[1.0, 0.5, 0.25, 7.0]).y, [0.0], "nothing follows an abstention");
    assert_eq!(run(3.9, &[1.0, 0.5]).index, [-1]);
}

#[test]
fn the_record_of_a_choice() {
    let base = worked();
    let scanned = scan(&base, 3);
    let params =
        Params { alpha: Some(vec![0.7]), gate: Gate::Energy { temperature: 2.0 }, ..Params::default() };
    let run = |tau: f64| select(&base, &scanned, &Params { threshold: Some(vec![tau]), ..params.clone() });
    let out = run(9.5);
    assert_eq!((out.index[0], out.energy[0], out.margin[0]), (0, 4.0, 5.25));
    let rho = 1.0 / (1.0 + (-5.5f64 / 2.0).exp());
    assert!((out.gate[0] - rho).abs() < 1e-15 && (out.y[0] - rho).abs() < 1e-15);
    let u = out.coherence.expect("alpha is given")[0];
    assert!((u - 1.0 / (1.0 + 7.0 / 3.0 * (4.0 * (1.0 - 2.0 * u)).exp())).abs() < 1e-12);
    let alone = run(9.0);
    assert_eq!((alone.index[0], alone.margin[0]), (0, f64::INFINITY), "the runner-up is above the threshold");
    let none = run(3.0);
    assert_eq!((none.index[0], none.energy[0], none.margin[0]), (-1, f64::INFINITY, f64::INFINITY));
    assert_eq!((none.y[0], none.gate[0], none.coherence), (0.0, 0.0, Some(vec![0.0])));
    let free = select(&base, &scanned, &Params::default());
    assert_eq!((free.gate[0], free.coherence, free.y[0]), (1.0, None, 1.0));
}
