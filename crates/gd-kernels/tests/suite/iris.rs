//! Leave-one-out classification of Iris by selection: the published figures.
//!
//! Each flower is a query `[1, 4]` against the other 149 as keys `[149, 4]`, one batch entry a flower.

use candle_core::{DType, Device, Tensor};
use gd_kernels::reference::theory::{Pair, minimal_energy};
use gd_kernels::reference::{Problem, scan};
use gd_kernels::{CoherenceMode, Mask, Scan, Score, Select, select};

use crate::naive;

const FLOWERS: usize = 150;

/// The measurements, standardised with the population variance, and the species.
fn iris() -> (Vec<[f64; 4]>, Vec<u8>) {
    let text = std::fs::read_to_string(naive::fixture("iris.csv")).expect("the fixture is in the repository");
    let (mut x, mut species) = (vec![], vec![]);
    for line in text.lines().skip(1) {
        let cells: Vec<&str> = line.split(',').collect();
        x.push([0, 1, 2, 3].map(|c| cells[c].parse::<f64>().expect("a measurement")));
        species.push(cells[4].parse().expect("a species"));
    }
    assert_eq!(x.len(), FLOWERS);
    for c in 0..4 {
        let mean = x.iter().map(|row| row[c]).sum::<f64>() / FLOWERS as f64;
        let variance = x.iter().map(|row| (row[c] - mean).powi(2)).sum::<f64>() / FLOWERS as f64;
        x.iter_mut().for_each(|row| row[c] = (row[c] - mean) / variance.sqrt());
    }
    (x, species)
}

fn leave_one_out(x: &[[f64; 4]], score: Score) -> Problem {
    let others = |i: usize| (0..FLOWERS).filter(move |&j| j != i).flat_map(|j| x[j]);
    Problem {
        batch: FLOWERS,
        q_heads: 1,
        kv_heads: 1,
        queries: 1,
        keys: FLOWERS - 1,
        dim: 4,
        q: x.concat(),
        k: (0..FLOWERS).flat_map(others).collect(),
        beta: vec![1.0],
        score,
        ..Problem::default()
    }
}

/// The three figures of an operator that maps a problem to one key position a row.
fn figures(winner: impl Fn(&Problem) -> Vec<i32>) -> [f64; 3] {
    let (x, species) = iris();
    let flower = |(i, j): (usize, i32)| j as usize + usize::from(j as usize >= i);
    let chosen = [Score::Dot, Score::Energy].map(|score| -> Vec<usize> {
        winner(&leave_one_out(&x, score)).into_iter().enumerate().map(flower).collect()
    });
    let share = |hits: usize| hits as f64 / FLOWERS as f64;
    let right = |chosen: &[usize]| share((0..FLOWERS).filter(|&i| species[chosen[i]] == species[i]).count());
    let same = (0..FLOWERS).filter(|&i| chosen[0][i] == chosen[1][i]).count();
    [right(&chosen[0]), right(&chosen[1]), share(same)]
}

/// Softmax accuracy, selection accuracy, how often both take the same key; to four digits.
#[track_caller]
fn assert_published(figures: [f64; 3]) {
    let four = figures.map(|x| format!("{x:.4}"));
    assert_eq!(four, ["0.7733", "0.9467", "0.0600"]);
}

#[test]
fn reference_scan() {
    assert_published(figures(|problem| scan(problem, 1).index));
}

#[test]
fn least_minimal_energy_on_the_passage() {
    assert_published(figures(|problem| match problem.score {
        Score::Dot => scan(problem, 1).index,
        Score::Energy => (0..FLOWERS)
            .map(|b| {
                let query = &problem.q[problem.q_at(b, 0, 0)];
                let energy = |j: usize| {
                    let t = Pair::new(query, &problem.k[problem.k_at(b, 0, j)]).length.powi(2);
                    minimal_energy(t, 0.5, CoherenceMode::Passage).value
                };
                let least = |least: usize, j: usize| if energy(j) < energy(least) { j } else { least };
                (0..problem.keys).reduce(least).expect("149 keys") as i32
            })
            .collect(),
    }));
}

/// Scan with one candidate, then select at alpha 1/2, by the operators in one dtype.
fn by_the_operators(dtype: DType) {
    assert_published(figures(|problem| {
        let tensor = |x: &[f64], shape: [usize; 4]| {
            Tensor::from_slice(x, &shape, &Device::Cpu).and_then(|t| t.to_dtype(dtype)).expect("a tensor")
        };
        let q = tensor(&problem.q, [FLOWERS, 1, 1, 4]);
        let k = tensor(&problem.k, [FLOWERS, 1, FLOWERS - 1, 4]);
        let beta = Tensor::new(&problem.beta[..], &Device::Cpu).expect("beta");
        let alpha = Tensor::new(&[0.5], &Device::Cpu).expect("alpha");
        let mask = Mask::none();
        let options = Scan { score: problem.score, checked: true, ..Scan::new(&beta, &mask, 1) };
        let scanned = gd_kernels::scan(&q, &k, &options).expect("a scan");
        let options = Select {
            score: problem.score,
            alpha: Some(&alpha),
            coherence: CoherenceMode::Passage,
            ..Select::new(&beta)
        };
        let chosen = select(&q, &k, &k, &scanned, &options).expect("a choice");
        let u = chosen.coherence.expect("it comes with alpha").to_dtype(DType::F64).expect("f64");
        let u: Vec<f64> = u.flatten_all().and_then(|u| u.to_vec1()).expect("one a flower");
        assert!(u.iter().all(|u| *u == 0.5), "equal weights meet half-way");
        chosen.index.flatten_all().and_then(|t| t.to_vec1::<i32>()).expect("keys")
    }));
}

#[test]
fn operators_in_f64() {
    by_the_operators(DType::F64);
}

#[test]
fn operators_in_f32() {
    by_the_operators(DType::F32);
}
