//! Keys and values in f16 and bf16 with queries in f32, as in a cache: the bits of keys and values widened to f32, and the
//! sums of the definition in f64.

use candle_core::{DType, Device, Tensor, Var};
use gd_kernels::{
    Backend, Candidates, Estimator, Int8Keys, Isa, Mask, Precision, Scan, Score, Select, SequenceCache,
    decode, scan, scan_all, scan_select, select, softmax_attention,
};
use gd_testing::log_cases;
use gd_testing::problems::choices::{Choice, estimator};
use gd_testing::problems::{Spec, pools};
use gd_testing::tensors::{assert_close, noise, values};

use crate::softmax_attention::naive;

const HALF: [DType; 2] = [DType::F16, DType::BF16];

/// Positions of a cache behind its end, which hold NaN.
const PADDING: usize = 5;

fn wide(t: &Tensor) -> Tensor {
    t.to_dtype(DType::F32).unwrap()
}

fn bits(tensors: &[&Tensor]) -> Vec<u64> {
    tensors.iter().flat_map(|t| values(t)).map(f64::to_bits).collect()
}

/// Random rows `[B, H, M, D]` of a cache with capacity for more.
fn cached(seed: u64, [b, h, m, d]: [usize; 4], dtype: DType) -> Tensor {
    let rows = noise(seed, &[b, h, m, d], 2.0).to_dtype(dtype).unwrap();
    let nan = Tensor::full(f64::NAN, (b, h, PADDING, d), &Device::Cpu).unwrap().to_dtype(dtype).unwrap();
    Tensor::cat(&[&rows, &nan], 2).unwrap().narrow(2, 0, m).unwrap()
}

/// Sizes [B, Hq, Hk, N, M, D, Dv] of decoding steps and prompts, in one and in several parts of the keys.
fn softmax_problems() -> Vec<([usize; 7], Vec<Mask>)> {
    vec![
        ([1, 1, 1, 1, 1, 1, 1], vec![Mask::none(), Mask::causal(-1)]),
        ([1, 9, 3, 1, 700, 64, 64], vec![Mask::causal(699), Mask::window(300, 699), Mask::causal(511)]),
        ([2, 4, 2, 2, 300, 48, 80], vec![Mask::causal(298), Mask::causal(0).with_offsets(vec![20, 280])]),
        ([2, 7, 1, 1, 530, 33, 17], vec![Mask::none(), Mask::none().kv_len(vec![0, 257])]),
        ([1, 2, 1, 4, 40, 5, 3], vec![Mask::causal(30), Mask::window(3, 30), Mask::causal(-2)]),
        ([1, 6, 2, 70, 320, 33, 18], vec![Mask::causal(250), Mask::window(33, 250)]),
        ([2, 4, 2, 9, 9, 5, 3], vec![Mask::causal(2).packed(vec![vec![0, 4, 9]]), Mask::causal(-3)]),
        ([2, 2, 2, 40, 90, 16, 16], vec![Mask::causal(0).with_offsets(vec![3, 50])]),
    ]
}

#[test]
fn softmax_attention_is_that_of_widened_keys_and_values() {
    let mut cases = 0;
    for (sizes, masks) in softmax_problems() {
        let [b, hq, hk, n, m, d, dv] = sizes;
        let q = noise(1, &[b, hq, n, d], 2.0).to_dtype(DType::F32).unwrap();
        let mut prior = noise(4, &[b, hk, m], 2.0).to_dtype(DType::F32).unwrap();
        if m > 2 {
            let excluded = Tensor::full(f32::NEG_INFINITY, (b, hk, 1), &Device::Cpu).unwrap();
            prior = prior.slice_scatter(&excluded, 2, 1).unwrap();
        }
        let sinks = [noise(5, &[hq], 2.0), noise(6, &[b, hq, n], 2.0)].map(|t| wide(&t));
        for (dtype, mask) in HALF.iter().flat_map(|dtype| masks.iter().map(move |mask| (*dtype, mask))) {
            let (k, v) = (cached(2, [b, hk, m, d], dtype), cached(3, [b, hk, m, dv], dtype));
            for (prior, sink) in
                [(None, None), (Some(&prior), None), (None, Some(&sinks[0])), (Some(&prior), Some(&sinks[1]))]
            {
                let scale = 0.3;
                let attend =
                    |k: &Tensor, v: &Tensor| softmax_attention(&q, k, v, prior, sink, mask, scale).unwrap();
                let got = attend(&k, &v);
                assert_eq!((got.dtype(), got.dims()), (DType::F32, &[b, hq, n, dv][..]));
                let name = format!("{dtype:?} {sizes:?} {mask:?}");
                assert_eq!(bits(&[&got]), bits(&[&attend(&wide(&k), &wide(&v))]), "{name}");
                for pool in pools() {
                    assert_eq!(bits(&[&pool.install(|| attend(&k, &v))]), bits(&[&got]), "{name}");
                }
                let none = Tensor::zeros((b, hk, m), DType::F64, &Device::Cpu).unwrap();
                let mut all = vec![q.clone(), k.clone(), v.clone()];
                all.extend(prior.cloned().or_else(|| sink.is_some().then_some(none)));
                all.extend(sink.cloned());
                assert_close(&name, &got, &naive(&all, mask, scale), 3e-6);
                cases += 1;
            }
        }
    }
    log_cases("softmax-attention-half-cache", cases);
}

