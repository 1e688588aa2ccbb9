//! `gd op` on small problems with hand-computed results.
//!
//! One head of dimension 8 in which only the first coordinate varies: queries at 0 and 3, keys at
//! 1, 2, 2, 9, so that with beta = 1 the energies are 1, 4, 4, 81 and 4, 1, 1, 36.

use std::collections::{BTreeMap, HashMap};
use std::process::Command;

use anyhow::{Result, bail, ensure};
use candle_core::{DType, Device, Tensor};

const INF: f32 = f32::INFINITY;

/// A tensor `[1, 1, rows, 8]` with the given first coordinates.
fn rows(first: &[f32]) -> Result<Tensor> {
    let values: Vec<f32> = first.iter().flat_map(|&x| [x, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0]).collect();
    Ok(Tensor::from_vec(values, (1, 1, first.len(), 8), &Device::Cpu)?)
}

fn problem() -> Result<BTreeMap<&'static str, Tensor>> {
    Ok(BTreeMap::from([
        ("q", rows(&[0.0, 3.0])?),
        ("k", rows(&[1.0, 2.0, 2.0, 9.0])?),
        ("v", rows(&[10.0, 20.0, 30.0, 40.0])?),
    ]))
}

/// The tensors that the program writes, and its JSON summary.
type Answer = (HashMap<String, Tensor>, serde_json::Value);

fn op(tensors: &BTreeMap<&str, Tensor>, args: &str) -> Result<Answer> {
    let dir = tempfile::tempdir()?;
    safetensors::serialize_to_file(tensors, None, &dir.path().join("x.safetensors"))?;
    let output = Command::new(env!("CARGO_BIN_EXE_gd"))
        .arg("op")
        .args(args.split_whitespace())
        .args(["--in", "x.safetensors", "--out", "y.safetensors", "--json"])
        .current_dir(dir.path())
        .output()?;
    ensure!(output.status.success(), "gd op {args}: {}", String::from_utf8_lossy(&output.stderr));
    let written = candle_core::safetensors::load(dir.path().join("y.safetensors"), &Device::Cpu)?;
    Ok((written, serde_json::from_slice(&output.stdout)?))
}

/// As [`op`] for a call that must fail; the text on stderr.
fn refused(tensors: &BTreeMap<&str, Tensor>, args: &str) -> Result<String> {
    match op(tensors, args) {
        Ok(_) => bail!("gd op {args} succeeded"),
        Err(e) => Ok(e.to_string()),
    }
}

fn ints((tensors, _): &Answer, name: &str) -> Result<Vec<i32>> {
    Ok(tensors[name].flatten_all()?.to_vec1()?)
}

fn floats((tensors, _): &Answer, name: &str) -> Result<Vec<f32>> {
    Ok(tensors[name].to_dtype(DType::F32)?.flatten_all()?.to_vec1()?)
}

#[test]
fn scan_sorts_the_candidates_and_takes_every_flag() -> Result<()> {
    let x = problem()?;
    let answer = op(&x, "scan --k 4")?;
    assert_eq!(answer.0["index"].dims(), [1, 1, 2, 4]);
    assert_eq!(ints(&answer, "index")?, [0, 1, 2, 3, 1, 2, 0, 3]);
    assert_eq!(floats(&answer, "energy")?, [1.0, 4.0, 4.0, 81.0, 1.0, 1.0, 4.0, 36.0]);
    assert_eq!((&answer.1["queries"], &answer.1["abstained"]), (&2.into(), &0.into()));
    assert!(answer.1["plan"].as_str().is_some_and(|p| p.starts_with("cpu/")), "{}", answer.1);

    let certified = op(&x, "scan --k 4 --precision certified")?;
    assert_eq!(ints(&certified, "index")?, ints(&answer, "index")?);
    assert_eq!(floats(&certified, "energy")?, floats(&answer, "energy")?);
    assert!(certified.1["plan"].as_str().is_some_and(|p| p.contains("certified")), "{}", certified.1);

    assert_eq!(ints(&op(&x, "scan --k 2 --tie last")?, "index")?, [0, 2, 2, 1]);
    assert_eq!(ints(&op(&x, "scan --k 2 --mask causal")?, "index")?, [0, -1, 1, 0]);
    assert_eq!(ints(&op(&x, "scan --k 2 --mask window:1 --kv-offset 2")?, "index")?, [2, -1, 3, -1]);
    let none = op(&x, "scan --k 1 --mask causal --kv-offset -1")?;
    assert_eq!((ints(&none, "index")?, floats(&none, "energy")?), (vec![-1, 0], vec![INF, 4.0]));
    assert_eq!(none.1["abstained"], 1);
    assert_eq!(floats(&op(&x, "scan --k 1 --beta 0.5")?, "energy")?, [0.5, 0.5]);
    let dot = op(&x, "scan --k 1 --score dot")?;
    assert_eq!((ints(&dot, "index")?, floats(&dot, "energy")?), (vec![0, 3], vec![0.0, -27.0]));
    Ok(())
}

