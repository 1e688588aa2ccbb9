//! `scan`, `scan_all` and `scan_select` against the naive f64 reference on generated problems.
//!
//! A key that the reference ranks otherwise must lie within the error bound of the score
//! ([`gd_testing::problems::Case::rank_bound`]); energies are held against a naive version in the same dtype.

use candle_core::{DType, Device, Tensor};
use gd_kernels::reference::{Problem, scan as reference_scan};
use gd_kernels::{
    Backend, Candidates, Isa, Mask, Scan, Score, Select, Selected, TieBreak, plan, scan, scan_all,
    scan_select, select,
};
use gd_testing::problems::{Case, Kind, Spec, acc, pools, rng, roundoff, uniform, values};

/// Problems per dtype.
const PROBLEMS: u64 = 1024;
/// Maximum number of products B Hq N M D of a problem.
const LIMIT: usize = 200_000;

/// Counts of the suite.
#[derive(Default)]
struct Tally {
    rows: usize,
    empty: usize,
    /// Rows of data without ties on purpose, and those of them whose list differs from the
    /// reference's within the bounds.
    free_rows: usize,
    reordered: usize,
    /// Sums of energy errors, in roundoffs of the terms, here and in the naive version.
    error: f64,
    naive_error: f64,
}

/// `beta |q - k|^2 - b` or `-beta <q, k> - b`, in the dtype's accumulator, written naively.
fn naive_energy(case: &Case, (b, h, i): (usize, usize, usize), j: usize) -> f64 {
    let p = &case.problem;
    let (q, k) = (&p.q[p.q_at(b, h, i)], &p.k[p.k_at(b, h, j)]);
    macro_rules! energy {
        ($t:ty) => {{
            let mut sum: $t = 0.0;
            for (q, k) in q.iter().zip(k) {
                let (q, k) = (*q as $t, *k as $t);
                sum += match p.score {
                    Score::Energy => (q - k) * (q - k),
                    Score::Dot => -q * k,
                };
            }
            f64::from(p.beta[h] as $t * sum - p.prior_of(b, h, j) as $t)
        }};
    }
    if case.dtype == DType::F64 { energy!(f64) } else { energy!(f32) }
}

