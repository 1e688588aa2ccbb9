//! A certified scan gives the bits of the native one, for every input.
//!
//! `GD_CERTIFIED_CASES=100000 cargo test --release -p gd-kernels --test suite certified` runs more problems.

use candle_core::{DType, Device, Tensor};
use gd_kernels::{
    Backend, Candidates, Int8Keys, Isa, Mask, Precision, Rescored, Scan, Score, SequenceCache, TieBreak,
    Walk, plan, scan,
};
use gd_testing::problems::{Spec, pick, pools, rng, values};
use rand::RngExt;
use rand_chacha::ChaCha8Rng;

/// The number of adversarial problems, unless `GD_CERTIFIED_CASES` sets another.
const CASES: usize = 2000;

/// Index, energy and flags to the bit.
fn bits(scanned: &Candidates) -> Vec<Vec<u64>> {
    let of = |t: &Tensor| values(t).into_iter().map(f64::to_bits).collect();
    let parts = [Some(&scanned.index), Some(&scanned.energy), scanned.protected.as_ref()];
    parts.into_iter().flatten().map(of).collect()
}

/// Compares certified scans with every instruction set, and with several thread counts, with the
/// native one; returns the share of pairs that was scored in full.
fn compare(q: &Tensor, k: &Tensor, native: &Scan, name: &(dyn Fn() -> String + Sync)) -> f64 {
    let expected = scan(q, k, native).unwrap_or_else(|e| panic!("{}: {e}", name()));
    assert_eq!(expected.rescored.share().unwrap(), 1.0);
    let expected = bits(&expected);
    let mut shares = Vec::new();
    let mut check = |options: &Scan, how: &str| {
        let scanned = scan(q, k, options).unwrap_or_else(|e| panic!("{}: {e}", name()));
        assert_eq!(expected, bits(&scanned), "{}: {how}", name());
        shares.push(scanned.rescored.share().unwrap());
    };
    let certified = Scan { precision: Precision::Certified, ..native.clone() };
    for isa in Isa::available() {
        let forced = Scan { backend: Backend::Force(isa), ..certified.clone() };
        let made = plan(q, k, &forced).unwrap().cpu().unwrap().clone();
        assert_eq!((made.isa, made.precision), (isa, Precision::Certified));
        check(&forced, &format!("{isa:?}"));
    }
    for pool in pools() {
        pool.install(|| check(&certified, &format!("{} threads", pool.current_num_threads())));
    }
    // The filter is exact arithmetic and a fixed order, so that even its survivors are the same.
    assert!(shares.iter().all(|&s| s == shares[0] && (0.0..=1.0).contains(&s)), "{}: {shares:?}", name());
    shares[0]
}

#[test]
fn generated_problems() {
    let mut cases = 0;
    for dtype in [DType::F32, DType::F16, DType::BF16] {
        for seed in 0..400 {
            let case = Spec::new(50_000 + seed, 60_000).build(dtype);
            compare(&case.q.tensor(), &case.k.tensor(), &case.scan(), &|| case.name());
            cases += 1;
        }
    }
    gd_testing::log_cases("certified", cases);
}

/// Properties of the data that make quantisation hard.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Trap {
    /// Nothing: the filter must leave out most pairs here.
    None,
    /// Some channels a thousand times as large as the others.
    OutlierChannels,
    /// Some keys a thousand times as long.
    OutlierKeys,
    /// Every key several times, and queries on top of keys.
    Duplicates,
    /// Keys that differ by less than a quantisation step.
    Close,
    /// All keys far away in one direction.
    Offset,
    /// Rows of zeros, and rows that are zero but for one element.
    Zeros,
    /// Magnitudes from 1e-40 to 1e30.
    Scales,
    /// NaN and infinities in keys and queries.
    NotFinite,
    /// Small integers, so that many scores tie exactly.
    Integers,
    /// Only negative or positive multiples of one row.
    Collinear,
}

const TRAPS: [Trap; 11] = [
    Trap::None,
    Trap::OutlierChannels,
    Trap::OutlierKeys,
    Trap::Duplicates,
    Trap::Close,
    Trap::Offset,
    Trap::Zeros,
    Trap::Scales,
    Trap::NotFinite,
    Trap::Integers,
    Trap::Collinear,
];