#[test]
fn scan_reads_every_optional_tensor() -> Result<()> {
    let cpu = &Device::Cpu;
    let with = |name: &'static str, t: Tensor| -> Result<BTreeMap<&str, Tensor>> {
        let mut x = problem()?;
        x.insert(name, t);
        Ok(x)
    };
    let prior = with("prior", Tensor::new(&[[[0.0f32, 0.0, 0.0, 80.0]]], cpu)?)?;
    let answer = op(&prior, "scan --k 1")?;
    assert_eq!((ints(&answer, "index")?, floats(&answer, "energy")?), (vec![0, 3], vec![1.0, -44.0]));
    let beta = with("beta", Tensor::new(&[2.0f32], cpu)?)?;
    assert_eq!(floats(&op(&beta, "scan --k 1")?, "energy")?, [2.0, 2.0]);
    let kv_len = with("kv_len", Tensor::new(&[1i32], cpu)?)?;
    assert_eq!(ints(&op(&kv_len, "scan --k 2")?, "index")?, [0, -1, 0, -1]);
    for boundaries in [Tensor::new(&[0i32, 1, 4], cpu)?, Tensor::new(&[[0i32, 1, 4]], cpu)?] {
        let packed = with("cu_seqlens", boundaries)?;
        assert_eq!(ints(&op(&packed, "scan --k 2")?, "index")?, [0, -1, 1, 2]);
    }
    let protected = op(&with("protected", Tensor::new(&[[3i32, -1]], cpu)?)?, "scan --k 1")?;
    assert_eq!(protected.0["index"].dims(), [1, 1, 2, 3]);
    assert!(ints(&protected, "index")?.contains(&3));
    assert_eq!(protected.0["protected"].dtype(), DType::U8);
    Ok(())
}

#[test]
fn half_precision_inputs_keep_their_dtype() -> Result<()> {
    for dtype in [DType::F16, DType::BF16, DType::F64] {
        let x: BTreeMap<_, _> =
            problem()?.into_iter().map(|(n, t)| Ok((n, t.to_dtype(dtype)?))).collect::<Result<_>>()?;
        let answer = op(&x, "scan --k 1")?;
        let energy = if dtype == DType::F64 { DType::F64 } else { DType::F32 };
        assert_eq!(answer.0["energy"].dtype(), energy);
        assert_eq!(ints(&answer, "index")?, [0, 1]);
        let answer = op(&x, "select --backward")?;
        for name in ["out", "dq", "dk", "dv"] {
            assert_eq!(answer.0[name].dtype(), dtype, "{name}");
        }
        assert_eq!(answer.0["dbeta"].dtype(), energy);
    }
    Ok(())
}

#[test]
fn select_returns_one_row_or_none_and_the_gradients() -> Result<()> {
    let mut x = problem()?;
    let answer = op(&x, "select --k 4 --threshold 2.5")?;
    assert_eq!(ints(&answer, "index")?, [0, 1]);
    assert_eq!(floats(&answer, "out")?, rows(&[10.0, 20.0])?.flatten_all()?.to_vec1::<f32>()?);
    assert_eq!(floats(&answer, "energy")?, [1.0, 1.0]);
    assert_eq!(ints(&answer, "candidate_index")?, [0, 1, 2, 3, 1, 2, 0, 3]);
    assert_eq!(answer.0["coherence"].dims(), [1, 1, 2]);

    let nothing = op(&x, "select --threshold 0.5")?;
    assert_eq!((ints(&nothing, "index")?, &nothing.1["abstained"]), (vec![-1, -1], &2.into()));
    assert!(floats(&nothing, "out")?.iter().all(|&y| y == 0.0));

    // Estimator `winner` without a gate: the whole gradient goes to the value row, none to the scores.
    x.insert("dout", rows(&[1.0, 5.0])?);
    let answer = op(&x, "select --estimator winner --backward")?;
    assert_eq!(floats(&answer, "dv")?, rows(&[1.0, 5.0, 0.0, 0.0])?.flatten_all()?.to_vec1::<f32>()?);
    for (name, like) in [("dq", "q"), ("dk", "k")] {
        assert_eq!(answer.0[name].dims(), x[like].dims());
        assert!(floats(&answer, name)?.iter().all(|&g| g == 0.0), "{name}");
    }
    let written: Vec<_> = ["dbeta", "dalpha"].iter().filter(|n| answer.0[**n].dims() == [1]).collect();
    assert_eq!(written.len(), 2);
    assert!(!answer.0.contains_key("dprior") && !answer.0.contains_key("dthreshold"));

    // Estimator `candidates`: the scores get the gradient of the softmax.
    let answer = op(&x, "select --k 4 --backward")?;
    let (energy, v, k) = ([1.0f64, 4.0, 4.0, 81.0], [10.0, 20.0, 30.0, 40.0], [1.0, 2.0, 2.0, 9.0]);
    let weights: Vec<f64> = energy.iter().map(|e| (-e).exp()).collect();
    let total: f64 = weights.iter().sum();
    let mean: f64 = weights.iter().zip(v).map(|(w, v)| w * v).sum::<f64>() / total;
    let dq: f64 = (0..4).map(|j| weights[j] / total * (v[j] - mean) * 2.0 * k[j]).sum();
    let got = f64::from(floats(&answer, "dq")?[0]);
    assert!((got - dq).abs() <= 1e-4 * dq.abs(), "dq {got}, expected {dq}");
    Ok(())
}