/// Checks the candidates of a problem, of which `keep` are not protected.
fn judge(case: &Case, scanned: &Candidates, keep: usize, tally: &mut Tally) {
    let (p, name) = (&case.problem, case.name());
    let all = reference_scan(p, p.keys);
    let slots = scanned.index.dims()[3];
    let extra = case.spec.protected.as_ref().map_or(0, |(_, dims)| dims[3]);
    assert_eq!(scanned.index.dims(), [p.batch, p.q_heads, p.queries, keep + extra], "{name}");
    assert_eq!(scanned.energy.dims(), scanned.index.dims(), "{name}");
    assert_eq!((scanned.index.dtype(), scanned.energy.dtype()), (DType::I32, acc(case.dtype)));
    let index: Vec<i32> = scanned.index.flatten_all().unwrap().to_vec1().unwrap();
    let energy = values(&scanned.energy);
    let flags = scanned.protected.as_ref().map_or(vec![0.0; index.len()], values);
    assert_eq!(scanned.protected.is_some(), extra > 0, "{name}");
    let (mut worst, mut naive_worst, mut largest) = (0f64, 0f64, 0f64);
    for (row, (b, h, i)) in p.rows() {
        let name = || format!("{name}, row {b} {h} {i}");
        let listed = all.index[row * all.width..][..all.width].iter().take_while(|j| **j >= 0).count();
        let row_slots = row * all.width..row * all.width + listed;
        let (rank, expected) = (&all.index[row_slots.clone()], &all.energy[row_slots.clone()]);
        let guarded = &all.protected[row_slots];
        let wanted: Vec<i32> = (0..listed).filter(|&r| r < keep || guarded[r]).map(|r| rank[r]).collect();
        let mut at = vec![None; p.keys];
        rank.iter().enumerate().for_each(|(r, &j)| at[j as usize] = Some(r));

        let list = row * slots..(row + 1) * slots;
        let count = index[list.clone()].iter().take_while(|j| **j >= 0).count();
        let (index, energy, flags) = (&index[list.clone()], &energy[list.clone()], &flags[list]);
        for slot in count..slots {
            assert_eq!((index[slot], energy[slot], flags[slot]), (-1, f64::INFINITY, 0.0), "{}", name());
        }
        let ranks: Vec<usize> = index[..count]
            .iter()
            .map(|&j| at[j as usize].unwrap_or_else(|| panic!("{}: key {j} is no candidate", name())))
            .collect();
        let query = &p.q[p.q_at(b, h, i)];
        let bound = |r: usize| case.rank_bound(query, (b, h), rank[r] as usize);
        tally.rows += 1;
        tally.empty += usize::from(listed == 0);
        let ties = matches!(case.spec.kind, Kind::Integer | Kind::Duplicates);
        tally.free_rows += usize::from(!ties);
        if index[..count] != wanted {
            assert!(!case.exact(), "{}: {:?} instead of {wanted:?}", name(), &index[..count]);
            tally.reordered += usize::from(!ties);
        }

        // Sorted by (energy, index), each key once, each energy right.
        for slot in 0..count {
            let (j, r) = (index[slot] as usize, ranks[slot]);
            assert_eq!(flags[slot] == 1.0, guarded[r], "{}: flag of key {j}", name());
            if slot > 0 {
                let (e, before) = (energy[slot], energy[slot - 1]);
                let in_order = (index[slot - 1] < index[slot]) == (p.tie == TieBreak::First);
                assert!(before < e || before == e && in_order, "{}: order {index:?} {energy:?}", name());
                assert!(!index[..slot].contains(&index[slot]), "{}: key {j} twice", name());
            }
            let error = (energy[slot] - expected[r]).abs();
            let limit = case.energy_bound(query, (b, h), j);
            assert!(error <= limit, "{}: energy of {j} is {}, not {}", name(), energy[slot], expected[r]);
            let naive_error = (naive_energy(case, (b, h, i), j) - expected[r]).abs();
            let unit = roundoff(acc(case.dtype)) * case.energy_size(query, (b, h), j);
            if unit > 0.0 {
                tally.error += error / unit;
                tally.naive_error += naive_error / unit;
            }
            (worst, naive_worst) = (worst.max(error), naive_worst.max(naive_error));
            largest = largest.max(expected[r].abs());
        }

        // As many as there are, the protected ones among them.
        let free = (0..count).filter(|&slot| flags[slot] == 0.0).count();
        assert!(free <= keep && count >= keep.min(listed), "{}: {count} of {listed}", name());
        for r in (0..listed).filter(|&r| guarded[r]) {
            assert!(ranks.contains(&r), "{}: protected key {} is missing", name(), rank[r]);
        }
        // No key that is left out is better beyond the bounds, or the same and earlier.
        for &r in ranks.iter().filter(|&&r| !guarded[r]) {
            for left in (0..listed).filter(|left| !ranks.contains(left)) {
                let lead = expected[r] - expected[left];
                let (j, other) = (rank[r] as usize, rank[left] as usize);
                assert!(
                    lead <= bound(r) + bound(left),
                    "{}: {j} is a candidate and {other} is not, whose energy is lower by {lead}",
                    name()
                );
                if lead == 0.0 && case.same_key(b, h, j, other) {
                    assert!((j < other) == (p.tie == TieBreak::First), "{}: {j} before {other}", name());
                }
            }
        }
        // Rank for rank: another key than the reference's lies within the bounds of it.
        if extra == 0 {
            for (slot, (&r, place)) in ranks.iter().zip(0..).enumerate().filter(|(_, (r, p))| *r != p) {
                let reach = ranks[..=slot].iter().copied().chain(0..=slot).map(bound).fold(0.0, f64::max);
                let off = (expected[r] - expected[place]).abs();
                assert!(off <= bound(r) + reach, "{}: rank {slot} is off by {off}", name());
            }
        }
    }
    let ulp = 2.0 * roundoff(acc(case.dtype)) * largest;
    // In f64 the naive version is the reference itself, so only the bound above says anything.
    let held = case.dtype == DType::F64 || worst <= 2.0 * naive_worst + ulp;
    assert!(held, "{name}: energies off by {worst}, naively {naive_worst}");
}

