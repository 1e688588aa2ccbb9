//! Operators in candle's graph on the device: values and gradients against the same calls on the CPU, for every option
//! that is composed of several operators, and the errors for tensors that no kernel supports.

use candle_core::{DType, Device, Result, Tensor, Var};
use gd_kernels::cross_entropy::{row_losses, row_losses_and_gradient};
use gd_kernels::gpu::on_cpu;
use gd_kernels::{
    Backend, Barrier, Candidates, CoherenceMode, Error, Estimator, Gate, Int8Keys, Isa, Mask, Precision,
    Scan, Score, Select, TieBreak, causal_conv, embedding, packed_causal_conv, plan, running_average, scan,
    scan_all, scan_select, select,
};

use crate::{sanitized, targets};
use gd_testing::problems::{rng, uniform, values};

/// [B, Hq, Hk, N, M, D, Dv].
const SHAPES: [[usize; 7]; 3] =
    [[2, 4, 2, 37, 37, 24, 40], [1, 3, 3, 5, 70, 64, 64], [2, 2, 1, 65, 65, 128, 8]];
/// Smaller shapes, under a sanitizer and on the emulator.
const SMALL_SHAPES: [[usize; 7]; 3] =
    [[2, 4, 2, 19, 19, 24, 40], [1, 3, 3, 5, 41, 64, 64], [1, 2, 1, 9, 33, 128, 8]];

fn shapes() -> [[usize; 7]; 3] {
    if sanitized() { SMALL_SHAPES } else { SHAPES }
}

/// Uniform random f64 in -1..1, which depend on the seed alone.
pub(crate) fn noise(seed: u64, shape: &[usize]) -> Tensor {
    let values = uniform(&mut rng(seed), shape.iter().product());
    Tensor::from_vec(values, shape, &Device::Cpu).unwrap()
}

/// The largest difference, relative to the largest magnitude of `b`; NaN if a difference is NaN.
pub(crate) fn relative_difference(a: &Tensor, b: &Tensor) -> f64 {
    assert_eq!((a.dims(), a.dtype()), (b.dims(), b.dtype()));
    let (a, b) = (values(a), values(b));
    let size = b.iter().fold(1e-30, |m: f64, x| m.max(x.abs()));
    let each = a.iter().zip(&b).map(|(a, b)| (a - b).abs() / size);
    each.fold(0.0, |largest: f64, x| if x <= largest || largest.is_nan() { largest } else { x })
}

/// Fails unless results and gradients on the device are close to those on the CPU. The first result does not depend on
/// the input `unused`, which has no gradient.
pub(crate) fn compare(
    what: &str,
    inputs: &[Tensor],
    unused: Option<usize>,
    bound: f64,
    run: impl Fn(&[Tensor]) -> std::result::Result<Vec<Tensor>, Error>,
) {
    let all = |device: &Device| -> Vec<Tensor> {
        let vars: Vec<Var> =
            inputs.iter().map(|t| Var::from_tensor(&t.to_device(device).unwrap()).unwrap()).collect();
        let tensors: Vec<Tensor> = vars.iter().map(|v| v.as_tensor().clone()).collect();
        let results = run(&tensors).unwrap_or_else(|e| panic!("{what} on {:?}: {e}", device.location()));
        let weights = noise(99, results[0].dims()).to_dtype(results[0].dtype()).unwrap();
        let loss = (&results[0] * weights.to_device(device).unwrap()).unwrap().sum_all().unwrap();
        let grads = loss.backward().unwrap();
        let mut all: Vec<Tensor> = results.iter().map(Tensor::detach).collect();
        for (i, var) in vars.iter().enumerate() {
            match grads.get(var) {
                Some(grad) => all.push(grad.clone()),
                None => assert_eq!(unused, Some(i), "{what}: input {i} got no gradient"),
            }
        }
        all.iter().map(|t| t.to_device(&Device::Cpu).unwrap()).collect()
    };
    let expected = all(&Device::Cpu);
    for target in targets() {
        let got = target.run(|| all(target.device()));
        assert_eq!(expected.len(), got.len());
        for (i, (a, b)) in got.iter().zip(&expected).enumerate() {
            let off = relative_difference(a, b);
            assert!(
                off <= bound,
                "{what}, result or gradient {i}: a relative difference of {off}, {bound} allowed"
            );
        }
        target.count();
    }
}

