//! Every kind of invalid input gives one line that names the value, exit code 1 or 2, an empty stdout, and no changes in
//! the folder.

mod model;

use std::collections::BTreeMap;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, ensure};
use candle_core::{DType, Device, Tensor};

/// A call of the program. `{dir}` in the arguments is replaced by the folder with the input files, `''` by an empty
/// argument.
#[derive(Clone)]
struct Case {
    args: String,
    code: i32,
    names: &'static [&'static str],
}

fn case(args: impl Into<String>, code: i32, names: &'static [&'static str]) -> Case {
    Case { args: args.into(), code, names }
}

/// `gd op scan` on `file` with additional flags.
fn scan(file: &str, flags: &str, code: i32, names: &'static [&'static str]) -> Case {
    case(format!("op scan --in {{dir}}/{file}.safetensors --out {{dir}}/y.safetensors {flags}"), code, names)
}

/// `gd op select` on `file` with additional flags.
fn select(file: &str, flags: &str, code: i32, names: &'static [&'static str]) -> Case {
    case(
        format!("op select --in {{dir}}/{file}.safetensors --out {{dir}}/y.safetensors {flags}"),
        code,
        names,
    )
}

fn command_line_cases() -> Vec<Case> {
    vec![
        case("", 2, &["command"]),
        case("trian", 2, &["trian"]),
        case("op", 2, &["command"]),
        case("op sacn", 2, &["sacn"]),
        case("doctor --device gpu", 2, &["gpu"]),
        case("doctor --device cuda:x", 2, &["cuda:x"]),
        case("doctor --seed -1", 2, &["-1"]),
        case("doctor --sed 1", 2, &["--sed"]),
        case("op scan --out {dir}/y.safetensors", 2, &["--in"]),
        case("op scan --in {dir}/good.safetensors", 2, &["--out"]),
        case("eval", 2, &["MODEL"]),
        case("generate {dir}", 2, &["--prompt"]),
        case("compare --seeds 0", 2, &["0", "--seeds"]),
    ]
}

fn op_flag_cases() -> Vec<Case> {
    vec![
        scan("good", "--k 3", 2, &["--k 3"]),
        scan("good", "--k 0", 2, &["--k 0"]),
        scan("good", "--k -8", 2, &["--k -8"]),
        scan("good", "--k 64", 2, &["--k 64"]),
        scan("good", "--k eight", 2, &["eight"]),
        scan("good", "--k 8", 2, &["--k 8", "5 keys"]),
        scan("good", "--mask block", 2, &["block"]),
        scan("good", "--mask window:0", 2, &["`0`"]),
        scan("good", "--mask window:-4", 2, &["`-4`"]),
        scan("good", "--kv-offset 1.5", 2, &["1.5"]),
        scan("good", "--score cosine", 2, &["cosine"]),
        scan("good", "--tie middle", 2, &["middle"]),
        scan("good", "--beta 0", 2, &["'0'", "--beta"]),
        scan("good", "--beta -2", 2, &["-2", "--beta"]),
        scan("good", "--beta nan", 2, &["nan", "--beta"]),
        scan("beta", "--beta 2", 2, &["--beta 2", "beta.safetensors"]),
        scan("packed", "--kv-offset 3", 2, &["--kv-offset 3"]),
        select("good", "--alpha 1", 2, &["'1'", "--alpha"]),
        select("good", "--threshold low", 2, &["low"]),
        select("good", "--gate energy:0", 2, &["`0`"]),
        select("good", "--gate energy:1", 1, &["threshold"]),
        select("good", "--gate open", 2, &["open"]),
        select("good", "--refine 0", 2, &["0", "--refine"]),
        select("rounds", "--refine 2", 2, &["--refine 2", "[2, 3]"]),
        select("good", "--estimator straight", 2, &["straight"]),
        select("good", "--temperature 0", 2, &["'0'", "--temperature"]),
        select("good", "--hardness 1.5", 2, &["1.5", "--hardness"]),
        select("good", "--preserve-floor -0.1", 2, &["-0.1", "--preserve-floor"]),
        select("good", "--value-floor 7", 2, &["'7'", "--value-floor"]),
        select("good", "--coherence-mode local", 2, &["local"]),
        select("good", "--barrier {dir}/nowhere.json", 1, &["nowhere.json"]),
        select("good", "--barrier {dir}/barrier.json", 2, &["barrier.json", "slack"]),
        select("good", "--barrier floor=x", 2, &["floor=x"]),
        select("good", "--barrier floor=2,margin=1,strength=1,entropy=0.5,slack=0", 1, &["floor", "2"]),
    ]
}