/// Index, energy and flags to the bit.
fn bits(scanned: &Candidates) -> Vec<Vec<u64>> {
    let of = |t: &Tensor| values(t).into_iter().map(f64::to_bits).collect();
    let parts = [Some(&scanned.index), Some(&scanned.energy), scanned.protected.as_ref()];
    parts.into_iter().flatten().map(of).collect()
}

/// The suite in one dtype.
fn suite(dtype: DType) {
    let mut tally = Tally::default();
    for seed in 0..PROBLEMS {
        let case = Spec::new(seed, LIMIT).build(dtype);
        let (q, k, p) = (case.q.tensor(), case.k.tensor(), &case.problem);
        let options = case.scan();
        let scanned = scan(&q, &k, &options).unwrap_or_else(|e| panic!("{}: {e}", case.name()));
        judge(&case, &scanned, case.spec.candidates, &mut tally);
        let first = bits(&scanned);
        for isa in Isa::available() {
            let forced = Scan { backend: Backend::Force(isa), ..options.clone() };
            assert_eq!(plan(&q, &k, &forced).unwrap().cpu().unwrap().isa, isa);
            assert_eq!(first, bits(&scan(&q, &k, &forced).unwrap()), "{}: {isa:?}", case.name());
        }
        for pool in pools() {
            let again = pool.install(|| scan(&q, &k, &options).unwrap());
            let threads = pool.current_num_threads();
            assert_eq!(first, bits(&again), "{}: {threads} threads", case.name());
        }
        if seed.is_multiple_of(4) {
            judge(&case, &scan_all(&q, &k, &options).unwrap(), p.keys, &mut Tally::default());
        }
    }
    let Tally { rows, empty, free_rows, reordered, error, naive_error } = tally;
    println!(
        "{dtype:?}: {rows} rows, {empty} without a key; {reordered} of {free_rows} differ within the bounds; \
         mean energy error {:.3} of the naive one",
        error / naive_error
    );
    assert!(empty > rows / 100 && empty < rows * 3 / 10, "{empty} of {rows} rows have no key");
    assert!(reordered * 100 <= free_rows, "{reordered} of {free_rows} rows");
    let held = dtype == DType::F64 || error <= 1.5 * naive_error;
    assert!(held, "mean error {error}, naively {naive_error}");
    gd_testing::log_cases("scan", PROBLEMS as usize);
}

#[test]
fn generated_problems_f32() {
    suite(DType::F32);
}

#[test]
fn generated_problems_f16() {
    suite(DType::F16);
}

#[test]
fn generated_problems_bf16() {
    suite(DType::BF16);
}

#[test]
fn generated_problems_f64() {
    suite(DType::F64);
}