/// Index of the input alpha in [`selection`].
const ALPHA: Option<usize> = Some(5);

/// A change of the options, and the input that has no gradient with it.
type Change = (fn(&mut Select), Option<usize>);

/// Compares a scan and selection with gradients of all inputs but `unused`.
fn selection(
    what: &str,
    shape: [usize; 7],
    (dtype, bound): (DType, f64),
    (change, unused): Change,
    rounds: usize,
) {
    let heads = vec![shape[1]];
    selection_at(what, shape, (dtype, bound), (change, unused), rounds, &heads);
}

/// The same with thresholds of the shape `tau`, per head or per query.
fn selection_at(
    what: &str,
    shape: [usize; 7],
    (dtype, bound): (DType, f64),
    (change, unused): Change,
    rounds: usize,
    tau: &[usize],
) {
    let [b, hq, hk, n, m, d, dv] = shape;
    let float = |t: Tensor| t.to_dtype(dtype).unwrap();
    let wide = |t: Tensor| t.to_dtype(DType::F32).unwrap();
    let inputs = [
        float(noise(1, &[b, hq, n, d])),
        float(noise(2, &[b, hk, m, d])),
        float(noise(3, &[b, hk, m, dv])),
        // beta, threshold, alpha, rounds, prior
        wide((noise(4, &[hq]).abs().unwrap() + 0.5).unwrap()),
        wide((noise(5, tau) + 0.6 * d as f64).unwrap()),
        wide(((noise(6, &[hq]) * 0.3).unwrap() + 0.5).unwrap()),
        wide((noise(7, &[hq, rounds]) + 1.0).unwrap()),
        wide(noise(8, &[b, hk, m])),
    ];
    let mask = Mask::causal((m - n) as i64);
    compare(&format!("{what} {shape:?} {dtype:?}"), &inputs, unused, bound, |x| {
        let [q, k, v, beta, threshold, alpha, rounds, prior] = x else { unreachable!("eight inputs") };
        // A third of the keys is protected for every query.
        let protected_keys: Vec<i32> = (0..3).map(|i| i * (m as i32 / 3)).collect();
        let protected = Tensor::from_vec(protected_keys, (1, 1, 1, 3), q.device())?;
        let barrier = Barrier { floor: 0.1, margin: 2.0, strength: 0.5, entropy_trigger: 0.5, slack: 0.5 };
        let mut how = Select {
            prior: Some(prior),
            threshold: Some(threshold),
            alpha: Some(alpha),
            gate: Gate::Coherence,
            rounds: Some(rounds),
            barrier: Some(barrier),
            preserve_floor: 0.05,
            value_floor: 0.2,
            temperature: 1.5,
            ..Select::new(beta)
        };
        change(&mut how);
        let Select { score, tie, .. } = how;
        let scan_options =
            Scan { prior: Some(prior), protected: Some(&protected), score, tie, ..Scan::new(beta, &mask, 8) };
        let candidates = scan(q, k, &scan_options)?;
        let s = select(q, k, v, &candidates, &how)?;
        let key = |t: &Tensor| t.to_device(&Device::Cpu)?.to_dtype(DType::F32)?.to_device(q.device());
        let mut indices = vec![key(&s.index)?];
        for round in &s.later {
            indices.extend([key(&round.index)?, round.y.clone()]);
        }
        // Infinite margins and energies are the same on both sides.
        let finite = |t: &Tensor| t.clamp(-1e3, 1e3);
        let stats = [finite(&s.energy)?, finite(&s.margin)?, s.gate.clone(), finite(&s.compared)?];
        let coherence = s.coherence.clone().into_iter();
        Ok([s.y].into_iter().chain(indices).chain(stats).chain(coherence).collect())
    });
}

