//! `gd landscape` compared with `gd op`, and on invalid files and flags.

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::{Context, Result, ensure};
use candle_core::{DType, Device, Tensor};
use serde_json::Value;

use crate::program::gd;

const CPU: Device = Device::Cpu;
/// The sizes B, Hq, Hk, N, M, D.
const SHAPE: [usize; 6] = [2, 4, 2, 3, 7, 8];

fn answer(dir: &Path, args: &str) -> Result<Value> {
    let out = gd(dir, &format!("{args} --json"))?;
    ensure!(out.status.success(), "{args}: {}", String::from_utf8_lossy(&out.stderr));
    Ok(serde_json::from_slice(&out.stdout)?)
}

/// Deterministic values without a visible pattern.
fn values(n: usize, seed: usize) -> Vec<f32> {
    (0..n).map(|i| ((i * 7919 + seed * 104_729) as f32 * 0.37).sin() * 1.3).collect()
}

fn problem() -> Result<BTreeMap<&'static str, Tensor>> {
    let [b, hq, hk, n, m, d] = SHAPE;
    Ok(BTreeMap::from([
        ("q", Tensor::from_vec(values(b * hq * n * d, 1), (b, hq, n, d), &CPU)?),
        ("k", Tensor::from_vec(values(b * hk * m * d, 2), (b, hk, m, d), &CPU)?),
        ("v", Tensor::from_vec(values(b * hk * m * d, 3), (b, hk, m, d), &CPU)?),
        ("prior", Tensor::from_vec(values(b * hk * m, 4), (b, hk, m), &CPU)?),
        ("beta", Tensor::new(&[0.1f32, 0.3, 1.0, 2.5], &CPU)?),
        ("alpha", Tensor::new(&[0.5f32, 0.3, 0.8, 0.55], &CPU)?),
    ]))
}

fn save(dir: &Path, tensors: &BTreeMap<&str, Tensor>) -> Result<()> {
    Ok(safetensors::serialize_to_file(tensors, None, &dir.join("x.safetensors"))?)
}

#[test]
fn the_winner_and_its_numbers_are_those_of_the_operator() -> Result<()> {
    let dir = tempfile::tempdir()?;
    save(dir.path(), &problem()?)?;
    let [b, hq, hk, n, m, d] = SHAPE;
    let mask = "--mask causal --kv-offset 3";
    let mut keys = Vec::new();
    for mode in ["global", "passage"] {
        answer(
            dir.path(),
            &format!("op select --in x.safetensors --out y.safetensors --k 4 --coherence-mode {mode} {mask}"),
        )?;
        let selected = candle_core::safetensors::load(dir.path().join("y.safetensors"), &CPU)?;
        let flat = |name: &str| selected[name].to_dtype(DType::F64)?.flatten_all()?.to_vec1::<f64>();
        let (index, energy, margin, coherence) =
            (flat("index")?, flat("energy")?, flat("margin")?, flat("coherence")?);
        let problem = problem()?;
        let wide = |name: &str| problem[name].to_dtype(DType::F64)?.flatten_all()?.to_vec1::<f64>();
        let (q, k) = (wide("q")?, wide("k")?);
        for row in 0..b * hq * n {
            let (batch, head, query) = (row / (hq * n), row / n % hq, row % n);
            let args =
                format!("landscape --in x.safetensors --batch {batch} --head {head} --query {query} {mask}");
            let report = answer(dir.path(), &args)?;
            let (winner, runner_up) = (&report["winner"], &report["runner_up"]);
            let number = |from: &Value, name: &str| from[name].as_f64().context(format!("{name}: {report}"));
            ensure!(number(winner, "key")? == index[row], "row {row}: {report}, the operator {}", index[row]);
            ensure!(report["keys"] == query + 4, "{report}");
            let near = |name: &str, a: f64, b: f64| -> Result<()> {
                ensure!((a - b).abs() <= 2e-5 * (1.0 + b.abs()), "row {row}: {name} {a}, {b} expected");
                Ok(())
            };
            near("energy", number(winner, "energy")?, energy[row])?;
            near("margin", number(runner_up, "energy")? - number(winner, "energy")?, margin[row])?;
            near("u*", number(&winner[mode], "u")?, coherence[row])?;
            // The length, and the energy at the coherence point from its formula.
            let j = index[row] as usize;
            let key = &k[((batch * hk + head / (hq / hk)) * m + j) * d..][..d];
            let squared: f64 = q[row * d..][..d].iter().zip(key).map(|(q, k)| (q - k) * (q - k)).sum();
            let (alpha, beta) = (number(&report, "alpha")?, number(&report, "beta")?);
            near("L", number(winner, "L")?, squared.sqrt())?;
            near("t", number(winner, "t")?, beta * squared)?;
            let (u, t) = (number(&winner[mode], "u")?, beta * squared);
            let phi = -(alpha * (-t * u * u).exp() + (1.0 - alpha) * (-t * (1.0 - u) * (1.0 - u)).exp()).ln();
            near("E*", number(&winner[mode], "E")?, phi)?;
            keys.push(j);
        }
    }
    keys.sort_unstable();
    keys.dedup();
    ensure!(keys.len() > 2, "only the keys {keys:?} are selected");
    Ok(())
}

