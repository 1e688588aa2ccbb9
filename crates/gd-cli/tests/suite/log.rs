//! The log of a run, and the plots and reports that are made from it.

use std::fs;
use std::path::Path;
use std::process::Output;

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use crate::program::{SAMPLE, SMALL, gd, succeeded};

const TRAIN: &str = "train --config small.json --data text.txt --set train.sample_every=8 \
                     --set train.sample_prompt=<b> --json --out";

/// The error line of a call that must fail with this exit code.
fn failed(output: &Output, code: i32) -> Result<String> {
    let line = String::from_utf8(output.stderr.clone())?;
    ensure!(output.status.code() == Some(code) && line.lines().count() == 1, "{:?}: {line}", output.status);
    Ok(line)
}

/// A folder with two runs, `one` and `two`.
fn runs() -> Result<tempfile::TempDir> {
    let dir = tempfile::tempdir()?;
    fs::write(dir.path().join("small.json"), SMALL)?;
    fs::write(dir.path().join("text.txt"), SAMPLE.chars().take(20_000).collect::<String>())?;
    succeeded(&gd(dir.path(), &format!("{TRAIN} one"))?)?;
    succeeded(&gd(dir.path(), &format!("{TRAIN} two --seed 2"))?)?;
    Ok(dir)
}

fn lines(run: &Path) -> Result<Vec<Value>> {
    let text = fs::read_to_string(run.join("train.jsonl"))?;
    Ok(text.lines().map(serde_json::from_str).collect::<Result<_, _>>()?)
}

fn number(line: &Value, key: &str) -> Result<f64> {
    line[key].as_f64().with_context(|| format!("{key} in {line}"))
}

#[test]
fn a_run_has_a_log_plots_and_a_report() -> Result<()> {
    let folder = runs()?;
    let dir = folder.path();
    log(dir)?;
    pictures(dir)?;
    reports(dir)
}

fn log(dir: &Path) -> Result<()> {
    let lines = lines(&dir.join("one"))?;
    let (events, steps): (Vec<_>, Vec<_>) = lines.iter().partition(|line| !line["event"].is_null());
    assert_eq!(steps.len(), 20);
    let names: Vec<_> = events.iter().map(|e| e["event"].as_str().unwrap_or_default()).collect();
    let count = |name: &str| names.iter().filter(|n| **n == name).count();
    assert_eq!((names[0], &names[names.len() - 2..]), ("start", &["end", "sample"][..]), "{names:?}");
    assert_eq!((count("sample"), count("skip"), count("fallback")), (3, 0, 0), "{names:?}");
    assert!(count("checkpoint") >= 1, "{names:?}");
    let (peak, cost) = (number(events[0], "peak_flops")?, number(events[0], "flops_per_token")?);
    for (i, line) in steps.iter().enumerate() {
        assert_eq!((&line["step"], &line["tokens"]), (&(i + 1).into(), &((i + 1) * 128).into()));
        let utilisation = number(line, "tokens_per_second")? * cost / peak;
        assert!((number(line, "mfu")? / utilisation - 1.0).abs() < 1e-9, "{line}");
        for key in ["loss", "grad_norm", "lr", "time"] {
            assert!(number(line, key)? > 0.0, "{key}: {line}");
        }
        assert_eq!(line["valid_loss"].is_null(), (i + 1) % 10 != 0, "{line}");
        if cfg!(target_os = "linux") {
            assert!(number(line, "peak_mib")? >= number(line, "resident_mib")?, "{line}");
        }
    }
    let sample = events.iter().find(|e| e["event"] == "sample").context("a sample")?;
    assert_eq!((&sample["step"], &sample["prompt"]), (&8.into(), &"<b>".into()));
    assert!(!sample["text"].as_str().unwrap_or_default().is_empty(), "{sample}");
    Ok(())
}