#[test]
fn selections_and_gradients_match_the_cpu() {
    let changes: [Change; 8] = [
        (|s| s.estimator = Estimator::Candidates, None),
        (|s| s.estimator = Estimator::Reinmax, None),
        (|s| s.estimator = Estimator::Winner, None),
        // The blend has no gate.
        (|s| s.estimator = Estimator::Blend, ALPHA),
        (|s| (s.hardness, s.barrier) = (0.0, None), ALPHA),
        (|s| (s.gate, s.hardness) = (Gate::Energy { temperature: 1.0 }, 0.4), ALPHA),
        (|s| (s.hardness, s.coherence) = (0.5, CoherenceMode::Passage), None),
        (|s| (s.score, s.tie, s.gate) = (Score::Dot, TieBreak::Last, Gate::None), ALPHA),
    ];
    for (at, shape) in shapes().into_iter().enumerate() {
        for (i, change) in changes.into_iter().enumerate() {
            // With small shapes, every change once, with one of the shapes.
            if !sanitized() || i % 3 == at {
                selection(&format!("selection {i}"), shape, (DType::F32, 2e-4), change, 2);
            }
        }
    }
    // Thresholds per query, and v with heads at unequal distances.
    for (i, at) in [(0, 0), (2, 1), (5, 2)] {
        let (shape, change) = (shapes()[at], changes[i]);
        let tau = [shape[0], shape[1], shape[3]];
        selection_at(&format!("threshold per query {i}"), shape, (DType::F32, 2e-4), change, 2, &tau);
    }
    // In half precision with enough rows for Hopper's kernel.
    for (i, dtype) in [(0, DType::BF16), (5, DType::F16)] {
        let bound = if dtype == DType::BF16 { 2e-2 } else { 2e-3 };
        selection(&format!("selection {i}"), [1, 2, 1, 65, 67, 64, 8], (dtype, bound), changes[i], 1);
    }
}

#[test]
fn strided_tensors_are_read_correctly() {
    // q is a transpose, k a part that does not start at a multiple of 16 bytes, and v is strided in its last dimension.
    // The incoming gradient is a transpose, too.
    for (dtype, bound) in [(DType::F32, 2e-4), (DType::BF16, 2e-2)] {
        let float = |seed, shape: &[usize]| noise(seed, shape).to_dtype(dtype).unwrap();
        let [b, hq, hk, n, d, dv] = [2, 4, 2, 21, 24, 16];
        let inputs =
            [float(1, &[b, n, hq, d]), float(2, &[b, hk + 1, n + 2, d + 3]), float(3, &[b, hk, dv, n])];
        compare(&format!("views {dtype:?}"), &inputs, None, bound, |x| {
            let q = x[0].transpose(1, 2)?;
            let k = x[1].narrow(1, 1, hk)?.narrow(2, 1, n)?.narrow(3, 1, d)?;
            let v = x[2].transpose(2, 3)?;
            let heads = Tensor::full(0.4f32, (hq, 2), q.device())?;
            let beta = heads.narrow(1, 1, 1)?.squeeze(1)?;
            let mask = Mask::window(9, 0);
            let candidates = scan(&q, &k, &Scan::new(&beta, &mask, 4))?;
            // The candidates are a part of those of the scan.
            let part = |t: &Tensor| t.narrow(3, 0, 3);
            let candidates = Candidates {
                index: part(&candidates.index)?,
                energy: part(&candidates.energy)?,
                ..candidates.clone()
            };
            let s = select(&q, &k, &v, &candidates, &Select { value_floor: 0.2, ..Select::new(&beta) })?;
            Ok(vec![s.y.transpose(1, 2)?.reshape((b, n, hq * dv))?, s.energy])
        });
        // Averages with a strided batch, and a convolution of a part of the channels.
        let inputs = [float(1, &[n, b, hq]), float(2, &[n, b, hq]), float(3, &[b, n, hk, dv])];
        compare(&format!("views of averages {dtype:?}"), &inputs, None, 2.0 * bound, |x| {
            let transposed = |t: &Tensor| t.permute((1, 2, 0));
            let (m, _) =
                running_average(&transposed(&x[0])?, &transposed(&x[1])?, &x[2].transpose(1, 2)?, None)?;
            Ok(vec![m.transpose(1, 2)?.contiguous()?])
        });
        let inputs = [float(1, &[b, n, 2 * d]), float(2, &[4, d])];
        compare(&format!("views of a convolution {dtype:?}"), &inputs, None, 2.0 * bound, |x| {
            let (y, next) = causal_conv(&x[0].narrow(2, 5, d)?, &x[1].t()?, None)?;
            Ok(vec![y.transpose(1, 2)?.contiguous()?, next])
        });
    }
}