fn normal(rng: &mut ChaCha8Rng) -> f32 {
    // The sum of twelve uniform numbers is close enough to a normal distribution.
    (0..12).map(|_| rng.random_range(0f32..1.0)).sum::<f32>() - 6.0
}

/// Queries `[n][d]` and keys `[m][d]`.
fn numbers(rng: &mut ChaCha8Rng, trap: Trap, n: usize, m: usize, d: usize) -> [Vec<f32>; 2] {
    let mut fill = |count: usize| (0..count * d).map(|_| normal(rng)).collect::<Vec<f32>>();
    let (mut q, mut k) = (fill(n), fill(m));
    let row = |x: &[f32], i: usize| x[i * d..(i + 1) * d].to_vec();
    match trap {
        Trap::None => {}
        Trap::OutlierChannels => {
            for c in (0..d).step_by(1 + d / 2) {
                let scale = pick(rng, &[30.0, 1e3]);
                q.iter_mut().chain(&mut k).skip(c).step_by(d).for_each(|x| *x *= scale);
            }
        }
        Trap::OutlierKeys => {
            for j in (0..m).step_by(17) {
                k[j * d..(j + 1) * d].iter_mut().for_each(|x| *x *= 1e3);
            }
        }
        Trap::Duplicates => {
            for j in m / 4..m {
                let copy = row(&k, j % (m / 4).max(1));
                k[j * d..(j + 1) * d].copy_from_slice(&copy);
            }
            for i in (0..n).step_by(2) {
                let copy = row(&k, rng.random_range(0..m));
                q[i * d..(i + 1) * d].copy_from_slice(&copy);
            }
        }
        Trap::Close => {
            let base = row(&k, 0);
            let by = pick(rng, &[1e-6, 1e-4, 1e-2]);
            k.iter_mut().enumerate().for_each(|(at, x)| *x = base[at % d] + by * *x);
        }
        Trap::Offset => k.iter_mut().for_each(|x| *x += 50.0),
        Trap::Zeros => {
            for j in (0..m).filter(|j| j % 3 != 0) {
                let keep = rng.random_range(0..2 * d);
                k[j * d..(j + 1) * d]
                    .iter_mut()
                    .enumerate()
                    .for_each(|(c, x)| *x *= f32::from(u8::from(c == keep)));
            }
            q[..d].fill(0.0);
        }
        Trap::Scales => {
            for x in [&mut q, &mut k] {
                for row in x.chunks_mut(d) {
                    let scale = 10f32.powi(rng.random_range(-40..30));
                    row.iter_mut().for_each(|x| *x *= scale);
                }
            }
        }
        Trap::NotFinite => {
            for _ in 0..1 + m / 10 {
                let at = rng.random_range(0..k.len());
                k[at] = pick(rng, &[f32::NAN, f32::INFINITY, f32::NEG_INFINITY, f32::MAX]);
            }
            if rng.random_bool(0.3) {
                let at = rng.random_range(0..q.len());
                q[at] = pick(rng, &[f32::NAN, f32::INFINITY, f32::MIN]);
            }
        }
        Trap::Integers => q.iter_mut().chain(&mut k).for_each(|x| *x = x.round()),
        Trap::Collinear => {
            let base = row(&q, 0);
            for x in [&mut q, &mut k] {
                for row in x.chunks_mut(d) {
                    let by = row[0];
                    row.iter_mut().zip(&base).for_each(|(x, b)| *x = by * b);
                }
            }
        }
    }
    [q, k]
}