fn pictures(dir: &Path) -> Result<()> {
    succeeded(&gd(dir, "plot one two --out both.svg --x tokens --y loss,valid_loss,mfu")?)?;
    let svg = fs::read_to_string(dir.join("both.svg"))?;
    for text in
        ["<svg", "nats per token", "model FLOPs utilization", "tokens", "one", "two", "#0072B2", "#009E73"]
    {
        assert!(svg.contains(text), "{text} is missing");
    }
    succeeded(&gd(dir, "plot one --out one.png --x time --y lr,grad_norm")?)?;
    let png = fs::read(dir.join("one.png"))?;
    assert_eq!(png[..8], *b"\x89PNG\r\n\x1a\n");
    // The file is larger than that of an empty image.
    assert!(png.len() > 10_000, "{} bytes", png.len());
    let error = failed(&gd(dir, "plot one --y los")?, 2)?;
    assert!(error.contains("--y los") && error.contains("valid_loss"), "{error}");
    let error = failed(&gd(dir, "plot one three")?, 1)?;
    assert!(error.contains("three/train.jsonl"), "{error}");
    fs::create_dir(dir.join("empty"))?;
    fs::write(dir.join("empty/train.jsonl"), "")?;
    let error = failed(&gd(dir, "plot empty")?, 1)?;
    assert!(error.contains("empty/train.jsonl") && error.contains("no step"), "{error}");
    fs::write(dir.join("empty/train.jsonl"), "{\"step\":1}\nwhat\n{\"step\":2}\n")?;
    let error = failed(&gd(dir, "report empty")?, 1)?;
    assert!(error.contains("line 2"), "{error}");
    Ok(())
}

fn reports(dir: &Path) -> Result<()> {
    // Training writes a report.
    let html = fs::read_to_string(dir.join("one/report.html"))?;
    succeeded(&gd(dir, "report one --out again.html")?)?;
    assert_eq!(fs::read_to_string(dir.join("again.html"))?, html);
    for text in [
        "<h1>one</h1>",
        "<dt>steps</dt><dd><b>20 of 20</b>",
        "<dt>training tokens</dt><dd><b>2,560</b>",
        "bits per byte",
        "<h3>validation loss <small>nats per token</small></h3>",
        "<h3>margin to the runner-up <small>energy</small></h3>",
        "<h3>tokens per second ",
        "evaluation</span>",
        "checkpoint</span>",
        "prefers-color-scheme: dark",
        "After 16 steps, from &quot;&lt;b&gt;&quot;",
        "<div class=\"sample\"><b>&lt;b&gt;</b>",
        "&quot;hidden_size&quot;: 32",
    ] {
        assert!(html.contains(text), "{text} is missing:\n{html}");
    }
    // One evaluation in ten steps: two points in the chart of the validation loss and in that of the training loss.
    let chart = |title: &str| -> Result<&str> {
        let (_, rest) = html.split_once(&format!("<h3>{title} ")).context(title.to_owned())?;
        Ok(rest.split_once("</figure>").context("the end of a chart")?.0)
    };
    for title in ["training loss", "validation loss"] {
        assert_eq!(chart(title)?.matches("class=\"point").count(), 2, "{title}");
        assert!(chart(title)?.contains("class=\"checkpoint\""), "{title}");
    }
    // The report fetches nothing, and text of the model does not become markup.
    let links = ["<b><", "src=", "href=", "url(", "https:"];
    assert!(links.iter().all(|link| !html.contains(link)), "{html}");
    succeeded(&gd(dir, "report one --out one.md")?)?;
    let text = fs::read_to_string(dir.join("one.md"))?;
    assert!(text.starts_with("# one\n") && text.contains("| steps | 20 of 20 |"), "{text}");
    assert!(text.contains("(one.1.svg)") && dir.join("one.1.svg").exists());
    // Several runs side by side.
    let error = failed(&gd(dir, "report one two")?, 2)?;
    assert!(error.contains("2 runs needs --out"), "{error}");
    succeeded(&gd(dir, "report one two --out both.html")?)?;
    let html = fs::read_to_string(dir.join("both.html"))?;
    for text in
        ["<h1>one and two</h1>", "<th>one</th><th>two</th>", "<td>seed</td><td>0</td><td>2</td>", "line c1"]
    {
        assert!(html.contains(text), "{text} is missing:\n{html}");
    }
    // The card of the model names the run and its configuration.
    let card = fs::read_to_string(dir.join("two/README.md"))?;
    assert!(card.contains("# two\n") && card.contains("configuration small."), "{card}");
    Ok(())
}
