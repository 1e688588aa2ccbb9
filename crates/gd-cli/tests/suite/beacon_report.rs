//! `gd beacon-report` on the recorded run of the public demo, on small examples with hand-computed metrics, and on
//! invalid files.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use candle_core::safetensors::{load, save};
use candle_core::{DType, Device, Tensor};
use serde_json::{Value, json};

use crate::program::{gd, json};

const CPU: Device = Device::Cpu;

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/fixtures/beacon").join(name)
}

#[test]
fn the_recorded_run_is_reproduced() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let (data, params) = (fixture("rescue-first.safetensors"), fixture("rescue-first.json"));
    let args =
        format!("beacon-report --in {} --params {} --out y.safetensors", data.display(), params.display());
    let report = json(dir.path(), &format!("{args} --figure gamma.svg --json"))?;
    let recorded: Value = serde_json::from_str(&fs::read_to_string(&params)?)?;
    let metrics = recorded["metrics"].as_object().context("metrics")?;
    ensure!(metrics.len() == 26 && report.as_object().map(|m| m.len()) == Some(26), "{report}");
    for (name, expected) in metrics {
        let (actual, expected) =
            (report[name].as_f64().context(name.clone())?, expected.as_f64().unwrap_or(f64::NAN));
        ensure!(
            (actual - expected).abs() <= 1e-12 * (1.0 + expected.abs()),
            "{name}: {actual}, recorded {expected}"
        );
    }
    let (recorded, written) = (load(&data, &CPU)?, load(dir.path().join("y.safetensors"), &CPU)?);
    ensure!(written.len() == 3);
    let wide = |t: &Tensor| t.to_dtype(DType::F64)?.flatten_all()?.to_vec1::<f64>();
    for (name, bound) in [("protected_logits", 1e-9), ("activated", 0.0), ("selected", 0.0)] {
        let (a, b) = (wide(&written[name])?, wide(&recorded[name])?);
        ensure!(written[name].dims() == recorded[name].dims() && a.len() == b.len(), "{name}");
        let max_error = a.iter().zip(&b).map(|(a, b)| (a - b).abs()).fold(0.0, f64::max);
        ensure!(max_error <= bound, "{name}: {max_error}");
    }
    ensure!(wide(&recorded["activated"])?.iter().sum::<f64>() > 0.0);
    let figure = fs::read_to_string(dir.path().join("gamma.svg"))?;
    ensure!(figure.contains("900 rows") && figure.contains("after"), "{figure}");
    let table = String::from_utf8(gd(dir.path(), &args)?.stdout)?;
    ensure!(table.contains("rescue_rate") && table.contains("-10.688911"), "{table}");
    Ok(())
}

/// Writes a file with three classes, of which the last is the minority, and the candidate that represents all classes.
fn rows(dir: &Path, raw: &[[f32; 4]], labels: &[i64], params: &Value) -> Result<String> {
    let tensors = [
        ("raw_logits", Tensor::from_vec(raw.concat(), (raw.len(), 4), &CPU)?),
        ("label", Tensor::new(labels, &CPU)?),
    ];
    save(&tensors.into_iter().map(|(name, t)| (name.to_owned(), t)).collect(), dir.join("x.safetensors"))?;
    fs::write(dir.join("p.json"), params.to_string())?;
    Ok("beacon-report --in x.safetensors --params p.json".into())
}

fn params() -> Value {
    // The short names at the top level. A candidate within 1 of the highest score is raised above it.
    json!({ "floor": 0.2, "margin": 1.0, "strength": 2.0, "entropy": 0.9, "slack": 0.0, "minority_index": 2 })
}

