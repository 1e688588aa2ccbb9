//! The rules of `select` on a small problem in f64: gradients against finite differences, thresholds, gates and rounds.

use candle_core::{Device, Tensor, Var};
use gd_kernels::{Barrier, CoherenceMode, Estimator, Gate, Mask, Scan, Select, decode, scan, select};
use gd_testing::problems::{rng, uniform, values};
use gd_testing::tensors::check_gradients;

/// q, k, v, beta, prior, threshold, alpha, rounds in f64: B 2, Hq 4, Hk 2, N 3, M 7, D 4, Dv 3.
fn smooth() -> Vec<Tensor> {
    let shapes: [&[usize]; 8] =
        [&[2, 4, 3, 4], &[2, 2, 7, 4], &[2, 2, 7, 3], &[4], &[2, 4, 7], &[4], &[4], &[4, 3]];
    let mut rng = rng(77);
    let tensor = |(n, shape): (usize, &&[usize])| {
        let x = uniform(&mut rng, shape.iter().product());
        let x: Vec<f64> = match n {
            3 => x.iter().map(|x| 0.6 + 0.2 * x).collect(),
            5 => x.iter().map(|x| 1.0 + 0.5 * x).collect(),
            6 => x.iter().map(|x| 0.5 + 0.4 * x).collect(),
            _ => x,
        };
        Tensor::from_vec(x, *shape, &Device::Cpu).unwrap()
    };
    shapes.iter().enumerate().map(tensor).collect()
}

/// `select` as a function of [`smooth`], over all keys, with key 2 protected.
fn of_smooth(t: &[Tensor], set: impl Fn(&mut Select)) -> candle_core::Result<Tensor> {
    let mask = Mask::causal(4);
    let protected = Tensor::new(&[2i32], &Device::Cpu)?.reshape((1, 1, 1, 1))?;
    let detached = |t: &Tensor| t.detach();
    let (beta, prior) = (detached(&t[3]), detached(&t[4]));
    let options = Scan { prior: Some(&prior), protected: Some(&protected), ..Scan::new(&beta, &mask, 8) };
    let scanned = scan(&detached(&t[0]), &detached(&t[1]), &options)?;
    let mut options = Select {
        prior: Some(&t[4]),
        threshold: Some(&t[5]),
        alpha: Some(&t[6]),
        rounds: Some(&t[7]),
        ..Select::new(&t[3])
    };
    set(&mut options);
    Ok(select(&t[0], &t[1], &t[2], &scanned, &options)?.y)
}

/// Checks all inputs of [`smooth`] but those that the result does not depend on.
fn differences(without: &[usize], set: impl Fn(&mut Select) + Copy) {
    differences_at(&smooth(), without, set);
}

/// As [`differences`], at other values of the inputs.
fn differences_at(all: &[Tensor], without: &[usize], set: impl Fn(&mut Select) + Copy) {
    let used: Vec<usize> = (0..all.len()).filter(|n| !without.contains(n)).collect();
    let inputs: Vec<Tensor> = used.iter().map(|&n| all[n].clone()).collect();
    check_gradients(&inputs, |inputs| {
        let mut t = all.to_vec();
        used.iter().zip(inputs).for_each(|(&n, x)| t[n] = x.clone());
        of_smooth(&t, set)
    });
}

const BARRIER: Barrier = Barrier { floor: 0.3, margin: 0.4, strength: 0.7, entropy_trigger: 0.5, slack: 3.0 };

#[test]
fn the_blend_is_its_own_gradient() {
    for (rounds, barrier) in [(false, None), (true, None), (true, Some(BARRIER))] {
        let without: &[usize] = if rounds { &[6] } else { &[6, 7] };
        differences(without, |s| {
            s.estimator = Estimator::Blend;
            s.temperature = 0.7;
            s.barrier = barrier;
            s.rounds = s.rounds.filter(|_| rounds);
        });
    }
}