#[test]
fn the_suite_covers_what_it_claims() {
    let specs: Vec<Spec> = (0..PROBLEMS).map(|seed| Spec::new(seed, LIMIT)).collect();
    let at_least = |what: &str, least: usize, test: &dyn Fn(&Spec) -> bool| {
        let n = specs.iter().filter(|s| test(s)).count();
        assert!(n >= least, "{what}: {n} problems");
    };
    for d in gd_testing::problems::DIMS {
        at_least(&format!("D {d}"), 50, &|s| s.raw.dim == d);
    }
    for k in gd_testing::problems::CANDIDATES {
        at_least(&format!("K {k}"), 50, &|s| s.candidates == k);
    }
    for group in [1, 2, 3, 8] {
        at_least(&format!("group {group}"), 50, &|s| s.raw.q_heads == group * s.raw.kv_heads);
    }
    for batch in [1, 2, 3] {
        at_least(&format!("B {batch}"), 50, &|s| s.raw.batch == batch);
    }
    for kind in [Kind::Plain, Kind::Near, Kind::Duplicates, Kind::Integer, Kind::Huge, Kind::Tiny] {
        at_least(&format!("{kind:?}"), 50, &|s| s.kind == kind);
    }
    for tie in [TieBreak::First, TieBreak::Last] {
        let tied = |s: &Spec| matches!(s.kind, Kind::Duplicates | Kind::Integer) && s.raw.tie == tie;
        at_least(&format!("ties {tie:?}"), 50, &tied);
    }
    at_least("dot", 100, &|s| s.raw.score == Score::Dot);
    at_least("one key", 20, &|s| s.raw.keys == 1);
    at_least("K > M", 100, &|s| s.candidates > s.raw.keys);
    at_least("several blocks of rows", 50, &|s| s.raw.queries > 64);
    at_least("several wide panels", 50, &|s| s.raw.keys > 64);
    at_least("prior per batch and head", 20, &|s| {
        s.prior.as_ref().is_some_and(|p| p.1[0] == s.raw.batch && p.1[1] == s.raw.q_heads && p.1[1] > 1)
    });
    at_least("shared prior", 15, &|s| {
        s.prior.as_ref().is_some_and(|p| s.raw.batch > p.1[0] && s.raw.q_heads > p.1[1])
    });
    at_least("banned keys", 50, &|s| s.prior.as_ref().is_some_and(|p| p.0.contains(&f64::NEG_INFINITY)));
    at_least("protected keys", 100, &|s| s.protected.is_some());
    let mask = |s: &Spec| s.raw.mask.clone();
    at_least("causal", 100, &|s| mask(s).is_causal() && mask(s).window_len().is_none());
    at_least("negative offset", 50, &|s| mask(s).offset(0) < 0);
    at_least("positive offset", 50, &|s| mask(s).offset(0) > 0);
    at_least("offsets per batch", 20, &|s| {
        mask(s).is_causal() && s.raw.batch > 1 && mask(s).offset(0) != mask(s).offset(1)
    });
    at_least("window", 50, &|s| mask(s).window_len().is_some());
    at_least("key lengths", 50, &|s| mask(s).lengths().is_some());
    at_least("packed", 50, &|s| mask(s).boundaries().is_some_and(|b| b.len() == 1));
    at_least("packed per batch", 20, &|s| mask(s).boundaries().is_some_and(|b| b.len() > 1));
    at_least("all conditions", 10, &|s| {
        mask(s).window_len().is_some() && mask(s).boundaries().is_some() && mask(s).lengths().is_some()
    });
    for view in [
        gd_testing::problems::View::Heads,
        gd_testing::problems::View::Part,
        gd_testing::problems::View::Turned,
    ] {
        at_least(&format!("{view:?}"), 50, &|s| s.views[0] == view);
        at_least(&format!("{view:?} keys"), 50, &|s| s.views[1] == view);
    }
}

/// q `[1, 1, 1, 1]` at 0 and k `[1, 1, M, 1]`, f32.
fn line(keys: &[f32]) -> (Tensor, Tensor, Tensor) {
    let q = Tensor::zeros((1, 1, 1, 1), DType::F32, &Device::Cpu).unwrap();
    let k = Tensor::from_slice(keys, (1, 1, keys.len(), 1), &Device::Cpu).unwrap();
    (q, k, Tensor::ones(1, DType::F32, &Device::Cpu).unwrap())
}