#[test]
fn metrics_count_rescues_and_false_rescues() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let raw = [
        // Rows of the minority: 0.5 below the highest score and raised to 0.5 above it; 5 below; already the highest.
        [0.5, 0.4, 0.0, 0.4],
        [5.0, 0.0, 0.0, 0.0],
        [0.0, 0.0, 3.0, 0.0],
        // Rows of other classes: the minority candidate is raised above the correct one; it is far below.
        [0.5, 0.4, 0.0, 0.4],
        [0.0, 4.0, 0.0, 0.0],
        // The highest score is that of the candidate for all classes, which counts as the first class.
        [0.0, 0.0, -3.0, 4.0],
    ];
    let args = rows(dir.path(), &raw, &[2, 2, 2, 0, 1, 0], &params())?;
    let report = json(dir.path(), &format!("{args} --json"))?;
    let third = 1.0 / 3.0;
    for (name, expected) in [
        ("baseline_acc", 4.0 / 6.0),
        ("proposed_acc", 4.0 / 6.0),
        ("baseline_minority_acc", third),
        ("proposed_minority_acc", 2.0 * third),
        ("delta_collapse", -third),
        ("rescue_rate", third),
        ("false_rescue_rate", 0.0),
        ("barrier_activation_rate", 2.0 / 6.0),
        ("barrier_activation_on_minority", third),
        ("baseline_bal_acc", (third + 1.0 + 1.0) / 3.0),
        ("proposed_bal_acc", (2.0 * third + 0.5 + 1.0) / 3.0),
        ("baseline_minority_top2", 2.0 * third),
        ("gamma_delta_minority", third),
    ] {
        let actual = report[name].as_f64().context(name)?;
        ensure!((actual - expected).abs() < 1e-6, "{name}: {actual}, {expected} expected");
    }
    // Without rows of the minority its metrics are undefined.
    let args = rows(dir.path(), &raw, &[0, 0, 0, 0, 1, 0], &params())?;
    let report = json(dir.path(), &format!("{args} --json"))?;
    ensure!(report["rescue_rate"].is_null() && report["baseline_acc"].is_f64(), "{report}");
    ensure!(String::from_utf8(gd(dir.path(), &args)?.stdout)?.contains("no row"));
    Ok(())
}

#[test]
fn invalid_inputs_are_errors_that_name_them() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let dir = dir.path();
    let refused = |args: &str, words: &[&str]| -> Result<()> {
        let out = gd(dir, &format!("{args} --out y.safetensors"))?;
        let text = String::from_utf8_lossy(&out.stderr).into_owned();
        ensure!(matches!(out.status.code(), Some(1 | 2)) && text.lines().count() == 1, "{args}: {text}");
        ensure!(words.iter().all(|w| text.contains(w)), "{words:?}: {text}");
        ensure!(!dir.join("y.safetensors").exists());
        Ok(())
    };
    let good = [[0.0, 1.0, 2.0, 3.0], [0.0, 0.0, 0.0, 0.0]];
    let with = |key: &str, value: Value| {
        let mut params = params();
        params[key] = value;
        params
    };
    refused(&rows(dir, &good, &[0, 3], &params())?, &["label 3 of row 1", "3 classes"])?;
    refused(&rows(dir, &good, &[0, -1], &params())?, &["label -1 of row 1"])?;
    refused(&rows(dir, &good, &[0, 1, 2], &params())?, &["x.safetensors", "[2, 4]", "[3]"])?;
    let nan = [[0.0, f32::NAN, 0.0, 0.0], [0.0; 4]];
    refused(&rows(dir, &nan, &[0, 1], &params())?, &["NaN of row 0, candidate 1"])?;
    refused(&rows(dir, &good, &[0, 1], &with("minority_index", json!(3)))?, &["minority_index 3"])?;
    refused(&rows(dir, &good, &[0, 1], &with("minority_index", json!("x")))?, &["p.json", "minority_index"])?;
    refused(&rows(dir, &good, &[0, 1], &with("floor", json!(1.0)))?, &["floor 1"])?;
    refused(&rows(dir, &good, &[0, 1], &with("detect_floor", json!(-1.0)))?, &["detect floor -1"])?;
    let mut short = params();
    short.as_object_mut().map(|params| params.remove("margin"));
    refused(&rows(dir, &good, &[0, 1], &short)?, &["p.json", "margin"])?;
    refused("beacon-report --in x.safetensors --params nowhere.json", &["nowhere.json"])?;
    refused("beacon-report --in nowhere.safetensors --params p.json", &["nowhere.safetensors"])?;
    fs::write(dir.join("cut.safetensors"), [1, 2, 3])?;
    refused(
        "beacon-report --in cut.safetensors --params p.json",
        &["cut.safetensors: truncated", "8 bytes", "3 are there"],
    )?;
    Ok(())
}