fn op_file_cases() -> Vec<Case> {
    vec![
        scan("missing", "", 1, &["missing.safetensors"]),
        scan("empty", "", 1, &["empty.safetensors"]),
        scan("truncated", "", 1, &["truncated.safetensors"]),
        scan("headless", "", 1, &["headless.safetensors"]),
        scan("foreign", "", 1, &["foreign.safetensors"]),
        scan("other", "", 1, &["other.safetensors", "`q`", "weight"]),
        case("op scan --in {dir} --out {dir}/y.safetensors", 1, &["{dir}"]),
        case(
            "op scan --in {dir}/good.safetensors --out {dir}/text.txt/y.safetensors",
            1,
            &["text.txt/y.safetensors"],
        ),
        case(
            "op scan --in {dir}/good.safetensors --out {dir}/no/such/y.safetensors",
            1,
            &["no/such/y.safetensors"],
        ),
        case("op scan --in {dir}/good.safetensors --out {dir}", 1, &["{dir}"]),
        case("op scan --in {dir}/good.safetensors --out {dir}/y.safetensors --device cuda:9", 1, &["cuda:9"]),
        select("no_v", "", 1, &["no_v.safetensors", "`v`"]),
    ]
}

fn op_tensor_cases() -> Vec<Case> {
    vec![
        scan("rank3", "", 1, &["`q`", "[1, 2, 16]"]),
        scan("integers", "", 1, &["`k`", "I32"]),
        scan("head_dim", "", 1, &["16", "24"]),
        scan("wide", "", 1, &["1032"]),
        scan("batch", "", 1, &["[1, 2, 3, 16]", "[2, 2, 5, 16]"]),
        scan("heads", "", 1, &["3", "2"]),
        scan("mixed", "", 1, &["F16", "F32"]),
        scan("no_keys", "", 1, &["[1, 2, 0, 16]"]),
        scan("nan_q", "", 1, &["NaN", "q[0, 0, 2, 5]"]),
        scan("nan_k", "", 1, &["NaN", "k[0, 0, 2, 5]"]),
        scan("inf_k", "", 1, &["inf", "k[0, 0, 2, 5]"]),
        scan("beta3", "", 1, &["`beta`", "[3]"]),
        scan("beta_zero", "", 1, &["beta", "0"]),
        scan("prior", "", 1, &["prior", "[1, 2, 4]"]),
        scan("kv_len", "", 1, &["6", "5"]),
        scan("kv_len_negative", "", 1, &["`kv_len`", "-1"]),
        scan("kv_len_float", "", 1, &["`kv_len`", "F32"]),
        scan("cu_seqlens", "", 1, &["[0, 4, 2, 5]"]),
        scan("protected_float", "", 1, &["`protected`", "F32"]),
        scan("protected_rank", "", 1, &["`protected`", "[3]"]),
        scan("protected_far", "", 1, &["protected", "5"]),
        select("v_keys", "", 1, &["[1, 2, 4, 16]", "5"]),
        select("alpha_one", "", 1, &["alpha", "1"]),
        select("dout", "--backward", 1, &["`dout`", "[1, 2, 3, 8]"]),
    ]
}

