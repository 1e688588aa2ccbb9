//! Every case of `fixtures/mechanisms` against its reference values, and the command `gd op attend`.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};
use candle_core::{DType, Device, Tensor};
use gd_cli::commands::op::attend::attend;
use gd_layer::mechanisms::{AttentionMechanism, TABLE};
use gd_model::config::Mechanism;
use gd_model::io::safetensors::{self, Tensors};
use gd_testing::log_cases;
use serde_json::{Value, json};

use crate::program::{self, SAMPLE, SMALL, parsed};

/// The mechanisms whose weights are 0 exactly where a choice makes them so.
const CHOOSING: [&str; 3] = ["topk", "explicit_sparse", "hard"];
/// Single rows of scores, some of which f32 cannot represent.
const ROWS: &str = "rows";
/// The case of hard decoding, which the JSON file does not list.
const HARD: &str = "hard";
/// Mechanisms that are compared with a quadratic form instead, in the tests of gd-layer.
const WITHOUT_REFERENCE: [&str; 2] = ["linear", "sliding_window"];

fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/mechanisms")
}

/// A file of reference values.
struct Reference {
    name: &'static str,
    tensors: Tensors,
    file: Value,
}

impl Reference {
    fn load(name: &'static str) -> Result<Self> {
        let text = fs::read_to_string(folder().join(format!("{name}.json"))).context(name)?;
        let tensors = safetensors::load(&folder().join(format!("{name}.safetensors")), &Device::Cpu)?;
        Ok(Self { name, tensors, file: serde_json::from_str(&text)? })
    }

    fn cases(&self) -> Result<Vec<String>> {
        let mut cases: Vec<String> =
            self.file["cases"].as_object().context("no cases")?.keys().cloned().collect();
        for (tensor, case) in [("rows.z", ROWS), ("hard.t", HARD)] {
            if self.tensors.contains_key(tensor) {
                cases.push(case.into());
            }
        }
        Ok(cases)
    }

    /// Whether a tensor is read, not written: its name is that of an input, after the prefix of a case.
    fn is_input(&self, full: &str) -> Result<bool> {
        let info = AttentionMechanism::named(self.name).context(self.name)?.info();
        let inputs = info.inputs.iter().chain(info.learned).chain(info.constants).map(|(name, _)| *name);
        let inputs: BTreeSet<&str> = inputs.chain(["dout", "rows.z", "rows.dp"]).collect();
        let cases = self.cases()?;
        let prefixes = cases.iter().flat_map(|case| {
            case.match_indices('.').map(|(at, _)| case[..=at].to_owned()).chain([format!("{case}.")])
        });
        let bare = prefixes.filter_map(|prefix| full.strip_prefix(&prefix).map(str::to_owned));
        Ok(full.starts_with("mask.") || bare.chain([full.to_owned()]).any(|name| inputs.contains(&*name)))
    }

    /// Runs all cases in this dtype, compares every tensor that a case returns with the file, and returns how many
    /// cases ran. `tolerance` holds for outputs absolutely, for gradients and energies relative
    /// to the largest entry above 1.
    fn check(&self, dtype: DType, tolerance: f64) -> Result<usize> {
        let cast = |t: &Tensor| if t.dtype() == DType::F64 { t.to_dtype(dtype) } else { Ok(t.clone()) };
        let inputs: Tensors =
            self.tensors.iter().map(|(name, t)| Ok((name.clone(), cast(t)?))).collect::<Result<_>>()?;
        let (mut written, mut ran) = (BTreeSet::new(), 0);
        for case in self.cases()? {
            if case == ROWS && dtype != DType::F64 {
                continue;
            }
            let results = attend(self.name, &case, &inputs, &self.file, true)
                .with_context(|| format!("{} {case} in {dtype:?}", self.name))?;
            for (name, result) in &results {
                let Some(expected) = self.tensors.get(name) else { continue };
                self.compare(name, result, expected, dtype, tolerance)?;
                written.insert(name.clone());
            }
            ran += 1;
        }
        for name in self.tensors.keys().filter(|name| dtype == DType::F64 || !name.starts_with("rows.")) {
            ensure!(written.contains(name) || self.is_input(name)?, "{}: {name} was not computed", self.name);
        }
        Ok(ran)
    }