/// The sequences of a batch have the bits that each has alone, though the batch has more keys.
#[test]
fn a_decoding_step_of_a_batch_is_that_of_its_sequences() {
    for dtype in [DType::F32, DType::F16] {
        let (lengths, m) = ([1usize, 300, 513], 700);
        let q = wide(&noise(1, &[3, 6, 1, 40], 2.0));
        let (k, v) = (cached(2, [3, 2, m, 40], dtype), cached(3, [3, 2, m, 40], dtype));
        let mask = Mask::causal(0).with_offsets(lengths.iter().map(|n| *n as i64 - 1).collect());
        let all = softmax_attention(&q, &k, &v, None, None, &mask, 0.2).unwrap();
        for (b, n) in lengths.into_iter().enumerate() {
            let one = |t: &Tensor| t.narrow(0, b, 1).unwrap();
            let keys = |t: &Tensor| one(t).narrow(2, 0, n).unwrap();
            let alone =
                softmax_attention(&one(&q), &keys(&k), &keys(&v), None, None, &Mask::none(), 0.2).unwrap();
            assert_eq!(bits(&[&one(&all)]), bits(&[&alone]), "{dtype:?}, sequence {b}");
        }
    }
}

#[test]
fn a_nan_in_a_visible_key_reaches_the_output() {
    let q = wide(&noise(1, &[1, 2, 1, 4], 2.0));
    let v = wide(&noise(3, &[1, 1, 3, 4], 2.0));
    for k in [[0.0, f32::NAN, 1.0], [f32::NAN; 3]] {
        let k = Tensor::new(&k, &Device::Cpu).unwrap().reshape((1, 1, 3, 1)).unwrap();
        let k = k.broadcast_as((1, 1, 3, 4)).unwrap().contiguous().unwrap();
        let y = softmax_attention(&q, &k, &v, None, None, &Mask::none(), 1.0).unwrap();
        assert!(values(&y).iter().all(|y| y.is_nan()), "{k} {y}");
    }
}

/// Index, energy and flags of candidates to the bit.
fn candidate_bits(c: &Candidates) -> Vec<u64> {
    let all: Vec<&Tensor> =
        [Some(&c.index), Some(&c.energy), c.protected.as_ref()].into_iter().flatten().collect();
    bits(&all)
}

/// Generated problems: all options, strides, ties, priors, protected keys and masks.
#[test]
fn scans_and_selections_are_those_of_widened_keys_and_values() {
    let (mut cases, mut decoded) = (0, 0);
    for dtype in HALF {
        for seed in 0..300 {
            let case = Spec::new(90_000 + seed, 60_000).build(dtype);
            // Queries are not rounded to the dtype of the keys.
            let q = (wide(&case.q.tensor()) * 1.000_123).unwrap();
            let (k, v) = (case.k.tensor(), case.v.tensor());
            let (k32, v32) = (wide(&k), wide(&v));
            let native = case.scan();
            let expected = scan(&q, &k32, &native).unwrap();
            let name = case.name();
            for isa in Isa::available() {
                for precision in [Precision::Native, Precision::Certified] {
                    let forced = Scan { backend: Backend::Force(isa), precision, ..native.clone() };
                    let got = scan(&q, &k, &forced).unwrap();
                    assert_eq!(
                        candidate_bits(&got),
                        candidate_bits(&expected),
                        "{name} {isa:?} {precision:?}"
                    );
                }
            }
            for pool in pools() {
                let got = pool.install(|| scan(&q, &k, &native)).unwrap();
                assert_eq!(candidate_bits(&got), candidate_bits(&expected), "{name}");
            }
            let among = match estimator(seed) {
                Estimator::Dense => scan_all(&q, &k, &native).unwrap(),
                _ => expected,
            };
            let choice = Choice::new(seed, &case, &values(&among.energy));
            let how = choice.select(&case, &case.beta).with_prior(case.prior.as_ref());
            let all = |k: &Tensor, v: &Tensor| {
                let s = select(&q, k, v, &among, &how).unwrap();
                assert_eq!(s.y.dtype(), DType::F32);
                let mut all = vec![s.y, s.index, s.energy, s.margin, s.gate, s.compared];
                all.extend(s.coherence);
                all.extend(s.later.into_iter().flat_map(|round| [round.index, round.y]));
                all.extend(s.picks.into_iter().flat_map(|pick| [pick.index, pick.weight]));
                bits(&all.iter().collect::<Vec<_>>())
            };
            assert_eq!(all(&k, &v), all(&k32, &v32), "{name} {}", choice.name());
            let mut winners = Vec::new();
            let int8 = Int8Keys::new(&k, case.problem.score).unwrap();
            for (k, v, cached) in [(&k32, &v32, None), (&k, &v, None), (&k, &v, Some(&int8))] {
                let scan = match cached {
                    Some(int8) => native.clone().with_cached(int8),
                    None => native.clone(),
                };
                let of = |s: gd_kernels::Selected| bits(&[&s.y, &s.index, &s.energy]);
                winners.push([
                    of(decode(&q, k, v, &scan, choice.threshold.as_ref()).unwrap()),
                    of(scan_select(&q, k, v, &scan, choice.threshold.as_ref()).unwrap()),
                ]);
                decoded += 1;
            }
            assert!(winners.iter().all(|w| *w == winners[0]), "{name}");
            cases += 1;
        }
    }
    log_cases("half-cache", cases);
    assert_eq!((cases, decoded), (600, 1800));
}

