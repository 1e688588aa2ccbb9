//! Queries and keys with a large common offset, and energies that overflow: the candidates are those of the f64 reference.

use candle_core::{DType, Device, Tensor};
use gd_kernels::{
    Backend, Candidates, Int8Keys, Isa, KeyCache, Mask, PagedCache, Precision, Scan, Score, Select,
    SequenceCache, TieBreak, decode, decode_paged, scan, scan_select, select,
};
use gd_testing::problems::offsets::OFFSETS;
use gd_testing::problems::{Case, Spec, pools, rng, values};
use rand::RngExt;

/// Problems per dtype.
const PROBLEMS: u64 = 200;
/// Maximum number of products B Hq N M D of a problem.
const LIMIT: usize = 200_000;
/// How many times the bound of differences the candidates of other rows may be off: the rounding errors of the scores of
/// rows that are not ill-conditioned.
const SCORE_SLACK: f64 = 300.0;

/// The problem of a seed, and how many times the bound of differences its candidates may be off.
fn problem(seed: u64, dtype: DType) -> (Case, f64) {
    let (mut spec, by_differences) = Spec::new(300_000 + seed, LIMIT).with_offset_of(seed);
    spec.protected = None;
    let slack = match (by_differences, dtype) {
        (false, _) => SCORE_SLACK,
        // Many keys are then equal but for a prior, which f32 cannot hold beside a large energy.
        (true, DType::BF16) => 1.0,
        // The CPU computes differences in f64, as the reference does.
        (true, _) => 1e-6,
    };
    (spec.build(dtype), slack)
}

fn index(candidates: &Candidates) -> Vec<i32> {
    candidates.index.flatten_all().unwrap().to_vec1().unwrap()
}

/// Index and energy to the bit.
fn bits(index: &Tensor, energy: &Tensor) -> Vec<u64> {
    values(index).into_iter().chain(values(energy)).map(f64::to_bits).collect()
}

fn suite(dtype: DType) {
    for seed in 0..PROBLEMS {
        let (case, slack) = problem(seed, dtype);
        let (q, k, slots) = (case.q.tensor(), case.k.tensor(), case.spec.candidates);
        let options = case.scan();
        let scanned = scan(&q, &k, &options).unwrap_or_else(|e| panic!("{}: {e}", case.name()));
        let checked = case.check_by_differences(&index(&scanned), &values(&scanned.energy), slots, slack);
        checked.unwrap_or_else(|e| panic!("seed {seed}: {e}"));
        let want = bits(&scanned.index, &scanned.energy);
        let same = |options: &Scan, what: &str| {
            let got = scan(&q, &k, options).unwrap();
            assert_eq!(bits(&got.index, &got.energy), want, "{what}: {}", case.name());
        };
        for isa in Isa::available() {
            same(&Scan { backend: Backend::Force(isa), ..options.clone() }, &format!("{isa:?}"));
        }
        if dtype != DType::F64 {
            same(&Scan { precision: Precision::Certified, ..options.clone() }, "certified");
        }
        let pool = &pools()[seed as usize % 3];
        pool.install(|| same(&options, "threads"));
    }
    gd_testing::log_cases("ill-conditioned", PROBLEMS as usize);
}

#[test]
fn offsets_do_not_change_the_candidates_f32() {
    suite(DType::F32);
}

#[test]
fn offsets_do_not_change_the_candidates_f16() {
    suite(DType::F16);
}

#[test]
fn offsets_do_not_change_the_candidates_bf16() {
    suite(DType::BF16);
}

#[test]
fn offsets_do_not_change_the_candidates_f64() {
    suite(DType::F64);
}