#[test]
fn the_gradient_of_the_winner_passes_its_gate() {
    for barrier in [None, Some(BARRIER)] {
        differences(&[6], |s| {
            s.estimator = Estimator::Winner;
            s.gate = Gate::Energy { temperature: 0.8 };
            s.barrier = barrier;
        });
        for coherence in [CoherenceMode::Global, CoherenceMode::Passage] {
            // The prior and the threshold only determine the winner.
            differences(&[4, 5], |s| {
                s.estimator = Estimator::Winner;
                s.gate = Gate::Coherence;
                s.barrier = barrier;
                s.coherence = coherence;
            });
        }
    }
}

#[test]
fn a_threshold_per_query_has_the_gradient_of_the_forward_pass() {
    let mut all = smooth();
    let noise = uniform(&mut rng(78), 2 * 4 * 3).iter().map(|x| 1.5 + 0.5 * x).collect();
    all[5] = Tensor::from_vec(noise, (2, 4, 3), &Device::Cpu).unwrap();
    differences_at(&all, &[6], |s| (s.estimator, s.temperature) = (Estimator::Blend, 0.7));
    let gate = Gate::Energy { temperature: 0.8 };
    for barrier in [None, Some(BARRIER)] {
        differences_at(&all, &[6], |s| {
            (s.estimator, s.gate, s.barrier) = (Estimator::Winner, gate, barrier);
        });
    }
    differences_at(&all, &[6, 7], |s| {
        (s.estimator, s.gate, s.picks) = (Estimator::Winner, gate, 3);
        (s.rounds, s.exclude_below) = (None, 0.0);
    });
}

#[test]
fn the_margin_gate_has_the_gradient_of_the_forward_pass() {
    let gate = Gate::Margin { temperature: 0.8 };
    for (exclude_below, hardness) in [(0.0, 1.0), (0.5, 1.0), (0.0, 0.4)] {
        differences(&[6, 7], |s| {
            (s.estimator, s.gate, s.rounds) = (Estimator::Winner, gate, None);
            (s.exclude_below, s.hardness) = (exclude_below, hardness);
        });
    }
    differences(&[6, 7], |s| {
        (s.estimator, s.gate, s.picks) = (Estimator::Winner, gate, 3);
        (s.rounds, s.exclude_below) = (None, 0.0);
    });
}

/// A query with one candidate has no runner-up: its gate is 1, and nothing of its gradients is undefined.
#[test]
fn a_single_candidate_passes_the_margin_gate() {
    let [q, k, v, beta, ..] = &smooth()[..] else { unreachable!("eight tensors") };
    let tau = Var::from_tensor(&Tensor::new(&[-3f64, -1.0, 0.0, 2.0], &Device::Cpu).unwrap()).unwrap();
    let q = Var::from_tensor(q).unwrap();
    // The first query sees one key, the second two.
    let mask = Mask::causal(0);
    let scanned = scan(&q, k, &Scan::new(beta, &mask, 4)).unwrap();
    let options =
        Select { threshold: Some(&tau), gate: Gate::Margin { temperature: 0.5 }, ..Select::new(beta) };
    let options = Select { exclude_below: 0.0, ..options };
    let out = select(&q, k, v, &scanned, &options).unwrap();
    let (gates, margins) = (values(&out.gate), values(&out.margin));
    for row in 0..24 {
        let tau = [-3f64, -1.0, 0.0, 2.0][row / 3 % 4];
        let expected = if row % 3 == 0 { 1.0 } else { 1.0 / (1.0 + (-(margins[row] + tau) / 0.5).exp()) };
        assert!((gates[row] - expected).abs() < 1e-12, "row {row}: {} is not {expected}", gates[row]);
    }
    let grads = out.y.sqr().unwrap().sum_all().unwrap().backward().unwrap();
    for (name, var) in [("q", &q), ("threshold", &tau)] {
        let gradient = values(grads.get(var).unwrap());
        assert!(gradient.iter().all(|x| x.is_finite()), "{name}: {gradient:?}");
        assert!(gradient.iter().any(|x| *x != 0.0), "{name}");
    }
}