/// Decoding steps over a cache that grows, whose 8-bit keys are those of the rounded keys; the winner is that of energies
/// in f64.
#[test]
fn the_winner_over_a_cache_in_half_precision_is_that_of_the_definition() {
    let (hq, hk, m, d) = (6, 2, 900, 24);
    let beta = Tensor::full(0.7f32, hq, &Device::Cpu).unwrap();
    for (dtype, score) in
        HALF.iter().flat_map(|dtype| [Score::Energy, Score::Dot].map(|score| (*dtype, score)))
    {
        let (k, v) = (cached(11, [1, hk, m, d], dtype), cached(12, [1, hk, m, d], dtype));
        let mut int8 = Int8Keys::like(&k, score).unwrap();
        let mut compared = 0;
        for (step, length) in (280..m).step_by(60).enumerate() {
            let keys = k.narrow(2, 0, length).unwrap();
            let from = int8.longest();
            int8.append(&keys.narrow(2, from, length - from).unwrap()).unwrap();
            let q = wide(&noise(100 + step as u64, &[1, hq, 1, d], 2.0));
            let mask = Mask::causal(length as i64 - 1);
            let options = Scan::new(&beta, &mask, 1).with_score(score).with_cached(&int8);
            let won = decode(&q, &keys, &v.narrow(2, 0, length).unwrap(), &options, None).unwrap();
            let (qs, ks, vs) = (values(&q), values(&k), values(&v));
            for h in 0..hq {
                let kv = h / (hq / hk);
                let energy = |j: usize| -> f64 {
                    let pairs = (0..d).map(|x| (qs[h * d + x], ks[(kv * m + j) * d + x]));
                    match score {
                        Score::Energy => pairs.map(|(q, k)| 0.7 * (q - k) * (q - k)).sum(),
                        Score::Dot => pairs.map(|(q, k)| -0.7 * q * k).sum(),
                    }
                };
                let mut energies: Vec<(f64, usize)> = (0..length).map(|j| (energy(j), j)).collect();
                energies.sort_by(|a, b| a.0.total_cmp(&b.0));
                if energies[1].0 - energies[0].0 < 1e-4 {
                    continue;
                }
                let j = energies[0].1;
                assert_eq!(values(&won.index)[h], j as f64, "{dtype:?} {score:?} {length} keys, head {h}");
                assert_eq!(values(&won.y)[h * d..][..d], vs[(kv * m + j) * d..][..d]);
                compared += 1;
            }
        }
        assert!(compared > 50, "{compared}");
    }
}

#[test]
fn gradients_and_other_pairs_of_dtypes_are_refused() {
    let [q, k, v] = [1, 2, 3].map(|seed| noise(seed, &[1, 2, 3, 4], 1.0));
    let (q32, k16, v16) = (wide(&q), k.to_dtype(DType::F16).unwrap(), v.to_dtype(DType::F16).unwrap());
    let tracked = Var::from_tensor(&q32).unwrap();
    let softmax = |q: &Tensor, k: &Tensor, v: &Tensor| {
        softmax_attention(q, k, v, None, None, &Mask::none(), 1.0).unwrap_err().to_string()
    };
    let contains = |error: String, parts: &[&str]| {
        assert!(parts.iter().all(|part| error.contains(part)), "{error} does not name {parts:?}");
    };
    contains(softmax(tracked.as_tensor(), &k16, &v16), &["F32", "F16", "gradients"]);
    contains(softmax(&q, &k16, &v16), &["F64", "F16"]);
    contains(softmax(&q32, &k16, &v16.to_dtype(DType::BF16).unwrap()), &["F16", "BF16"]);
    contains(softmax(&k16, &q32, &q32), &["q is F16", "F32"]);
    let (beta, mask) = (Tensor::ones(2, DType::F32, &Device::Cpu).unwrap(), Mask::none());
    let options = Scan::new(&beta, &mask, 2);
    contains(scan(&k16, &q32, &options).unwrap_err().to_string(), &["q is F16", "F32"]);
    // A scan has no gradient; a selection has.
    let candidates = scan(tracked.as_tensor(), &k16, &options).unwrap();
    let refused = |q: &Tensor, beta: &Tensor| {
        select(q, &k16, &v16, &candidates, &Select::new(beta)).unwrap_err().to_string()
    };
    contains(refused(tracked.as_tensor(), &beta), &["F32", "F16", "gradients"]);
    let tracked_beta = Var::from_tensor(&beta).unwrap();
    contains(refused(&q32, tracked_beta.as_tensor()), &["F32", "F16", "gradients"]);
}
