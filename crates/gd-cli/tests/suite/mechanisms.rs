//! Every case of the reference values of mechanisms, by the command `gd op attend`.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};
use candle_core::{DType, Device, Tensor};
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
/// Mechanisms that are compared with a quadratic form instead, in the tests of gd-layer.
const WITHOUT_REFERENCE: [&str; 2] = ["linear", "sliding_window"];
/// What the command runs beside mechanisms, with the tensors that it reads.
const BESIDE: [(&str, &[&str]); 2] =
    [("max_margin", &["keys", "opt", "p"]), ("reject", &["p", "loss", "aux", "g", "conf", "err"])];

/// A file of reference values.
struct Reference {
    name: &'static str,
    path: PathBuf,
    tensors: Tensors,
    file: Value,
}

impl Reference {
    fn load(name: &'static str) -> Result<Self> {
        let beside = BESIDE.iter().any(|(beside, _)| *beside == name);
        let package = if beside { "gd-model" } else { "gd-cli" };
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("..").join(package);
        let path = folder.join("tests/fixtures/mechanisms").join(name);
        let text = fs::read_to_string(path.with_extension("json")).context(name)?;
        let tensors = safetensors::load(&path.with_extension("safetensors"), &Device::Cpu)?;
        Ok(Self { name, path, tensors, file: serde_json::from_str(&text)? })
    }

    /// The cases of the JSON file, and those that tensors alone have: rows of scores, hard decoding, rules of rejection.
    fn cases(&self) -> Result<BTreeSet<String>> {
        let mut cases: BTreeSet<String> =
            self.file["cases"].as_object().context("no cases")?.keys().cloned().collect();
        for tensor in ["rows.z", "hard.t"].into_iter().filter(|tensor| self.tensors.contains_key(*tensor)) {
            cases.extend(tensor.split_once('.').map(|(case, _)| case.to_owned()));
        }
        if self.name == "reject" {
            let case = |tensor: &String| tensor.rsplit_once('.').map(|(case, _)| case.to_owned());
            cases.extend(self.tensors.keys().filter_map(case));
        }
        Ok(cases)
    }