/// `[B, H, N, D]` of normal numbers with a standard deviation of `scale`, plus an offset.
fn normal(seed: u64, dims: [usize; 4], scale: f64, offset: f64) -> Tensor {
    let mut rng = rng(seed);
    let count = dims.iter().product::<usize>();
    // The sum of 12 uniform numbers has a variance of 12 / 12.
    let values = (0..count).map(|_| {
        let sum: f64 = (0..12).map(|_| rng.random_range(-0.5..0.5)).sum();
        offset + scale * sum
    });
    Tensor::from_vec(values.collect::<Vec<f64>>(), &dims, &Device::Cpu).unwrap().to_dtype(DType::F32).unwrap()
}

#[test]
fn a_decoding_step_selects_the_keys_of_the_prefill() {
    const PAGE: usize = 64;
    let (hq, hk, keys, d) = (4, 2, 3 * PAGE, 32);
    let beta = Tensor::full(0.1f32, hq, &Device::Cpu).unwrap();
    for (seed, offset) in OFFSETS.into_iter().enumerate() {
        let tensor = |s: u64, h, n| normal(10 * seed as u64 + s, [1, h, n, d], 1.0, offset);
        let (q, k, v) = (tensor(0, hq, keys), tensor(1, hk, keys), tensor(2, hk, keys));
        for score in [Score::Energy, Score::Dot] {
            let causal = Mask::causal(0);
            let all = Scan { score, ..Scan::new(&beta, &causal, 1) };
            let prefill = scan_select(&q, &k, &v, &all, None).unwrap();
            // The caches grow by the keys of each step; the pages lie in reverse order.
            let first = PAGE + 7;
            let mut int8 = Int8Keys::new(&k.narrow(2, 0, first).unwrap(), score).unwrap();
            let pages = |x: &Tensor| {
                let page = |p: usize| x.narrow(2, (2 - p) * PAGE, PAGE).unwrap();
                Tensor::cat(&[page(0), page(1), page(2)], 0).unwrap().contiguous().unwrap()
            };
            let (paged_k, paged_v) = (pages(&k), pages(&v));
            let paged_int8 = KeyCache::new(&paged_k, score, Precision::Certified).unwrap();
            let table = Tensor::new(&[[2u32, 1, 0]], &Device::Cpu).unwrap();
            for length in [first, first + 1, keys] {
                let more = length - int8.len();
                if more > 0 {
                    int8.append(&k.narrow(2, int8.len(), more).unwrap()).unwrap();
                }
                let row = |t: &Tensor| t.narrow(2, length - 1, 1).unwrap();
                let part = |t: &Tensor| t.narrow(2, 0, length).unwrap();
                let (none, visible) = (Mask::none(), Mask::none().kv_len(vec![length]));
                let one = Scan { mask: &none, ..all.clone() };
                let want = bits(&row(&prefill.index), &row(&prefill.energy));
                let name = format!("{score:?}, offset {offset}, {length} keys");
                let native = decode(&row(&q), &part(&k), &part(&v), &one, None).unwrap();
                assert_eq!(bits(&native.index, &native.energy), want, "{name}");
                let cached = one.clone().with_cached(&int8);
                let cached = decode(&row(&q), &part(&k), &part(&v), &cached, None).unwrap();
                assert_eq!(bits(&cached.index, &cached.energy), want, "8-bit keys, {name}");
                let cache = PagedCache { k: &paged_k, v: &paged_v, table: &table };
                let one = Scan { mask: &visible, ..one.clone() };
                for one in [one.clone(), one.with_cached(&paged_int8)] {
                    let paged = decode_paged(&row(&q), &cache, &one, None).unwrap();
                    assert_eq!(bits(&paged.index, &paged.energy), want, "pages, {name}");
                }
            }
        }
    }
}