#[test]
fn the_file_name_selects_the_format_of_the_figure() -> Result<()> {
    let dir = tempfile::tempdir()?;
    save(dir.path(), &problem()?)?;
    let report = answer(dir.path(), "landscape --in x.safetensors --keys 5,2 --out z.svg --head 2")?;
    ensure!(report["plane"]["keys"] == serde_json::json!([5, 2]) && report["query"] == 2, "{report}");
    let svg = std::fs::read_to_string(dir.path().join("z.svg"))?;
    for word in ["key 5", "key 2", "winner", "runner-up", "coherence point", "Query 2 of head 2"] {
        ensure!(svg.contains(word), "{word} is not in the figure");
    }
    let out = gd(dir.path(), "landscape --in x.safetensors --out z.png")?;
    let text = String::from_utf8(out.stdout)?;
    ensure!(out.status.success() && text.contains("runner-up") && text.contains("saved z.png"), "{text}");
    ensure!(std::fs::read(dir.path().join("z.png"))?.starts_with(b"\x89PNG\r\n\x1a\n"));
    Ok(())
}

#[test]
fn one_key_one_dimension_and_equal_points_have_a_figure() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let rows = |values: &[f32], d: usize| Tensor::from_slice(values, (1, 1, values.len() / d, d), &CPU);
    let figure = |q: &[f32], k: &[f32], d: usize| -> Result<Value> {
        save(dir.path(), &BTreeMap::from([("q", rows(q, d)?), ("k", rows(k, d)?)]))?;
        let report = answer(dir.path(), "landscape --in x.safetensors --out z.svg")?;
        ensure!(std::fs::read_to_string(dir.path().join("z.svg"))?.ends_with("</svg>\n"));
        Ok(report)
    };
    let report = figure(&[0.0, 1.0], &[2.0, 1.0], 2)?;
    ensure!(report["runner_up"].is_null() && report["plane"]["keys"] == serde_json::json!([0]), "{report}");
    let report = figure(&[3.0], &[2.0, 5.0], 1)?;
    ensure!(report["plane"].is_null() && report["winner"]["key"] == 0, "{report}");
    let report = figure(&[3.0, 4.0], &[9.0, 9.0, 3.0, 4.0], 2)?;
    ensure!(report["winner"]["key"] == 1 && report["winner"]["L"] == 0.0, "{report}");
    Ok(())
}

#[test]
fn invalid_inputs_are_errors_that_name_them() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let dir = dir.path();
    let refused = |args: &str, code: i32, words: &[&str]| -> Result<()> {
        let out = gd(dir, &format!("landscape --in x.safetensors --out z.svg {args}"))?;
        let text = String::from_utf8_lossy(&out.stderr).into_owned();
        ensure!(out.status.code() == Some(code) && text.lines().count() == 1, "{args}: {text}");
        ensure!(words.iter().all(|w| text.contains(w)), "{words:?}: {text}");
        ensure!(!dir.join("z.svg").exists(), "{args} wrote a figure");
        Ok(())
    };
    save(dir, &problem()?)?;
    refused("--query 3", 2, &["--query 3", "has 3"])?;
    refused("--head 4", 2, &["--head 4"])?;
    refused("--batch 2", 2, &["--batch 2"])?;
    refused("--keys 1,1", 2, &["key 1 is given twice"])?;
    refused("--keys 1,7", 2, &["does not see key 7"])?;
    refused("--keys 1", 2, &["1 given, two expected"])?;
    refused("--keys 1,2,3", 2, &["3 given"])?;
    refused("--query 0 --mask causal --keys 0,1", 2, &["does not see key 1"])?;
    refused("--mask causal --kv-offset -9", 1, &["query 2 of head 0", "sees no key"])?;
    refused("--beta 2", 2, &["--beta 2", "already"])?;
    refused("--alpha 1", 2, &["--alpha"])?;
    let with = |name: &'static str, tensor: Tensor| -> Result<()> {
        let mut problem = problem()?;
        problem.insert(name, tensor);
        save(dir, &problem)
    };
    let mut q = values(2 * 4 * 3 * 8, 1);
    q[2 * 8 + 5] = f32::NAN;
    with("q", Tensor::from_vec(q, (2, 4, 3, 8), &CPU)?)?;
    refused("", 1, &["query 2 of head 0", "coordinate 5 of the query is NaN"])?;
    ensure!(gd(dir, "landscape --in x.safetensors --query 1 --out other.svg")?.status.success());
    with("k", Tensor::zeros((2, 2, 7, 16), DType::F32, &CPU)?)?;
    refused("", 1, &["[2, 4, 3, 8]", "[2, 2, 7, 16]"])?;
    with("k", Tensor::zeros((2, 3, 7, 8), DType::F32, &CPU)?)?;
    refused("", 1, &["multiple"])?;
    with("k", Tensor::zeros((2, 2, 0, 8), DType::F32, &CPU)?)?;
    refused("", 1, &["prior", "[2, 2, 7]"])?;
    with("prior", Tensor::zeros((2, 2, 6), DType::F32, &CPU)?)?;
    refused("", 1, &["prior", "[2, 2, 6]"])?;
    with("alpha", Tensor::new(&[0f32, 0.5, 0.5, 0.5], &CPU)?)?;
    refused("", 1, &["alpha 0"])?;
    with("kv_len", Tensor::new(&[7i32, 8], &CPU)?)?;
    refused("", 1, &["8", "7 keys"])?;
    std::fs::write(dir.join("x.safetensors"), b"cut")?;
    refused("", 1, &["x.safetensors: truncated", "8 bytes", "3 are there"])?;
    Ok(())
}