#[test]
fn fused_scans_and_decoding_steps_match_the_cpu() -> Result<()> {
    let wide = |seed, shape: &[usize]| noise(seed, shape).to_dtype(DType::F32).unwrap();
    for [b, hq, hk, n, m, d, dv] in shapes() {
        for queries in [n, 1] {
            for score in [Score::Energy, Score::Dot] {
                let (q, k, v) =
                    (wide(1, &[b, hq, queries, d]), wide(2, &[b, hk, m, d]), wide(3, &[b, hk, m, dv]));
                let beta = Tensor::full(0.5f32, hq, &Device::Cpu)?;
                let [per_head, per_query] = [&[hq][..], &[b, hq, queries]]
                    .map(|shape| (wide(4, shape) + 0.3 * d as f64).expect("a sum"));
                let mask = Mask::causal((m - queries) as i64);
                let run = |device: &Device| -> Result<Vec<Tensor>> {
                    let on = |t: &Tensor| t.to_device(device);
                    let (q, k, v, beta) = (on(&q)?, on(&k)?, on(&v)?, on(&beta)?);
                    let how = Scan { score, ..Scan::new(&beta, &mask, 1) };
                    let mut results = Vec::new();
                    for threshold in [&per_head, &per_query] {
                        let s = scan_select(&q, &k, &v, &how, Some(&on(threshold)?))?;
                        let energy = s.energy.clamp(-1e3, 1e3)?;
                        results.extend([s.y, s.index, energy, s.gate]);
                    }
                    results.iter().map(|t| t.to_device(&Device::Cpu)).collect()
                };
                let expected = run(&Device::Cpu)?;
                for target in targets() {
                    for (i, (a, b)) in target.run(|| run(target.device()))?.iter().zip(&expected).enumerate()
                    {
                        let off = relative_difference(a, b);
                        assert!(
                            off <= 1e-5,
                            "{queries} of {n} queries, {score:?}, result {i}: a relative difference of {off}"
                        );
                    }
                    target.count();
                }
            }
        }
    }
    Ok(())
}

#[test]
fn convolutions_averages_and_gradients_match_the_cpu() {
    for (dtype, bound) in [(DType::F32, 2e-5), (DType::BF16, 4e-2)] {
        let float = |seed, shape: &[usize]| noise(seed, shape).to_dtype(dtype).unwrap();
        for (b, n, c, w) in [(2, 67, 40, 4), (1, 3, 130, 5), (3, 1, 8, 2)] {
            let inputs = [float(1, &[b, n, c]), float(2, &[c, w])];
            compare(&format!("convolution {n} x {c} x {w} {dtype:?}"), &inputs, None, bound, |x| {
                let state = float(3, &[b, w - 1, c]).to_device(x[0].device())?;
                let (y, next) = causal_conv(&x[0], &x[1], Some(&state))?;
                Ok(vec![y, next])
            });
            compare(&format!("packed convolution {n} x {c} x {w} {dtype:?}"), &inputs, None, bound, |x| {
                let boundaries = vec![vec![0, n / 2, n]];
                Ok(vec![packed_causal_conv(&x[0], &x[1], &boundaries)?])
            });
        }
        for (b, h, hk, n, d) in [(2, 4, 2, 130, 24), (1, 3, 1, 65, 64), (2, 2, 2, 1, 8)] {
            let inputs = [float(1, &[b, h, n]), float(2, &[b, h, n]), float(3, &[b, hk, n, d])];
            compare(&format!("average {h} x {n} x {d} {dtype:?}"), &inputs, None, bound, |x| {
                let (_, state) = running_average(&x[1], &x[0], &x[2], None)?;
                let (m, last) = running_average(&x[0], &x[1], &x[2], Some(&state))?;
                Ok(vec![m, last.mean, last.log_weight])
            });
        }
    }
}

#[test]
fn an_embedding_reads_rows_and_sums_their_gradients() -> Result<()> {
    for (rows, width, reads) in [(5, 24, 33), (300, 130, 7), (1, 8, 3)] {
        for (dtype, bound) in [(DType::F32, 1e-6), (DType::BF16, 2e-2)] {
            let ids: Vec<u32> = (0..reads).map(|i| (i * i * 7 % rows) as u32).collect();
            let table = [noise(1, &[rows, width]).to_dtype(dtype)?];
            compare(&format!("embedding {rows} x {width} {dtype:?}"), &table, None, bound, |x| {
                let ids = Tensor::new(&ids[..], x[0].device())?;
                Ok(vec![embedding(&x[0], &ids)?])
            });
        }
    }
    Ok(())
}