#[test]
fn equal_keys_go_to_the_first_or_to_the_last() {
    let (keys, d) = (70, 8);
    let mut k = values(&normal(1, [1, 1, keys, d], 1.0, 1e4));
    for j in [33, 69] {
        k.copy_within(7 * d..8 * d, j * d);
    }
    let k = Tensor::from_vec(k, (1, 1, keys, d), &Device::Cpu).unwrap().to_dtype(DType::F32).unwrap();
    let (q, mask) = (k.narrow(2, 7, 1).unwrap(), Mask::none());
    let beta = Tensor::ones(1, DType::F32, &Device::Cpu).unwrap();
    for (tie, expected) in [(TieBreak::First, [7.0, 33.0]), (TieBreak::Last, [69.0, 33.0])] {
        let scanned = scan(&q, &k, &Scan { tie, ..Scan::new(&beta, &mask, 2) }).unwrap();
        assert_eq!(values(&scanned.index), expected, "{tie:?}");
        assert_eq!(values(&scanned.energy), [0.0, 0.0]);
    }
}

/// The least energy of every row in f64 and its key.
fn least(q: &Tensor, k: &Tensor, score: Score) -> Vec<(f64, usize)> {
    let (d, q, k) = (q.dims()[3], values(q), values(k));
    let energy = |q: &[f64], k: &[f64]| -> f64 {
        let terms = q.iter().zip(k);
        match score {
            Score::Energy => terms.map(|(q, k)| (q - k) * (q - k)).sum(),
            Score::Dot => terms.map(|(q, k)| -q * k).sum(),
        }
    };
    let row = |q: &[f64]| {
        let all = k.chunks(d).enumerate().map(|(j, k)| (energy(q, k), j));
        all.min_by(|x, y| x.0.total_cmp(&y.0)).unwrap()
    };
    q.chunks(d).map(row).collect()
}

#[test]
fn overflowed_energies_are_counted_or_refused_and_their_keys_are_right() {
    let (queries, keys, d) = (20, 100, 16);
    let (beta, mask) = (Tensor::ones(1, DType::F32, &Device::Cpu).unwrap(), Mask::none());
    let mut cases = 0;
    for scale in [1e15, 1e18, 5e18, 1e19, 1e25, 1e37] {
        for (score, precision, candidates) in [
            (Score::Energy, Precision::Native, 1),
            (Score::Energy, Precision::Certified, 4),
            (Score::Dot, Precision::Native, 1),
            (Score::Dot, Precision::Certified, 4),
        ] {
            let (q, k) = (normal(3, [1, 1, queries, d], scale, 0.0), normal(4, [1, 1, keys, d], scale, 0.0));
            let options = Scan { score, precision, ..Scan::new(&beta, &mask, candidates) };
            let scanned = scan(&q, &k, &options).unwrap();
            let name = format!("{score:?} {precision:?} at {scale:e}");
            let (got, energy) = (index(&scanned), values(&scanned.energy));
            assert!(got.iter().all(|j| *j >= 0), "{name}: {got:?}");
            let greatest = f64::from(f32::MAX);
            let how = Select { score, ..Select::new(&beta) };
            let selected = values(&select(&q, &k, &k, &scanned, &how).unwrap().index);
            for (row, (e, j)) in least(&q, &k, score).into_iter().enumerate() {
                let first = &got[row * candidates..(row + 1) * candidates];
                assert_eq!(first[0], j as i32, "{name}, row {row}: {first:?}");
                assert_eq!(selected[row], j as f64, "{name}, row {row}");
                let want = if e.abs() > greatest { greatest.copysign(e) } else { e };
                let off = (energy[row * candidates] - want).abs();
                assert!(off <= 1e-5 * want.abs(), "{name}: {} instead of {want}", energy[row * candidates]);
            }
            let overflowed = energy.iter().filter(|e| e.abs() == greatest).count();
            assert_eq!(scanned.overflowed().unwrap(), overflowed, "{name}");
            assert_eq!(overflowed > 0, scale > 4e18, "{name}");
            let checked = scan(&q, &k, &options.checked());
            match overflowed {
                0 => assert!(checked.is_ok(), "{name}"),
                _ => {
                    let e = checked.unwrap_err().to_string();
                    assert!(e.contains("the energy of query q[0, 0, ") && e.contains("overflows f32"), "{e}");
                }
            }
            cases += 1;
        }
    }
    gd_testing::log_cases("ill-conditioned", cases);
}