#[test]
fn equal_energies_go_to_the_first_or_to_the_last() {
    // 70 keys: the ties lie in different panels.
    let mut keys = [3.0f32; 70];
    [7, 33, 69].iter().for_each(|&j| keys[j] = 1.0);
    let (q, k, beta) = line(&keys);
    let mask = Mask::none();
    for (tie, expected) in [(TieBreak::First, [7, 33, 69, 0]), (TieBreak::Last, [69, 33, 7, 68])] {
        for isa in Isa::available() {
            let options = Scan { tie, backend: Backend::Force(isa), ..Scan::new(&beta, &mask, 4) };
            let scanned = scan(&q, &k, &options).unwrap();
            assert_eq!(values(&scanned.index), expected.map(f64::from), "{tie:?} {isa:?}");
            assert_eq!(values(&scanned.energy), [1.0, 1.0, 1.0, 9.0]);
        }
    }
}

#[test]
fn checked_mode_names_what_is_not_finite_and_ignores_what_is_not_read() {
    let (b, hq, hk, n, m, d) = (2, 2, 1, 3, 6, 4);
    let mut rng = rng(5);
    let (q, k) = (uniform(&mut rng, b * hq * n * d), uniform(&mut rng, b * hk * m * d));
    let beta = Tensor::ones(hq, DType::F32, &Device::Cpu).unwrap();
    // Batch entry 0 has 4 keys, entry 1 has 6; causal, so that key 5 is out of sight in both.
    let mask = Mask::causal(2).kv_len(vec![4, 6]);
    let run = |q: &[f64], k: &[f64], checked: bool| {
        let tensor = |x: &[f64], dims| {
            Tensor::from_slice(x, dims, &Device::Cpu).unwrap().to_dtype(DType::F32).unwrap()
        };
        let (q, k) = (tensor(q, (b, hq, n, d)), tensor(k, (b, hk, m, d)));
        scan(&q, &k, &Scan { checked, ..Scan::new(&beta, &mask, 2) })
    };
    let with = |x: &[f64], at: usize, y: f64| {
        let mut x = x.to_vec();
        x[at] = y;
        x
    };
    let message = |r: gd_kernels::Result<Candidates>| r.unwrap_err().to_string();
    let q_at = ((hq + 1) * n + 2) * d + 3;
    assert_eq!(message(run(&with(&q, q_at, f64::NAN), &k, true)), "q[1, 1, 2, 3] is NaN, not finite");
    let k_at = |b: usize, j: usize, x: usize| (b * m + j) * d + x;
    let bad = with(&k, k_at(1, 4, 1), f64::NEG_INFINITY);
    assert_eq!(message(run(&q, &bad, true)), "k[1, 0, 4, 1] is -inf, not finite");
    assert_eq!(
        message(run(&q, &with(&k, k_at(0, 0, 0), f64::NAN), true)),
        "k[0, 0, 0, 0] is NaN, not finite"
    );
    for (b, j) in [(0, 4), (0, 5), (1, 5)] {
        let scanned = run(&q, &with(&k, k_at(b, j, 2), f64::NAN), true).unwrap();
        assert_eq!(bits(&scanned), bits(&run(&q, &k, true).unwrap()), "key {j} of entry {b} is not read");
    }
    // Unchecked, a key without a finite energy is no candidate, and such a query has none.
    let scanned = run(&q, &bad, false).unwrap();
    assert!(
        scanned
            .index
            .get(1)
            .unwrap()
            .flatten_all()
            .unwrap()
            .to_vec1::<i32>()
            .unwrap()
            .iter()
            .all(|j| *j != 4)
    );
    let scanned = run(&with(&q, q_at, f64::NAN), &k, false).unwrap();
    let row = scanned.index.get(1).unwrap().get(1).unwrap().get(2).unwrap();
    assert_eq!(row.to_vec1::<i32>().unwrap(), [-1, -1]);
}

