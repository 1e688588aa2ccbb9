//! `gd bench` on small shapes.

use std::fs;
use std::path::Path;
use std::process::{Command, Output};

use anyhow::Result;
use serde_json::Value;

use crate::program::succeeded;

const TINY: [&str; 5] = ["--shapes", "1x2x33x16", "--repeats", "1", "--device=cpu"];

fn bench(dir: &Path, args: &[&str]) -> Result<Output> {
    let mut program = Command::new(env!("CARGO_BIN_EXE_gd"));
    Ok(program.args(["bench", "attention"]).args(args).args(TINY).current_dir(dir).output()?)
}

fn lines(report: &Value) -> Vec<(String, String)> {
    let text = |line: &Value, key: &str| line[key].as_str().unwrap_or_default().to_owned();
    report["results"]
        .as_array()
        .into_iter()
        .flatten()
        .map(|l| (text(l, "pass"), text(l, "contender")))
        .collect()
}

#[test]
fn every_contender_of_every_pass_is_in_the_report() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let report: Value = serde_json::from_str(&succeeded(&bench(dir.path(), &["--json", "--seed", "5"])?)?)?;
    let expected = [
        ("fwd", "gd k=1"),
        ("fwd", "gd k=8"),
        ("fwd", "gd k=1 certified"),
        ("fwd", "gd k=8 certified"),
        ("fwd", "softmax in blocks"),
        ("fwd", "candle softmax"),
        ("fwd", "candle softmax_last_dim"),
        ("fwd", "candle flash"),
        ("fwdbwd", "gd k=8"),
        ("fwdbwd", "gd k=2"),
        ("fwdbwd", "gd k=8 certified"),
        ("fwdbwd", "softmax in blocks"),
        ("fwdbwd", "candle softmax"),
        ("decode", "gd k=1"),
        ("decode", "gd k=8"),
        ("decode", "gd k=1 certified"),
        ("decode", "gd k=8 norm prior"),
        ("decode", "gd k=8 norm prior anew"),
        ("decode", "softmax in blocks"),
        ("decode", "candle softmax"),
        ("decode", "candle softmax_last_dim"),
        ("decode", "candle flash"),
    ];
    let pairs = lines(&report);
    for pair in expected {
        assert!(pairs.iter().any(|(p, c)| (p.as_str(), c.as_str()) == pair), "{pair:?} is not in {report}");
    }
    let positive = |x: &Value| x.as_f64().is_some_and(|x| x > 0.0 && x.is_finite());
    assert!(
        positive(&report["machine"]["gemm_gflops"]) && positive(&report["machine"]["threads"]),
        "{report}"
    );
    // The contender for Metal is skipped on the CPU.
    let here = |line: &&Value| line["contender"] != "candle sdpa";
    for line in report["results"].as_array().into_iter().flatten().filter(here) {
        assert_eq!((&line["shape"], &line["skipped"]), (&"1x2x33x16".into(), &Value::Null), "{line}");
        for key in ["median_s", "min_s", "ratio", "gflops", "gemm_share"] {
            assert!(positive(&line[key]), "{key}: {line}");
        }
        let decodes = line["pass"] == "decode";
        assert!(
            ["gbps", "read_share", "read_gbps"].iter().all(|key| positive(&line[*key]) == decodes),
            "{line}"
        );
        let ours = line["contender"].as_str().is_some_and(|c| c.starts_with("gd "));
        // Dot products select other keys than distances.
        let products = line["contender"].as_str().is_some_and(|c| c.contains("norm prior"));
        assert_eq!(line["winners_differ"] == 0, ours && !products, "{line}");
        assert_eq!(positive(&line["rescored"]), ours, "{line}");
        let rows = if decodes { 2 } else { 66 };
        assert_eq!(line["rows"] == rows, ours, "{line}");
    }
    Ok(())
}

#[test]
fn the_report_goes_to_a_file_and_the_tables_to_stdout() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let args = ["--only", "gd k=1,candle flash", "--pass", "bwd,decode", "--json", "out/report.json"];
    let text = succeeded(&bench(dir.path(), &args)?)?;
    assert!(text.starts_with("decode 1x2x33x16 on") && text.contains("candle flash"), "{text}");
    assert!(text.ends_with("wrote out/report.json\n") && !text.contains("fwdbwd"), "{text}");
    let report: Value = serde_json::from_slice(&fs::read(dir.path().join("out/report.json"))?)?;
    let pair = |c: &str| ("decode".to_owned(), c.to_owned());
    assert_eq!(lines(&report), [pair("gd k=1"), pair("candle flash")]);

    let none = bench(dir.path(), &["--only", "candle flash", "--pass", "fwdbwd"])?;
    let error = String::from_utf8_lossy(&none.stderr);
    assert_eq!(none.status.code(), Some(2), "{error}");
    assert!(error.contains("candle flash") && error.contains("fwdbwd"), "{error}");
    Ok(())
}

#[test]
fn the_parts_of_a_step_add_up_to_it() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let mut program = Command::new(env!("CARGO_BIN_EXE_gd"));
    let args = "bench step --steps 2 --set train.batch=1 --set train.context=40 --set train.precision=bf16_mixed --json";
    let report =
        program.args(args.split_whitespace()).arg("--device=cpu").current_dir(dir.path()).output()?;
    let report: Value = serde_json::from_str(&succeeded(&report)?)?;
    assert_eq!((&report["tokens"], &report["precision"]), (&40.into(), &"bf16_mixed".into()));
    let parts = report["parts"].as_array().cloned().unwrap_or_default();
    let of = |name: &str, pass: &str| {
        let part = parts.iter().find(|part| part["name"] == name);
        part.and_then(|part| part[pass].as_f64()).unwrap_or_default()
    };
    for name in ["scan", "feed_forward", "project_to_heads", "project_from_heads", "gated_sum", "adamw"] {
        assert!(of(name, "forward_ms") > 0.0, "{name}: {report}");
    }
    for name in
        ["choose", "feed_forward", "project_to_heads", "project_from_heads", "gated_sum", "causal_conv"]
    {
        assert!(of(name, "backward_ms") > 0.0, "{name}: {report}");
    }
    let total: f64 = parts.iter().filter_map(|part| part["share"].as_f64()).sum();
    assert!((total - 1.0).abs() < 1e-9, "{total}");
    Ok(())
}