/// Writes the input files of the cases into `dir`.
fn write_files(dir: &Path) -> Result<()> {
    let cpu = &Device::Cpu;
    let rows = |shape: &[usize]| -> Result<Tensor> {
        let n = shape.iter().product::<usize>() as u32;
        Ok(Tensor::arange(0u32, n, cpu)?.to_dtype(DType::F32)?.affine(0.125, -1.0)?.reshape(shape)?)
    };
    let ints = |x: &[i32]| Tensor::new(x, cpu);
    let floats = |x: &[f32]| Tensor::new(x, cpu);
    let poisoned = |shape: &[usize], x: f32| -> Result<Tensor> {
        let mut values = rows(shape)?.flatten_all()?.to_vec1::<f32>()?;
        values[37] = x;
        Ok(Tensor::from_vec(values, shape, cpu)?)
    };
    let (q, k) = ([1, 2, 3, 16], [1, 2, 5, 16]);
    // Each file contains valid q, k and v, except for the named tensors.
    let changed: Vec<(&str, &str, Tensor)> = vec![
        ("beta", "beta", floats(&[1.0, 2.0])?),
        ("packed", "cu_seqlens", ints(&[0, 2, 5])?),
        ("rounds", "rounds", rows(&[2, 3])?),
        ("rank3", "q", rows(&[1, 2, 16])?),
        ("integers", "k", rows(&k)?.to_dtype(DType::I32)?),
        ("head_dim", "k", rows(&[1, 2, 5, 24])?),
        ("batch", "k", rows(&[2, 2, 5, 16])?),
        ("heads", "q", rows(&[1, 3, 3, 16])?),
        ("mixed", "q", rows(&q)?.to_dtype(DType::F16)?),
        ("no_keys", "k", rows(&[1, 2, 0, 16])?),
        ("nan_q", "q", poisoned(&q, f32::NAN)?),
        ("nan_k", "k", poisoned(&k, f32::NAN)?),
        ("inf_k", "k", poisoned(&k, f32::INFINITY)?),
        ("beta3", "beta", floats(&[1.0; 3])?),
        ("beta_zero", "beta", floats(&[1.0, 0.0])?),
        ("prior", "prior", rows(&[1, 2, 4])?),
        ("kv_len", "kv_len", ints(&[6])?),
        ("kv_len_negative", "kv_len", ints(&[-1])?),
        ("kv_len_float", "kv_len", floats(&[3.0])?),
        ("cu_seqlens", "cu_seqlens", ints(&[0, 4, 2, 5])?),
        ("protected_float", "protected", rows(&[1, 2])?),
        ("protected_rank", "protected", ints(&[0, 1, 2])?),
        ("protected_far", "protected", ints(&[1, 5])?.unsqueeze(0)?),
        ("v_keys", "v", rows(&[1, 2, 4, 16])?),
        ("alpha_one", "alpha", floats(&[0.5, 1.0])?),
        ("dout", "dout", rows(&[1, 2, 3, 8])?),
    ];
    let good = BTreeMap::from([("q", rows(&q)?), ("k", rows(&k)?), ("v", rows(&k)?)]);
    let save = |name: &str, tensors: &BTreeMap<&str, Tensor>| {
        safetensors::serialize_to_file(tensors, None, &dir.join(format!("{name}.safetensors")))
            .with_context(|| name.to_owned())
    };
    save("good", &good)?;
    for (file, tensor, value) in changed {
        let mut tensors = good.clone();
        tensors.insert(tensor, value);
        save(file, &tensors)?;
    }
    save("wide", &BTreeMap::from([("q", rows(&[1, 2, 3, 1032])?), ("k", rows(&[1, 2, 5, 1032])?)]))?;
    save("no_v", &BTreeMap::from([("q", rows(&q)?), ("k", rows(&k)?)]))?;
    save("other", &BTreeMap::from([("weight", rows(&q)?)]))?;
    let whole = std::fs::read(dir.join("good.safetensors"))?;
    let damaged: [(&str, &[u8]); 6] = [
        ("empty.safetensors", b""),
        ("truncated.safetensors", &whole[..whole.len() - 5]),
        ("headless.safetensors", &whole[..40]),
        ("foreign.safetensors", b"PK\x03\x04 this is an archive and no safetensors file"),
        ("text.txt", b"a regular file"),
        ("barrier.json", br#"{"floor": 0.1, "margin": 1, "strength": 1, "entropy": 0.5}"#),
    ];
    for (name, bytes) in damaged {
        std::fs::write(dir.join(name), bytes)?;
    }
    Ok(())
}

/// All files below `dir` with their bytes.
fn snapshot(dir: &Path) -> Result<BTreeMap<String, Vec<u8>>> {
    let mut files = BTreeMap::new();
    for entry in std::fs::read_dir(dir)? {
        let path = entry?.path();
        if path.is_dir() {
            files.extend(snapshot(&path)?);
        }
        let bytes = if path.is_dir() { b"a folder".to_vec() } else { std::fs::read(&path)? };
        files.insert(path.display().to_string(), bytes);
    }
    Ok(files)
}

fn check(case: &Case, dir: &Path) -> Result<()> {
    let here = dir.display().to_string();
    let args: Vec<String> = case
        .args
        .split_whitespace()
        .map(|a| if a == "''" { String::new() } else { a.replace("{dir}", &here) })
        .collect();
    let output = Command::new(env!("CARGO_BIN_EXE_gd")).args(&args).current_dir(dir).output()?;
    let stderr = String::from_utf8(output.stderr)?;
    let lines: Vec<_> = stderr.lines().filter(|l| !l.trim().is_empty()).collect();
    ensure!(
        output.status.code() == Some(case.code),
        "exit {:?}, expected {}: {stderr}",
        output.status,
        case.code
    );
    ensure!(lines.len() == 1 && lines[0].starts_with("error: "), "not one line of error: {stderr:?}");
    ensure!(output.stdout.is_empty(), "stdout: {:?}", String::from_utf8_lossy(&output.stdout));
    for name in case.names {
        let name = name.replace("{dir}", &here);
        ensure!(lines[0].contains(&name), "`{name}` is not named: {}", lines[0]);
    }
    Ok(())
}

#[test]
fn invalid_input_ends_with_one_line_that_names_it() -> Result<()> {
    let dir = tempfile::tempdir()?;
    write_files(dir.path())?;
    model::write_files(dir.path())?;
    let before = snapshot(dir.path())?;
    let cases = [
        command_line_cases(),
        op_flag_cases(),
        op_file_cases(),
        op_tensor_cases(),
        model::train_cases(),
        model::model_cases(),
        model::other_cases(),
    ]
    .concat();
    let mut failures = Vec::new();
    for case in &cases {
        if let Err(e) = check(case, dir.path()) {
            failures.push(format!("gd {}: {e:#}", case.args));
        }
        if snapshot(dir.path())? != before {
            failures.push(format!("gd {}: changed the folder", case.args));
            break;
        }
    }
    assert!(failures.is_empty(), "{} of {}:\n{}", failures.len(), cases.len(), failures.join("\n"));
    gd_testing::log_cases("bad-input", cases.len());
    Ok(())
}

/// The same call with valid input succeeds, so that the cases above fail because of their input.
#[test]
fn the_valid_file_is_accepted() -> Result<()> {
    let dir = tempfile::tempdir()?;
    write_files(dir.path())?;
    for args in ["op scan --k 4", "op select --k 4 --backward"] {
        let output = Command::new(env!("CARGO_BIN_EXE_gd"))
            .args(args.split_whitespace())
            .args(["--json", "--in", "good.safetensors", "--out", "y.safetensors"])
            .current_dir(dir.path())
            .output()?;
        let stderr = String::from_utf8(output.stderr)?;
        ensure!(output.status.success() && stderr.is_empty(), "gd {args}: {stderr}");
        let summary: serde_json::Value = serde_json::from_slice(&output.stdout)?;
        ensure!(summary["abstained"] == 0, "{summary}");
    }
    Ok(())
}