#[test]
fn cross_entropies_and_gradients_match_candle_operations() {
    for (rows, vocab) in [(7, 33), (1, 700), (40, 2)] {
        for (dtype, bound) in [(DType::F32, 2e-6), (DType::BF16, 2e-2), (DType::F16, 2e-3)] {
            // Parts of larger tensors, the targets too; every third row is ignored.
            let ids: Vec<u32> =
                (0..=rows as u32).map(|i| if i % 3 == 2 { u32::MAX } else { i * 7 % vocab as u32 }).collect();
            let wide = (noise(1, &[rows, vocab + 3]) * 4.0).and_then(|t| t.to_dtype(dtype)).unwrap();
            compare(&format!("cross entropy {rows} x {vocab} {dtype:?}"), &[wide], None, bound, |x| {
                let logits = x[0].narrow(1, 2, vocab)?;
                let targets = Tensor::new(&ids[..], logits.device())?.narrow(0, 1, rows)?;
                let weights = noise(2, &[rows]).to_dtype(DType::F32)?.to_device(logits.device())?;
                if !on_cpu(logits.device()) {
                    let (losses, gradient) = row_losses_and_gradient(&logits, &targets, &weights)?;
                    return Ok(vec![row_losses(&logits, &targets)?, losses, gradient]);
                }
                let logits = logits.to_dtype(DType::F32)?.contiguous()?;
                let counted = targets.ne(u32::MAX)?.to_dtype(DType::F32)?.unsqueeze(1)?;
                let targets = targets.minimum(vocab as u32 - 1)?.unsqueeze(1)?;
                let log_sums = logits.exp()?.sum_keepdim(1)?.log()?;
                let losses = ((&log_sums - logits.gather(&targets, 1)?)? * &counted)?.squeeze(1)?;
                let shares = logits.broadcast_sub(&log_sums)?.exp()?;
                let gradient = shares.scatter_add(&targets, &counted.ones_like()?.neg()?, 1)?;
                let gradient = gradient.broadcast_mul(&(weights.unsqueeze(1)? * counted)?)?;
                Ok(vec![losses.clone(), losses, gradient.to_dtype(dtype)?])
            });
        }
    }
}

#[test]
fn unsupported_tensors_are_refused_by_name() -> Result<()> {
    for target in targets() {
        target.run(|| refusals(target.device(), target.name()))?;
        target.check_memory();
    }
    Ok(())
}

/// The error of a call that must have one names `word`.
fn assert_error_names<T>(result: std::result::Result<T, Error>, word: &str) {
    let e = result.err().unwrap_or_else(|| panic!("no error names {word}")).to_string();
    assert!(e.contains(word), "{e} does not name {word}");
}