/// `[1, 1, rows, 8]` of numbers without a pattern in -1..1, times `scale`, plus `offset`.
fn noise(seed: u64, rows: usize, scale: f32, offset: f32) -> Result<Tensor> {
    let mut x = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let values: Vec<f32> = (0..rows * 8)
        .map(|_| {
            x ^= x << 13;
            x ^= x >> 7;
            x ^= x << 17;
            ((x >> 40) as f32 / (1u64 << 23) as f32 - 1.0) * scale + offset
        })
        .collect();
    Ok(Tensor::from_vec(values, (1, 1, rows, 8), &Device::Cpu)?)
}

#[test]
fn a_common_offset_of_queries_and_keys_changes_no_key() -> Result<()> {
    let x = BTreeMap::from([
        ("q", noise(1, 50, 1.0, 5000.0)?),
        ("k", noise(2, 80, 1.0, 5000.0)?),
        ("v", noise(3, 80, 1.0, 0.0)?),
    ]);
    let rows = |name: &str| -> Result<Vec<Vec<f64>>> {
        Ok(x[name].to_dtype(DType::F64)?.squeeze(0)?.squeeze(0)?.to_vec2()?)
    };
    let distance = |q: &[f64], k: &[f64]| q.iter().zip(k).map(|(q, k)| (q - k) * (q - k)).sum::<f64>();
    let (queries, keys) = (rows("q")?, rows("k")?);
    let nearest = |q: &Vec<f64>| {
        let all = keys.iter().map(|k| distance(q, k)).enumerate();
        all.min_by(|x, y| x.1.total_cmp(&y.1)).map_or(-1, |x| x.0 as i32)
    };
    let expected: Vec<i32> = queries.iter().map(nearest).collect();
    for args in ["select --k 1", "select --k 8", "select --precision certified"] {
        assert_eq!(ints(&op(&x, args)?, "index")?, expected, "{args}");
    }
    Ok(())
}

#[test]
fn energies_that_overflow_are_refused_or_counted() -> Result<()> {
    let x = BTreeMap::from([
        ("q", noise(1, 3, 1e19, 0.0)?),
        ("k", noise(2, 5, 1e19, 0.0)?),
        ("v", noise(3, 5, 1.0, 0.0)?),
    ]);
    for operator in ["scan", "select"] {
        let error = refused(&x, operator)?;
        assert!(
            error.contains("the energy of query q[0, 0, 0]") && error.contains("overflows f32"),
            "{error}"
        );
        let answer = op(&x, &format!("{operator} --checked false"))?;
        assert_eq!(answer.1["abstained"], 0);
        assert!(answer.1["overflowed"].as_u64() > Some(0), "{}", answer.1);
    }
    Ok(())
}

#[test]
fn values_and_gradients_that_are_not_finite_are_named() -> Result<()> {
    let nan = |t: Tensor| -> Result<Tensor> { Ok((t * f64::NAN)?) };
    let mut x = problem()?;
    x.insert("dout", nan(rows(&[1.0, 1.0])?)?);
    let error = refused(&x, "select --backward")?;
    assert!(error.contains("dout[0, 0, 0, 0] is NaN, not finite"), "{error}");
    op(&x, "select --backward --checked false")?;
    // Key 3 is selected by no query, but its value row enters the gradients.
    let mut x = problem()?;
    let v = x["v"].clone();
    x.insert("v", Tensor::cat(&[v.narrow(2, 0, 3)?, nan(v.narrow(2, 3, 1)?)?], 2)?);
    op(&x, "select --k 4")?;
    for args in ["select --k 4 --backward", "select --k 4 --hardness 0.5"] {
        let error = refused(&x, args)?;
        assert!(error.contains("v[0, 0, 3, 0] is NaN, not finite"), "{args}: {error}");
    }
    x.insert("v", nan(v)?);
    assert!(refused(&x, "select")?.contains("v[0, 0, 0, 0] is NaN"));
    Ok(())
}

#[test]
fn offsets_near_the_ends_of_64_bits_do_not_wrap() -> Result<()> {
    let x = problem()?;
    for (args, visible) in [
        ("scan --k 4 --mask causal --kv-offset 9223372036854775807", 8),
        ("scan --k 4 --mask window:2 --kv-offset 9223372036854775807", 0),
        ("scan --k 4 --mask causal --kv-offset -9223372036854775808", 0),
    ] {
        let index = ints(&op(&x, args)?, "index")?;
        assert_eq!(index.iter().filter(|j| **j >= 0).count(), visible, "{args}");
    }
    Ok(())
}