#[test]
fn decoding_compares_every_winner_with_the_threshold_of_its_query() {
    let [q, k, v, beta, ..] = &smooth()[..] else { unreachable!("eight tensors") };
    let mask = Mask::causal(4);
    for candidates in [1, 4] {
        let options = Scan::new(beta, &mask, candidates);
        let free = decode(q, k, v, &options, None).unwrap();
        let energies = values(&free.energy);
        // Just above the energy of every second winner, and just below that of the others.
        let tau: Vec<f64> =
            energies.iter().enumerate().map(|(row, e)| e + if row % 2 == 0 { 1e-9 } else { -1e-9 }).collect();
        let tau = Tensor::from_vec(tau, (2, 4, 3), &Device::Cpu).unwrap();
        let winners = decode(q, k, v, &options, Some(&tau)).unwrap();
        let (index, all) = (values(&winners.index), values(&free.index));
        for row in 0..24 {
            assert_eq!(index[row], if row % 2 == 0 { all[row] } else { -1.0 }, "row {row}");
        }
    }
}

#[test]
fn a_half_hard_blend_with_a_gated_winner() {
    differences(&[6], |s| {
        s.estimator = Estimator::Winner;
        s.gate = Gate::Energy { temperature: 0.8 };
        s.hardness = 0.3;
    });
}

/// The selections and outputs of every round, and the energies of the first.
#[test]
fn the_outputs_of_the_rounds_add_up_to_y() {
    let t = smooth();
    let mask = Mask::causal(4);
    let protected = Tensor::new(&[2i32], &Device::Cpu).unwrap().reshape((1, 1, 1, 1)).unwrap();
    let options = Scan { protected: Some(&protected), ..Scan::new(&t[3], &mask, 4) };
    let scanned = scan(&t[0], &t[1], &options).unwrap();
    let options = Select { threshold: Some(&t[5]), rounds: Some(&t[7]), ..Select::new(&t[3]) };
    let chosen = select(&t[0], &t[1], &t[2], &scanned, &options).unwrap();
    assert_eq!(values(&chosen.compared), values(&scanned.energy), "nothing lifts a candidate");
    let (v, weights, y) = (values(&t[2]), values(&t[7]), values(&chosen.y));
    let ints = |t: &Tensor| t.flatten_all().unwrap().to_vec1::<i32>().unwrap();
    let mut rounds = vec![ints(&chosen.index)];
    rounds.extend(chosen.later.iter().map(|round| ints(&round.index)));
    assert_eq!(rounds.len(), 3);
    // The value row that a round selects, times the weight of the round.
    let read = |r: usize, row: usize, d: usize| {
        let (b, h, j) = (row / 12, row / 3 % 4, rounds[r][row]);
        if j < 0 { 0.0 } else { weights[h * 3 + r] * v[((b * 2 + h / 2) * 7 + j as usize) * 3 + d] }
    };
    let (mut read_later, mut ended) = (0, 0);
    for row in 0..2 * 4 * 3 {
        for d in 0..3 {
            for (r, round) in chosen.later.iter().enumerate() {
                let added = values(&round.y)[row * 3 + d];
                assert!((added - read(r + 1, row, d)).abs() < 1e-12, "round {r} of row {row}: {added}");
            }
            let sum: f64 = (0..3).map(|r| read(r, row, d)).sum();
            assert!((y[row * 3 + d] - sum).abs() < 1e-12, "row {row}: {} against {sum}", y[row * 3 + d]);
        }
        let keys: Vec<i32> = rounds.iter().map(|round| round[row]).collect();
        assert!(keys.windows(2).all(|k| k[0] >= 0 || k[1] < 0), "{keys:?}: a row selects after it abstained");
        assert!(keys.iter().all(|k| *k < 0 || keys.iter().filter(|x| *x == k).count() == 1), "{keys:?}");
        read_later += keys[1..].iter().filter(|k| **k >= 0).count();
        ended += keys.iter().filter(|k| **k < 0).count();
    }
    assert!(read_later > 10 && ended > 3, "{read_later} {ended}");
    // With the barrier, the winner has the least of the compared energies.
    let lifting = Select { barrier: Some(BARRIER), ..Select::new(&t[3]) };
    let chosen = select(&t[0], &t[1], &t[2], &scanned, &lifting).unwrap();
    let compared = values(&chosen.compared);
    assert_ne!(compared, values(&scanned.energy));
    for (energies, energy) in compared.chunks(5).zip(values(&chosen.energy)) {
        assert_eq!(energies.iter().copied().fold(f64::INFINITY, f64::min), energy);
    }
}

