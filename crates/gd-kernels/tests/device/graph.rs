//! candle's graph over tensors of the device: values and gradients against the same calls on the CPU, in every option that
//! the graph itself puts together, and the refusals of tensors that no kernel covers.

use candle_core::{DType, Device, Result, Tensor, Var};
use gd_kernels::gpu::Gpu as _;
use gd_kernels::{
    Backend, Barrier, CoherenceMode, Error, Estimator, Gate, Isa, Mask, Scan, Score, Select, causal_conv,
    embedding, packed_causal_conv, plan, running_average, scan, scan_all, scan_select, select,
};

use crate::problems::{rng, uniform, values};
use crate::{backend, gpu};

/// [B, Hq, Hk, N, M, D, Dv].
const SHAPES: [[usize; 7]; 3] =
    [[2, 4, 2, 37, 37, 24, 40], [1, 3, 3, 5, 70, 64, 64], [2, 2, 1, 65, 65, 128, 8]];

/// Numbers of a shape, the same on every device.
fn noise(seed: u64, shape: &[usize]) -> Tensor {
    let values = uniform(&mut rng(seed), shape.iter().product());
    Tensor::from_vec(values, shape, &Device::Cpu).unwrap()
}

/// Largest difference, relative to the largest value.
fn apart(a: &Tensor, b: &Tensor) -> f64 {
    assert_eq!((a.dims(), a.dtype()), (b.dims(), b.dtype()));
    let (a, b) = (values(a), values(b));
    let size = b.iter().fold(1e-30, |m: f64, x| m.max(x.abs()));
    a.iter()
        .zip(&b)
        .fold(0.0, |m: f64, (a, b)| if (a - b).abs() <= m * size { m } else { (a - b).abs() / size })
}

/// Results and gradients on the CPU and on the device.
fn compare(
    what: &str,
    inputs: &[Tensor],
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
            all.push(grads.get(var).unwrap_or_else(|| panic!("{what}: input {i} got no gradient")).clone());
        }
        all.iter().map(|t| t.to_device(&Device::Cpu).unwrap()).collect()
    };
    let (expected, found) = (all(&Device::Cpu), all(gpu()));
    assert_eq!(expected.len(), found.len());
    for (i, (a, b)) in found.iter().zip(&expected).enumerate() {
        let off = apart(a, b);
        assert!(off <= bound, "{what}, result or gradient {i}: {off} apart, {bound} allowed");
    }
    gd_support::log_cases("device", 1);
}

/// Scan and selection with everything that has a gradient.
fn selection(
    what: &str,
    shape: [usize; 7],
    dtype: DType,
    bound: f64,
    change: fn(&mut Select),
    rounds: usize,
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
        wide((noise(5, &[hq]) + 0.6 * d as f64).unwrap()),
        wide(((noise(6, &[hq]) * 0.3).unwrap() + 0.5).unwrap()),
        wide((noise(7, &[hq, rounds]) + 1.0).unwrap()),
        wide(noise(8, &[b, hk, m])),
    ];
    let mask = Mask::causal((m - n) as i64);
    compare(&format!("{what} {shape:?} {dtype:?}"), &inputs, bound, |x| {
        let [q, k, v, beta, threshold, alpha, rounds, prior] = x else { unreachable!("eight inputs") };
        // A third of the keys is protected for every query.
        let kept: Vec<i32> = (0..3).map(|i| i * (m as i32 / 3)).collect();
        let protected = Tensor::from_vec(kept, (1, 1, 1, 3), q.device())?;
        let what = Scan { prior: Some(prior), protected: Some(&protected), ..Scan::new(beta, &mask, 8) };
        let found = scan(q, k, &what)?;
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
        let s = select(q, k, v, &found, &how)?;
        let index = s.index.to_device(&Device::Cpu)?.to_dtype(DType::F32)?.to_device(q.device())?;
        // Infinite margins and energies are the same on both sides.
        let finite = |t: &Tensor| t.clamp(-1e3, 1e3);
        let record = [finite(&s.energy)?, finite(&s.margin)?, s.gate.clone()];
        let coherence = s.coherence.clone().into_iter();
        Ok([s.y, index].into_iter().chain(record).chain(coherence).collect())
    });
}

#[test]
fn selections_and_their_gradients_are_those_of_the_cpu() {
    let estimators: [fn(&mut Select); 4] = [
        |s| s.estimator = Estimator::Candidates,
        |s| s.estimator = Estimator::Reinmax,
        |s| (s.gate, s.hardness) = (Gate::Energy { temperature: 1.0 }, 0.4),
        |s| (s.hardness, s.coherence) = (0.5, CoherenceMode::Passage),
    ];
    for shape in SHAPES {
        for (i, change) in estimators.into_iter().enumerate() {
            selection(&format!("selection {i}"), shape, DType::F32, 2e-4, change, 2);
        }
    }
}