    fn compare(
        &self,
        name: &str,
        result: &Tensor,
        expected: &Tensor,
        dtype: DType,
        tolerance: f64,
    ) -> Result<()> {
        let at = || format!("{}: {name} in {dtype:?}", self.name);
        ensure!(result.dims() == expected.dims(), "{}: {:?}, not {:?}", at(), result.dims(), expected.dims());
        let expected_dtype = if expected.dtype() == DType::F64 { dtype } else { expected.dtype() };
        ensure!(result.dtype() == expected_dtype, "{}: {:?}", at(), result.dtype());
        let [result, expected] =
            [result, expected].map(|t| t.to_dtype(DType::F64)?.flatten_all()?.to_vec1::<f64>());
        let (result, expected) = (result?, expected?);
        let last = name.rsplit('.').next().unwrap_or(name);
        let is_gradient = last.len() > 1 && last.starts_with('d') || name.starts_with("rows.d");
        let largest = expected.iter().fold(0f64, |most, x| most.max(x.abs()));
        let tolerance = match expected_dtype == dtype {
            // Energies are sums over all tokens; f32 has a spacing of 1.5e-5 near 200.
            true if is_gradient || last.starts_with("E_") => tolerance * largest.max(1.0),
            true => tolerance,
            false => 0.0,
        };
        for (i, (x, y)) in result.iter().zip(&expected).enumerate() {
            ensure!((x - y).abs() <= tolerance, "{} at {i}: {x}, not {y} (within {tolerance:e})", at());
            let chosen = CHOOSING.contains(&self.name) && last == "weights";
            ensure!(!chosen || (*x == 0.0) == (*y == 0.0), "{} at {i}: another choice", at());
        }
        Ok(())
    }
}

#[test]
fn every_case_of_every_mechanism_has_its_reference_values() -> Result<()> {
    let mut files: BTreeSet<String> = fs::read_dir(folder())?
        .map(|entry| Ok(entry?.path().file_stem().context("no name")?.to_string_lossy().into_owned()))
        .collect::<Result<_>>()?;
    files.remove("README");
    let mut ran = 0;
    for &(name, _) in TABLE.iter().filter(|(name, _)| !WITHOUT_REFERENCE.contains(name)) {
        ensure!(files.remove(name), "{name} has no reference values");
        let reference = Reference::load(name)?;
        ran += reference.check(DType::F64, 1e-10)? + reference.check(DType::F32, 1e-5)?;
    }
    ensure!(files.is_empty(), "{files:?} belong to no mechanism");
    log_cases("mechanisms", ran);
    Ok(())
}

fn gd(args: &[&str]) -> Result<std::process::Output> {
    Ok(Command::new(env!("CARGO_BIN_EXE_gd")).arg("op").arg("attend").args(args).output()?)
}

#[test]
fn the_command_writes_the_case_of_a_file() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let out = dir.path().join("y.safetensors");
    let (input, params) = (folder().join("topk.safetensors"), folder().join("topk.json"));
    let paths = [&input, &params, &out].map(|path| path.to_str().context("a path"));
    let [input, params, out] = paths;
    let (input, params, out) = (input?, params?, out?);
    let args = ["--mechanism", "topk", "--in", input, "--params", params, "--out", out, "--case"];
    let output = gd(&[&args[..], &["ties.causal", "--backward", "--json"]].concat())?;
    ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let summary: Value = serde_json::from_slice(&output.stdout)?;
    assert_eq!(summary["tensors"]["ties.causal.dq"]["dtype"], "F64");
    let (written, reference) = (safetensors::load(Path::new(out), &Device::Cpu)?, Reference::load("topk")?);
    for name in ["weights", "out", "dq", "dk", "dv"].map(|name| format!("ties.causal.{name}")) {
        reference.compare(&name, &written[&name], &reference.tensors[&name], DType::F64, 1e-10)?;
    }
    // Without --backward there are no gradients, and a case that does not exist is an error that names the others.
    ensure!(gd(&[&args[..], &["none"]].concat())?.status.success());
    ensure!(!safetensors::load(Path::new(out), &Device::Cpu)?.contains_key("none.dq"));
    let failed = gd(&[&args[..], &["other"]].concat())?;
    let message = String::from_utf8_lossy(&failed.stderr).into_owned();
    assert_eq!(failed.status.code(), Some(1), "{message}");
    assert!(message.contains("\"other\"") && message.contains("ties.causal"), "{message}");
    Ok(())
}