#[test]
fn no_finite_energy_abstains_even_when_protected() {
    let (q, k, beta) = line(&[f32::NAN, f32::INFINITY, 2.0]);
    let mask = Mask::none();
    let protected = Tensor::new(&[0i32, 1, 2], &Device::Cpu).unwrap().reshape((1, 1, 1, 3)).unwrap();
    let options = Scan { protected: Some(&protected), ..Scan::new(&beta, &mask, 2) };
    let scanned = scan(&q, &k, &options).unwrap();
    assert_eq!(values(&scanned.index), [2.0, -1.0, -1.0, -1.0, -1.0]);
    assert_eq!(values(&scanned.protected.unwrap()), [1.0, 0.0, 0.0, 0.0, 0.0]);
}

fn record(s: &Selected) -> Vec<Vec<u64>> {
    let of = |t: &Tensor| values(t).into_iter().map(f64::to_bits).collect();
    [&s.y, &s.index, &s.energy, &s.margin, &s.gate].map(of).to_vec()
}

#[test]
fn scan_select_is_select_over_one_candidate() {
    let mut abstained = 0;
    for seed in 0..200 {
        for dtype in [DType::F32, DType::F16, DType::BF16, DType::F64] {
            let mut case = Spec::new(9000 + seed, 40_000).build(dtype);
            let (q, k) = (case.q.tensor(), case.k.tensor());
            let one = Scan { candidates: 1, protected: None, ..case.scan() };
            let scanned = scan(&q, &k, &one).unwrap();
            // Every value row that no query takes is NaN.
            case.poison_unread_values(&scanned);
            let (v, one) = (case.v.tensor(), Scan { candidates: 1, protected: None, ..case.scan() });
            let energies = values(&scanned.energy);
            let tau: Vec<f64> = (0..case.problem.q_heads)
                .map(|h| {
                    let e = energies[h * case.problem.queries];
                    if e.is_finite() { e } else { 1.0 }
                })
                .collect();
            let (tau, _) = gd_testing::problems::rounded(&tau, &[tau.len()], acc(dtype));
            for threshold in [None, Some(&tau)] {
                let fused = scan_select(&q, &k, &v, &case.scan(), threshold).unwrap();
                let options = Select {
                    prior: one.prior,
                    score: one.score,
                    tie: one.tie,
                    threshold,
                    ..Select::new(&case.beta)
                };
                let apart = select(&q, &k, &v, &scanned, &options).unwrap();
                assert_eq!(record(&fused), record(&apart), "{}", case.name());
                let (y, index) = (values(&fused.y), values(&fused.index));
                assert!(y.iter().all(|x| x.is_finite()), "{}: an unselected value row was read", case.name());
                let p = &case.problem;
                for (row, (b, h, _)) in p.rows() {
                    let y = &y[row * p.value_dim..][..p.value_dim];
                    match index[row] {
                        -1.0 => assert!(y.iter().all(|x| *x == 0.0)),
                        j => assert_eq!(y, &p.v[p.v_at(b, h, j as usize)], "{}", case.name()),
                    }
                }
                abstained += index.iter().filter(|j| **j < 0.0).count();
            }
        }
    }
    assert!(abstained > 0);
}

#[test]
fn a_batch_entry_does_not_depend_on_the_others() {
    for seed in 0..60 {
        let case = Spec::new(7000 + seed, LIMIT).build(DType::F32);
        let (q, k, p) = (case.q.tensor(), case.k.tensor(), &case.problem);
        let plain = Problem { mask: Mask::causal(1), ..p.clone() };
        let options = Scan { tie: p.tie, score: p.score, ..Scan::new(&case.beta, &plain.mask, 8) };
        let whole = scan(&q, &k, &options).unwrap();
        for b in 0..p.batch {
            let part = |t: &Tensor| t.narrow(0, b, 1).unwrap();
            let alone = scan(&part(&q), &part(&k), &options).unwrap();
            assert_eq!(values(&part(&whole.index)), values(&alone.index));
            assert_eq!(values(&part(&whole.energy)), values(&alone.energy));
        }
    }
}