#[test]
fn adversarial_problems() {
    let cases = gd_testing::case_count("GD_CERTIFIED_CASES", CASES);
    let (mut filtered, mut left) = (0, 0);
    for seed in 0..cases as u64 {
        let mut rng = rng(seed ^ 0xce27);
        let trap = TRAPS[(seed % TRAPS.len() as u64) as usize];
        let (n, m) = (rng.random_range(1..90), pick(&mut rng, &[1, 5, 33, 200, 321, 600]));
        let d = pick(&mut rng, &[1, 3, 8, 16, 33, 64]);
        let [q, k] = numbers(&mut rng, trap, n, m, d);
        let dtype = pick(&mut rng, &[DType::F32, DType::F32, DType::F16, DType::BF16]);
        let tensor = |x: Vec<f32>, rows| {
            Tensor::from_vec(x, (1, 1, rows, d), &Device::Cpu).unwrap().to_dtype(dtype).unwrap()
        };
        let (q, k) = (tensor(q, n), tensor(k, m));
        let beta = Tensor::new(&[pick(&mut rng, &[1e-3f32, 0.1, 1.0])], &Device::Cpu).unwrap();
        let mask = match rng.random_range(0..3) {
            0 => Mask::none(),
            1 => Mask::causal(m as i64 - n as i64),
            _ => Mask::window(1 + m / 2, m as i64 - n as i64),
        };
        let prior: Vec<f32> = (0..m)
            .map(|_| match rng.random_range(0..12) {
                0 => f32::NEG_INFINITY,
                1 => 3e38,
                2 => -1e35,
                _ => normal(&mut rng),
            })
            .collect();
        let prior = Tensor::from_vec(prior, (1, 1, m), &Device::Cpu).unwrap();
        let native = Scan {
            prior: rng.random_bool(0.3).then_some(&prior),
            score: pick(&mut rng, &[Score::Energy, Score::Dot]),
            tie: pick(&mut rng, &[TieBreak::First, TieBreak::Last]),
            ..Scan::new(&beta, &mask, pick(&mut rng, &gd_testing::problems::CANDIDATES))
        };
        let share = compare(&q, &k, &native, &|| {
            format!("seed {seed}: {trap:?} {dtype:?} N {n} M {m} D {d} {native:?}")
        });
        if trap == Trap::None && m >= 321 && d >= 16 && native.candidates <= 4 && native.prior.is_none() {
            filtered += usize::from(share < 0.25);
        }
        left += usize::from(share == 1.0);
    }
    println!(
        "{cases} adversarial problems: {filtered} plain ones filtered well, {left} left to the native scan"
    );
    assert!(filtered * 500 >= cases && left * 50 >= cases, "{filtered} and {left} of {cases}");
    gd_testing::log_cases("certified", cases);
}

#[test]
fn a_dtype_without_a_certificate_is_refused() {
    let (q, beta, mask) =
        (Tensor::ones((1, 1, 2, 4), DType::F64, &Device::Cpu).unwrap(), [1f64], Mask::none());
    let beta = Tensor::new(&beta, &Device::Cpu).unwrap();
    let options = Scan { precision: Precision::Certified, ..Scan::new(&beta, &mask, 1) };
    let e = scan(&q, &q, &options).unwrap_err().to_string();
    assert!(e.contains("dtype f64 at certified precision"), "{e}");
}

/// q `[2, 6, 16, D]` and k `[2, 2, M, D]`.
fn decoding(seed: u64, m: usize, d: usize, dtype: DType) -> [Tensor; 2] {
    let mut rng = rng(seed);
    let mut tensor = |heads: usize, rows: usize| {
        let values: Vec<f32> = (0..2 * heads * rows * d).map(|_| normal(&mut rng)).collect();
        Tensor::from_vec(values, (2, heads, rows, d), &Device::Cpu).unwrap().to_dtype(dtype).unwrap()
    };
    [tensor(6, 16), tensor(2, m)]
}