fn refusals(device: &Device, name: &str) -> Result<()> {
    let tensor = |shape: &[usize], dtype| noise(1, shape).to_dtype(dtype)?.to_device(device);
    let beta = Tensor::ones(2, DType::F32, device)?;
    let mask = Mask::causal(0);
    let refused = |d: usize, dtype, change: fn(&mut Scan), word: &str| -> Result<()> {
        let (q, k) = (tensor(&[1, 2, 9, d], dtype)?, tensor(&[1, 2, 9, d], dtype)?);
        let mut how = Scan::new(&beta, &mask, 4);
        change(&mut how);
        assert_error_names(scan(&q, &k, &how), word);
        Ok(())
    };
    refused(12, DType::F32, |_| {}, "head_dim 12")?;
    refused(264, DType::BF16, |_| {}, "head_dim 264")?;
    refused(64, DType::F64, |_| {}, "f64")?;
    refused(64, DType::F32, |s| s.candidates = 65, "65 candidates")?;
    refused(64, DType::F32, |s| s.backend = Backend::Force(Isa::Portable), "Portable")?;
    if name == "metal" {
        refused(64, DType::F32, |s| s.candidates = 64, "64 candidates")?;
        assert_error_names(
            Int8Keys::new(&tensor(&[1, 2, 9, 64], DType::F32)?, Score::Energy),
            "8-bit keys on Metal",
        );
    }
    let (q, k) = (tensor(&[1, 2, 9, 64], DType::F32)?, tensor(&[1, 2, 9, 64], DType::F32)?);
    let plain = Scan::new(&beta, &mask, 4);
    assert_error_names(scan_all(&q, &k, &plain), "dense");
    let text = plan(&q, &k, &plain)?.to_string();
    assert!(text.starts_with(&format!("{name}/scan_topk_f32_d64")), "{text}");
    // A NaN is refused in the checked mode, by name, and so are parameters.
    let bad = Tensor::new(&[[[[f32::NAN, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0]]]], device)?;
    let one = Tensor::ones(1, DType::F32, device)?;
    assert_error_names(
        scan(&bad, &bad, &Scan { checked: true, ..Scan::new(&one, &mask, 1) }),
        "q[0, 0, 0, 0] is NaN",
    );
    let zero = Tensor::zeros(2, DType::F32, device)?;
    assert_error_names(
        scan(&q, &k, &Scan { checked: true, ..Scan::new(&zero, &mask, 1) }),
        "beta of head 0 is 0",
    );
    assert_error_names(scan(&q, &k, &Scan::new(&one, &mask, 1)), "beta [1]");
    let protected = Tensor::new(&[[[[9i32]]]], device)?;
    let with_protected = Scan { protected: Some(&protected), ..plain.clone() };
    assert_error_names(scan(&q, &k, &Scan { checked: true, ..with_protected }), "protected key 9");
    let prior = tensor(&[1, 2, 8], DType::F32)?;
    assert_error_names(scan(&q, &k, &Scan { prior: Some(&prior), ..plain.clone() }), "prior [1, 2, 8]");
    // Selections.
    let candidates = scan(&q, &k, &plain)?;
    let how = Select::new(&beta);
    assert_error_names(select(&q, &k, &k.narrow(2, 0, 8)?, &candidates, &how), "[1, 2, 8, 64]");
    assert_error_names(
        select(&q, &k, &k, &candidates, &Select { estimator: Estimator::Dense, ..how.clone() }),
        "dense",
    );
    assert_error_names(
        select(&q, &k, &k, &candidates, &Select { hardness: 1.5, ..how.clone() }),
        "hardness 1.5",
    );
    assert_error_names(
        select(&q, &k, &k, &candidates, &Select { gate: Gate::Coherence, ..how.clone() }),
        "needs alpha",
    );
    let fewer_rows = Candidates { index: candidates.index.narrow(2, 0, 8)?, ..candidates.clone() };
    assert_error_names(select(&q, &k, &k, &fewer_rows, &how), "[1, 2, 8, 4]");
    // 8-bit keys with another number of keys.
    if name == "cuda" {
        let other = Int8Keys::new(&k.narrow(2, 0, 5)?, Score::Energy)?;
        let certified = Scan::new(&beta, &mask, 1).with_precision(Precision::Certified).with_cached(&other);
        assert_error_names(scan_select(&q, &k, &k, &certified, None), "[1, 2, 5, 64]");
    }
    // The other operators.
    let (x, taps) = (tensor(&[1, 5, 8], DType::F32)?, tensor(&[8, 4], DType::F32)?);
    assert_error_names(causal_conv(&x, &taps.narrow(1, 0, 1)?, None), "width 1");
    assert_error_names(causal_conv(&x, &taps.narrow(0, 0, 7)?, None), "[7, 4]");
    assert_error_names(packed_causal_conv(&x, &taps, &[vec![0, 3, 4]]), "do not rise from 0 to 5");
    let v = tensor(&[1, 2, 9, 264], DType::F32)?;
    assert_error_names(running_average(&prior, &prior, &v, None), "[1, 2, 8]");
    let table = tensor(&[7, 8], DType::F32)?;
    assert_error_names(embedding(&table, &Tensor::new(&[0i64], device)?), "I64");
    let targets = Tensor::zeros(7, DType::U32, device)?;
    assert_error_names(row_losses(&table, &targets.narrow(0, 0, 6)?), "[7, 8]");
    assert_error_names(row_losses(&table, &targets.to_dtype(DType::I64)?), "I64");
    assert_error_names(row_losses(&tensor(&[7, 8], DType::F64)?, &targets), "f64");
    assert_error_names(row_losses_and_gradient(&table, &targets, &beta), "weights [2] of 7");
    Ok(())
}