#[test]
fn a_fused_scan_and_a_decoding_step_select_as_the_cpu_does() -> Result<()> {
    let wide = |seed, shape: &[usize]| noise(seed, shape).to_dtype(DType::F32).unwrap();
    for [b, hq, hk, n, m, d, dv] in SHAPES {
        for queries in [n, 1] {
            for score in [Score::Energy, Score::Dot] {
                let (q, k, v) =
                    (wide(1, &[b, hq, queries, d]), wide(2, &[b, hk, m, d]), wide(3, &[b, hk, m, dv]));
                let (beta, threshold) = (Tensor::full(0.5f32, hq, &Device::Cpu)?, wide(4, &[hq]));
                let threshold = (threshold + 0.3 * d as f64)?;
                let mask = Mask::causal((m - queries) as i64);
                let run = |device: &Device| -> Result<Vec<Tensor>> {
                    let on = |t: &Tensor| t.to_device(device);
                    let (q, k, v, beta, threshold) = (on(&q)?, on(&k)?, on(&v)?, on(&beta)?, on(&threshold)?);
                    let how = Scan { score, ..Scan::new(&beta, &mask, 1) };
                    let s = scan_select(&q, &k, &v, &how, Some(&threshold))?;
                    let energy = s.energy.clamp(-1e3, 1e3)?;
                    [s.y, s.index, energy, s.gate].iter().map(|t| t.to_device(&Device::Cpu)).collect()
                };
                for (i, (a, b)) in run(gpu())?.iter().zip(&run(&Device::Cpu)?).enumerate() {
                    let off = apart(a, b);
                    assert!(off <= 1e-5, "{queries} of {n} queries, {score:?}, result {i}: {off} apart");
                }
                gd_support::log_cases("device", 1);
            }
        }
    }
    Ok(())
}

#[test]
fn convolution_and_average_and_their_gradients_are_those_of_the_cpu() {
    for (dtype, bound) in [(DType::F32, 2e-5), (DType::BF16, 4e-2)] {
        let float = |seed, shape: &[usize]| noise(seed, shape).to_dtype(dtype).unwrap();
        for (b, n, c, w) in [(2, 67, 40, 4), (1, 3, 130, 5), (3, 1, 8, 2)] {
            let inputs = [float(1, &[b, n, c]), float(2, &[c, w])];
            compare(&format!("convolution {n} x {c} x {w} {dtype:?}"), &inputs, bound, |x| {
                let state = float(3, &[b, w - 1, c]).to_device(x[0].device())?;
                let (y, next) = causal_conv(&x[0], &x[1], Some(&state))?;
                Ok(vec![y, next])
            });
            compare(&format!("packed convolution {n} x {c} x {w} {dtype:?}"), &inputs, bound, |x| {
                let boundaries = vec![vec![0, n / 2, n]];
                Ok(vec![packed_causal_conv(&x[0], &x[1], &boundaries)?])
            });
        }
        for (b, h, hk, n, d) in [(2, 4, 2, 130, 24), (1, 3, 1, 65, 64), (2, 2, 2, 1, 8)] {
            let inputs = [float(1, &[b, h, n]), float(2, &[b, h, n]), float(3, &[b, hk, n, d])];
            compare(&format!("average {h} x {n} x {d} {dtype:?}"), &inputs, bound, |x| {
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
            compare(&format!("embedding {rows} x {width} {dtype:?}"), &table, bound, |x| {
                let ids = Tensor::new(&ids[..], x[0].device())?;
                Ok(vec![embedding(&x[0], &ids)?])
            });
        }
    }
    Ok(())
}

#[test]
fn what_no_kernel_covers_is_named() -> Result<()> {
    let tensor = |shape: &[usize], dtype| noise(1, shape).to_dtype(dtype)?.to_device(gpu());
    let beta = Tensor::ones(2, DType::F32, gpu())?;
    let mask = Mask::causal(0);
    let refused = |d: usize, dtype, change: fn(&mut Scan), word: &str| -> Result<()> {
        let (q, k) = (tensor(&[1, 2, 9, d], dtype)?, tensor(&[1, 2, 9, d], dtype)?);
        let mut how = Scan::new(&beta, &mask, 4);
        change(&mut how);
        let e = scan(&q, &k, &how).expect_err(word).to_string();
        assert!(e.contains(word), "{e} does not name {word}");
        Ok(())
    };
    refused(12, DType::F32, |_| {}, "head_dim 12")?;
    refused(264, DType::BF16, |_| {}, "head_dim 264")?;
    refused(64, DType::F64, |_| {}, "f64")?;
    refused(64, DType::F32, |s| s.candidates = 64, "64 candidates")?;
    refused(64, DType::F32, |s| s.backend = Backend::Force(Isa::Portable), "Portable")?;
    let (q, k) = (tensor(&[1, 2, 9, 64], DType::F32)?, tensor(&[1, 2, 9, 64], DType::F32)?);
    let e = scan_all(&q, &k, &Scan::new(&beta, &mask, 1)).expect_err("dense").to_string();
    assert!(e.contains("dense"), "{e}");
    let text = plan(&q, &k, &Scan::new(&beta, &mask, 4))?.to_string();
    assert!(text.starts_with(&format!("{}/scan_list_f32_d64", backend::NAME)), "{text}");
    // More memory than any GPU has.
    let e = backend::Device::new(gpu())?.allocate(1 << 42).map(|_| ()).expect_err("4 TiB").to_string();
    assert!(e.contains("4194304.0 MiB of GPU memory"), "{e}");
    // A NaN is refused in the checked mode, by name.
    let bad = Tensor::new(&[[[[f32::NAN, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0]]]], gpu())?;
    let one = Tensor::ones(1, DType::F32, gpu())?;
    let e = scan(&bad, &bad, &Scan { checked: true, ..Scan::new(&one, &mask, 1) }).expect_err("NaN");
    assert!(e.to_string().contains("q[0, 0, 0, 0] is NaN"), "{e}");
    Ok(())
}