#[test]
fn checked_mode_refuses_dot_products_that_overflow_for_some_keys_alone() {
    // The greatest product exceeds f32, so that a scan does not find its key; the others fit.
    let (q, mut k) = (vec![1e15f32; 2 * 8], vec![1e10f32; 5 * 8]);
    k[3 * 8..4 * 8].fill(1e25);
    let mut tensors = |far: f32| {
        k[3 * 8 + 5] = far;
        let q = Tensor::from_vec(q.clone(), (1, 2, 1, 8), &Device::Cpu).unwrap();
        (q, Tensor::from_vec(k.clone(), (1, 1, 5, 8), &Device::Cpu).unwrap())
    };
    let (beta, mask) = (Tensor::ones(2, DType::F32, &Device::Cpu).unwrap(), Mask::none());
    for precision in [Precision::Native, Precision::Certified] {
        let dot = Scan { score: Score::Dot, precision, ..Scan::new(&beta, &mask, 1) };
        let (q, k) = tensors(2e25);
        let e = scan(&q, &k, &dot.clone().checked()).unwrap_err().to_string();
        assert!(e.contains("q[0, 0, 0]") && e.contains("1.0e15"), "{e}");
        assert!(e.contains("k[0, 0, 3]") && e.contains("2.0e25"), "{e}");
        // A key that no query sees is not checked.
        let first = Mask::causal(2);
        assert!(scan(&q, &k, &Scan { mask: &first, ..dot.clone() }.checked()).is_ok());
        // A longer query is ranked in f64, and its energy fits if beta makes it so.
        let q = (q * 1e5).unwrap();
        let small = Tensor::full(1e-10f32, 2, &Device::Cpu).unwrap();
        let scanned = scan(&q, &k, &Scan { beta: &small, ..dot }.checked()).unwrap();
        assert_eq!(index(&scanned), [3, 3]);
    }
}

#[test]
fn an_energy_that_fits_is_right_where_its_squares_overflow() {
    let (q, k) = (normal(5, [1, 1, 3, 8], 1e20, 0.0), normal(6, [1, 1, 9, 8], 1e20, 0.0));
    let (beta, mask) = (Tensor::new(&[1e-38f32], &Device::Cpu).unwrap(), Mask::none());
    let scanned = scan(&q, &k, &Scan::new(&beta, &mask, 1).checked()).unwrap();
    for ((e, j), (got, at)) in least(&q, &k, Score::Energy)
        .into_iter()
        .zip(values(&scanned.energy).into_iter().zip(values(&scanned.index)))
    {
        let want = f64::from(1e-38f32) * e;
        assert_eq!(j as f64, at);
        assert!((got - want).abs() <= 1e-5 * want, "{got} instead of {want}");
    }
}

#[test]
fn offsets_of_64_bits_show_all_keys_or_none() {
    let (q, k) = (normal(7, [1, 1, 3, 8], 1.0, 0.0), normal(8, [1, 1, 5, 8], 1.0, 0.0));
    let beta = Tensor::ones(1, DType::F32, &Device::Cpu).unwrap();
    let visible = |mask: &Mask| {
        let scanned = scan(&q, &k, &Scan::new(&beta, mask, 8)).unwrap();
        values(&scanned.index)
            .chunks(8)
            .map(|row| row.iter().filter(|j| **j >= 0.0).count())
            .collect::<Vec<_>>()
    };
    for offset in [i64::MAX, i64::MAX - 1, 1 << 62] {
        assert_eq!(visible(&Mask::causal(offset)), [5; 3], "{offset}");
        assert_eq!(visible(&Mask::window(4, offset)), [0; 3], "{offset}");
        assert_eq!(visible(&Mask::causal(-offset)), [0; 3], "{offset}");
    }
    assert_eq!(visible(&Mask::window(usize::MAX, i64::MAX)), [5; 3]);
    assert_eq!(visible(&Mask::causal(i64::MIN)), [0; 3]);
}