#[test]
fn decode_scans_equal_prefill_scans() {
    for (seed, (m, d)) in [(64, 8), (200, 33), (1500, 16), (2100, 64)].into_iter().enumerate() {
        for dtype in [DType::F32, DType::BF16] {
            let [q, k] = decoding(seed as u64, m, d, dtype);
            // Keys that tie across tasks, and keys without a finite score.
            let k = Tensor::cat(&[&k.narrow(2, 0, m / 2).unwrap(), &k.narrow(2, 0, m - m / 2).unwrap()], 2)
                .unwrap();
            let mut prior = vec![0f32; 6 * m];
            prior.iter_mut().step_by(7).for_each(|b| *b = f32::NEG_INFINITY);
            let prior = Tensor::from_vec(prior, (1, 6, m), &Device::Cpu).unwrap();
            let beta = Tensor::full(0.1f32, 6, &Device::Cpu).unwrap();
            let protected =
                Tensor::new(&[3i32, m as i32 - 1], &Device::Cpu).unwrap().reshape((1, 1, 1, 2)).unwrap();
            for candidates in [1, 8, 32] {
                for (score, tie) in [(Score::Energy, TieBreak::First), (Score::Dot, TieBreak::Last)] {
                    let keys = Int8Keys::new(&k, score).unwrap();
                    let whole_mask = Mask::causal(m as i64 - 16);
                    let all = Scan {
                        prior: (candidates == 8).then_some(&prior),
                        protected: (candidates == 8).then_some(&protected),
                        score,
                        tie,
                        ..Scan::new(&beta, &whole_mask, candidates)
                    };
                    let whole = scan(&q, &k, &all).unwrap();
                    assert_eq!(plan(&q, &k, &all).unwrap().cpu().unwrap().walk, Walk::Blocks);
                    for (first, count) in [(0, 1), (5, 3), (15, 1), (8, 8)] {
                        let part = |t: &Tensor| t.narrow(2, first, count).unwrap().contiguous().unwrap();
                        let expected = Candidates {
                            index: part(&whole.index),
                            energy: part(&whole.energy),
                            protected: whole.protected.as_ref().map(part),
                            rescored: Rescored::ALL,
                        };
                        let (last_queries, mask) = (part(&q), Mask::causal((m - 16 + first) as i64));
                        for isa in Isa::available() {
                            for (precision, cached) in [
                                (Precision::Native, None),
                                (Precision::Certified, None),
                                (Precision::Certified, Some((&keys).into())),
                            ] {
                                let options = Scan {
                                    precision,
                                    cached,
                                    backend: Backend::Force(isa),
                                    mask: &mask,
                                    ..all.clone()
                                };
                                assert_eq!(
                                    plan(&last_queries, &k, &options).unwrap().cpu().unwrap().walk,
                                    Walk::Decode
                                );
                                let scanned = scan(&last_queries, &k, &options).unwrap();
                                let same = bits(&scanned) == bits(&expected);
                                assert!(same, "M {m} D {d} {dtype:?} {first}+{count} {options:?}");
                            }
                        }
                    }
                }
            }
        }
    }
}

#[test]
fn quantised_keys_are_appended_to_and_refused_for_other_scans() {
    let [q, k] = decoding(9, 150, 24, DType::F32);
    let beta = Tensor::full(0.1f32, 6, &Device::Cpu).unwrap();
    let mask = Mask::causal(134);
    let mut keys = Int8Keys::new(&k.narrow(2, 0, 40).unwrap(), Score::Energy).unwrap();
    for (first, count) in [(40, 1), (41, 64), (105, 45)] {
        keys.append(&k.narrow(2, first, count).unwrap()).unwrap();
    }
    assert_eq!((keys.len(), keys.is_empty()), (150, false));
    let native = Scan::new(&beta, &mask, 4);
    let certified = Scan { precision: Precision::Certified, cached: Some((&keys).into()), ..native.clone() };
    let (scanned, alone) = (scan(&q, &k, &certified).unwrap(), Scan { cached: None, ..certified.clone() });
    assert_eq!(bits(&scanned), bits(&scan(&q, &k, &native).unwrap()));
    let share = |scanned: &Candidates| scanned.rescored.share().unwrap();
    assert_eq!(share(&scanned), share(&scan(&q, &k, &alone).unwrap()));
    let refused = |e: gd_kernels::Result<()>, word: &str| {
        let text = e.unwrap_err().to_string();
        assert!(text.contains(word), "{text}");
    };
    let short = k.narrow(2, 0, 149).unwrap();
    refused(scan(&q, &short, &certified).map(drop), "[2, 2, 150, 24] of F32");
    let dot = Scan { score: Score::Dot, ..certified.clone() };
    refused(scan(&q, &k, &dot).map(drop), "Dot score");
    refused(keys.append(&k.narrow(3, 0, 8).unwrap()), "head_dim 24");
    refused(Int8Keys::new(&k.to_dtype(DType::F64).unwrap(), Score::Dot).map(drop), "F64");
}