#[test]
fn a_nan_in_an_unselected_value_stays_there() {
    let t = smooth();
    let mask = Mask::none();
    let scanned = scan(&t[0], &t[1], &Scan::new(&t[3], &mask, 4)).unwrap();
    let options = Select { estimator: Estimator::Winner, ..Select::new(&t[3]) };
    let chosen = select(&t[0], &t[1], &t[2], &scanned, &options).unwrap();
    let index: Vec<i32> = chosen.index.flatten_all().unwrap().to_vec1().unwrap();
    let mut v = values(&t[2]);
    for (row, v) in v.chunks_mut(3).enumerate() {
        let (b, h, j) = (row / 14, row / 7 % 2, row % 7);
        // Query heads 2h and 2h + 1 of this entry, three queries each.
        let readers = &index[(b * 4 + 2 * h) * 3..][..6];
        if !readers.contains(&(j as i32)) {
            v.fill(f64::NAN);
        }
    }
    assert!(v.iter().any(|x| x.is_nan()));
    let v = Var::from_tensor(&Tensor::from_vec(v, t[2].shape(), &Device::Cpu).unwrap()).unwrap();
    for estimator in [Estimator::Winner, Estimator::Candidates] {
        let options = Select { estimator, ..options.clone() };
        let y = select(&t[0], &t[1], &v, &scanned, &options).unwrap().y;
        assert_eq!(values(&y), values(&chosen.y), "{estimator:?}");
    }
    let y = select(&t[0], &t[1], &v, &scanned, &options).unwrap().y;
    let grads = y.sum_all().unwrap().backward().unwrap();
    assert!(values(grads.get(&v).unwrap()).iter().all(|x| x.is_finite()));
}

#[test]
fn with_a_threshold_of_minus_infinity_every_row_abstains() {
    let t = smooth();
    let tau = Var::from_tensor(&Tensor::full(f64::NEG_INFINITY, 4, &Device::Cpu).unwrap()).unwrap();
    let mask = Mask::none();
    let scanned = scan(&t[0], &t[1], &Scan::new(&t[3], &mask, 4)).unwrap();
    for estimator in gd_testing::problems::choices::ESTIMATORS.into_iter().filter(|e| *e != Estimator::Dense)
    {
        for hardness in [0.3, 1.0] {
            let q = Var::from_tensor(&t[0]).unwrap();
            let options = Select { estimator, hardness, threshold: Some(&tau), ..Select::new(&t[3]) };
            let out = select(&q, &t[1], &t[2], &scanned, &options).unwrap();
            assert!(
                values(&out.y).iter().all(|x| *x == 0.0) && values(&out.index).iter().all(|j| *j == -1.0)
            );
            let grads = out.y.sum_all().unwrap().backward().unwrap();
            for t in [&q, &tau] {
                assert!(values(grads.get(t).unwrap()).iter().all(|x| x.is_finite()), "{estimator:?}");
            }
        }
    }
}