    /// The names of the tensors that are read.
    fn inputs(&self) -> Vec<&'static str> {
        if let Some((_, inputs)) = BESIDE.iter().find(|(name, _)| *name == self.name) {
            return inputs.to_vec();
        }
        let info = AttentionMechanism::named(self.name).map(|mechanism| mechanism.info()).expect(self.name);
        let tensors = info.inputs.iter().chain(info.learned).chain(info.constants).map(|(name, _)| *name);
        tensors.chain(["dout", "rows.z", "rows.dp"]).collect()
    }

    /// Whether a tensor is read, not written: its name is that of an input, after the prefix of a case.
    fn is_input(&self, full: &str) -> Result<bool> {
        let (inputs, cases) = (self.inputs(), self.cases()?);
        let prefixes = cases.iter().flat_map(|case| {
            case.match_indices('.').map(|(at, _)| case[..=at].to_owned()).chain([format!("{case}.")])
        });
        let bare = prefixes.filter_map(|prefix| full.strip_prefix(&prefix).map(str::to_owned));
        Ok(full.starts_with("mask.") || bare.chain([full.to_owned()]).any(|name| inputs.contains(&&*name)))
    }

    /// Runs all cases in this dtype, compares every tensor that the command writes with the file, and returns how many
    /// cases ran. `tolerance` holds for outputs absolutely, for gradients and energies relative
    /// to the largest entry above 1.
    fn check(&self, dtype: DType, tolerance: f64) -> Result<usize> {
        let cast = |t: &Tensor| if t.dtype() == DType::F64 { t.to_dtype(dtype) } else { Ok(t.clone()) };
        let inputs: Tensors =
            self.tensors.iter().map(|(name, t)| Ok((name.clone(), cast(t)?))).collect::<Result<_>>()?;
        let dir = tempfile::tempdir()?;
        let input = match dtype {
            DType::F64 => self.path.with_extension("safetensors"),
            _ => dir.path().join("x.safetensors"),
        };
        if dtype != DType::F64 {
            safetensors::write(&input, &inputs)?;
        }
        let (mut written, mut ran) = (BTreeSet::new(), 0);
        for case in self.cases()?.iter().filter(|case| *case != ROWS || dtype == DType::F64) {
            for (name, result) in &self.run(&input, case, &["--backward"])? {
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

    /// The tensors that the command writes for a case.
    fn run(&self, input: &Path, case: &str, flags: &[&str]) -> Result<Tensors> {
        let dir = tempfile::tempdir()?;
        let out = dir.path().join("y.safetensors");
        let mut command = Command::new(env!("CARGO_BIN_EXE_gd"));
        command.args(["op", "attend", "--mechanism", self.name, "--case", case]).args(flags);
        command
            .arg("--in")
            .arg(input)
            .arg("--out")
            .arg(&out)
            .arg("--params")
            .arg(self.path.with_extension("json"));
        let output = command.output()?;
        ensure!(output.status.success(), "{} {case}: {}", self.name, String::from_utf8_lossy(&output.stderr));
        Ok(safetensors::load(&out, &Device::Cpu)?)
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
    let mut ran = 0;
    let mechanisms = TABLE.iter().map(|(name, _)| *name).filter(|name| !WITHOUT_REFERENCE.contains(name));
    for name in mechanisms.chain(BESIDE.map(|(name, _)| name)) {
        let reference = Reference::load(name)?;
        ran += reference.check(DType::F64, 1e-10)? + reference.check(DType::F32, 1e-5)?;
    }
    log_cases("mechanisms", ran);
    Ok(())
}

#[test]
fn every_file_of_reference_values_belongs_to_a_mechanism() -> Result<()> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/mechanisms");
    let mut files: BTreeSet<String> = fs::read_dir(folder)?
        .map(|entry| Ok(entry?.path().file_stem().context("no name")?.to_string_lossy().into_owned()))
        .collect::<Result<_>>()?;
    files.remove("README");
    let names = TABLE.iter().map(|(name, _)| *name).filter(|name| !WITHOUT_REFERENCE.contains(name));
    assert_eq!(files, names.map(str::to_owned).collect());
    Ok(())
}

fn gd(args: &[&str]) -> Result<std::process::Output> {
    Ok(Command::new(env!("CARGO_BIN_EXE_gd")).arg("op").arg("attend").args(args).output()?)
}

#[test]
fn the_command_reports_parameters_and_tensors_and_names_an_unknown_case() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let reference = Reference::load("topk")?;
    let paths = ["safetensors", "json"].map(|extension| reference.path.with_extension(extension));
    let out = dir.path().join("y.safetensors");
    let [input, params, out] = [&paths[0], &paths[1], &out].map(|path| path.to_str().expect("a path"));
    let args = ["--mechanism", "topk", "--in", input, "--params", params, "--out", out, "--case"];
    let output = gd(&[&args[..], &["ties.causal", "--backward", "--json"]].concat())?;
    ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let summary: Value = serde_json::from_slice(&output.stdout)?;
    assert_eq!(summary["tensors"]["ties.causal.dq"]["dtype"], "F64");
    assert_eq!(summary["parameters"], json!({ "k": 4 }));
    // Without --backward there are no gradients.
    ensure!(!reference.run(&paths[0], "none", &[])?.contains_key("none.dq"));
    for (mechanism, case, words) in
        [("topk", "other", ["\"other\"", "ties.causal"]), ("topq", "none", ["topq", "max_margin"])]
    {
        let args =
            ["--mechanism", mechanism, "--in", input, "--params", params, "--out", out, "--case", case];
        let failed = gd(&args)?;
        let message = String::from_utf8_lossy(&failed.stderr).into_owned();
        assert_eq!(failed.status.code(), Some(1), "{message}");
        assert!(words.iter().all(|word| message.contains(word)), "{message}");
    }
    Ok(())
}

#[test]
fn every_mechanism_is_listed_with_its_stages_parameters_and_source() -> Result<()> {
    let output = gd(&["--list", "--json"])?;
    let listed: Vec<Value> = serde_json::from_slice(&output.stdout)?;
    let names: Vec<&str> = listed.iter().filter_map(|entry| entry["name"].as_str()).collect();
    assert!(names.len() == TABLE.len() + BESIDE.len() && BESIDE.iter().all(|(name, _)| names.contains(name)));
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

#[test]
fn the_hybrid_among_the_examples_trains_resumes_and_generates() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let dir = dir.path();
    fs::write(dir.join("text.txt"), SAMPLE.chars().take(4_000).collect::<String>())?;
    let example = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../examples/hybrid.json");
    fs::write(dir.join("hybrid.json"), fs::read(example)?)?;
    let sizes = "--set train.steps=4 --set train.eval_every=2 --set train.batch=2 --set train.context=80 --set train.lr.warmup=1";
    let start = format!("train --config hybrid.json {sizes} --data text.txt --seed 3 --json --out");
    let whole = parsed(&program::gd(dir, &format!("{start} whole"))?)?;
    assert!(whole["loss"].as_f64().is_some_and(f64::is_finite), "{whole}");
    parsed(&program::gd(dir, &format!("{start} split --stop-after 2"))?)?;
    parsed(&program::gd(dir, "train --resume split --json")?)?;
    let weights = |run: &str| fs::read(dir.join(run).join("model.safetensors"));
    assert!(weights("whole")? == weights("split")?, "the weights of a resumed run differ");
    let config: Value = serde_json::from_slice(&fs::read(dir.join("whole/config.json"))?)?;
    assert_eq!(config["gd"]["mechanism"], json!(["linear", "linear", "linear", "gd"]));
    // Decoded together, each prompt gets the text that it gets alone. One goes past a chunk of the linear layers.
    let long = "It was the best of times, it was the worst of times, it was the age of wisdom.";
    let prompts = [long, "It was"];
    let texts = |prompts: &[&str]| -> Result<Vec<Value>> {
        fs::write(dir.join("prompts.txt"), prompts.join("\n"))?;
        let call = "generate whole --prompts prompts.txt --max-tokens 8 --temperature 0 --json";
        let lines = program::succeeded(&program::gd(dir, call)?)?;
        lines.lines().map(|line| Ok(serde_json::from_str::<Value>(line)?["text"].clone())).collect()
    };
    let together = texts(&prompts)?;
    assert_eq!(together, [texts(&prompts[..1])?, texts(&prompts[1..])?].concat());
    assert!(together.iter().all(Value::is_string), "{together:?}");
    Ok(())
}