#[test]
fn every_mechanism_is_listed_with_its_stages_parameters_and_source() -> Result<()> {
    let output = gd(&["--list", "--json"])?;
    let listed: Vec<Value> = serde_json::from_slice(&output.stdout)?;
    assert_eq!(listed.len(), TABLE.len());
    for (entry, &(name, info)) in listed.iter().zip(TABLE) {
        assert_eq!(entry["name"], name);
        for key in ["formula", "stages", "source", "memory"] {
            assert!(entry[key].as_str().is_some_and(|text| !text.is_empty()), "{name}: no {key}");
        }
        assert_eq!(entry["parameters"].as_object().map(|p| p.len()), Some(info.parameters.len()), "{name}");
    }
    let text = String::from_utf8(gd(&["--list"])?.stdout)?;
    assert!(TABLE.iter().all(|(name, info)| text.contains(name) && text.contains(info.source)), "{text}");
    Ok(())
}

#[test]
fn the_documentation_describes_every_mechanism() -> Result<()> {
    let page = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../docs/src/mechanisms.md");
    let page = fs::read_to_string(page)?;
    for (name, _) in TABLE {
        ensure!(page.contains(&format!("\n| `{name}` |")), "docs/src/mechanisms.md has no row `{name}`");
    }
    Ok(())
}

#[test]
fn a_model_with_every_mechanism_trains_resumes_evaluates_and_generates() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let dir = dir.path();
    fs::write(dir.join("text.txt"), SAMPLE.chars().take(6_000).collect::<String>())?;
    // One layer per mechanism.
    let mechanisms: Vec<Value> = Mechanism::names()
        .iter()
        .map(|&name| if name == "topk" { json!({"name": name, "k": 3}) } else { json!(name) })
        .collect();
    let mut recipe: Value = serde_json::from_str(SMALL)?;
    recipe["model"]["num_hidden_layers"] = json!(mechanisms.len());
    recipe["model"]["gd"] =
        json!({ "mechanism": mechanisms, "qk_norm": true, "select": { "candidates": 4 } });
    recipe["train"]["steps"] = json!(6);
    recipe["train"]["eval_every"] = json!(3);
    fs::write(dir.join("c.json"), recipe.to_string())?;
    let start = "train --config c.json --data text.txt --seed 3 --json --out";
    let whole = parsed(&program::gd(dir, &format!("{start} whole"))?)?;
    assert!(whole["loss"].as_f64().is_some_and(f64::is_finite), "{whole}");
    parsed(&program::gd(dir, &format!("{start} split --stop-after 2"))?)?;
    parsed(&program::gd(dir, "train --resume split --json")?)?;
    for file in ["model.safetensors", "config.json"] {
        assert!(
            fs::read(dir.join("whole").join(file))? == fs::read(dir.join("split").join(file))?,
            "{file} differs"
        );
    }
    let config: Value = serde_json::from_slice(&fs::read(dir.join("whole/config.json"))?)?;
    assert_eq!(config["gd"]["mechanism"], json!(mechanisms));
    let eval = parsed(&program::gd(dir, "eval whole --data text.txt --json")?)?;
    assert!(eval["loss"].as_f64().is_some_and(f64::is_finite), "{eval}");
    let text = parsed(&program::gd(dir, "generate whole --prompt It --max-tokens 6 --json")?)?;
    assert!(text.to_string().len() > 20, "{text}");
    // The learned parameters of the mechanisms are in the file.
    let saved = safetensors::load(&dir.join("whole/model.safetensors"), &Device::Cpu)?;
    for parameter in ["s", "t", "b", "lq1", "gw"] {
        let end = format!("self_attn.mechanism.{parameter}");
        assert!(saved.keys().any(|name| name.ends_with(&end)), "no {end}");
    }
    Ok(())
}
