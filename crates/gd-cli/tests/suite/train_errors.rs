//! Training without validation, steps without a token to predict, divergence, and runs that cannot be made longer.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use crate::program::{SAMPLE, SMALL, error, failed, gd, json, succeeded};

fn folder() -> Result<tempfile::TempDir> {
    let dir = tempfile::tempdir()?;
    fs::write(dir.path().join("small.json"), SMALL)?;
    fs::write(dir.path().join("text.txt"), SAMPLE.chars().take(6000).collect::<String>())?;
    Ok(dir)
}

/// The lines of a run's log that have this key.
fn lines(run: &Path, key: &str) -> Result<Vec<Value>> {
    let text = fs::read_to_string(run.join("train.jsonl"))?;
    let lines = text.lines().map(serde_json::from_str).collect::<serde_json::Result<Vec<Value>>>()?;
    Ok(lines.into_iter().filter(|line| line.get(key).is_some()).collect())
}

#[test]
fn training_without_validation_text_measures_nothing() -> Result<()> {
    let folder = folder()?;
    let dir = folder.path();
    let one = serde_json::json!({ "text": SAMPLE.chars().take(3000).collect::<String>() });
    fs::write(dir.join("one.jsonl"), format!("{one}\n"))?;
    let train = "train --config small.json --json --steps 3";
    for (data, out) in [("text.txt --set train.valid_fraction=0", "a"), ("one.jsonl", "b")] {
        let result = json(dir, &format!("{train} --data {data} --out {out}"))?;
        ensure!(result["finished"] == true && result["loss"].is_null(), "{result}");
        let run = dir.join(out);
        ensure!(lines(&run, "valid_loss")?.iter().all(|line| line["valid_loss"].is_null()), "{out}");
        ensure!(fs::read_to_string(run.join("README.md"))?.contains("there is no validation text"), "{out}");
        ensure!(run.join("report.html").is_file() && run.join("model.safetensors").is_file(), "{out}");
        json(dir, &format!("train --resume {out} --json"))?;
    }
    let output = gd(dir, &format!("{train} --data one.jsonl --out c"))?;
    let text = String::from_utf8_lossy(&output.stderr);
    ensure!(text.contains("1 document cannot be split") && text.contains("validation: none"), "{text}");
    let prepare = "data prepare --data text.txt --valid-fraction 0 --out data --json";
    assert_eq!(json(dir, prepare)?["index"]["valid"]["tokens"], 0);
    json(dir, &format!("{train} --data data --out d"))?;
    let message = error(dir, "eval d --data data", 1)?;
    ensure!(message.contains("no validation part"), "{message}");
    let message = error(dir, "compare --config small.json --data data --steps 1", 2)?;
    ensure!(message.contains("train.valid_fraction"), "{message}");
    Ok(())
}

#[test]
fn a_step_without_a_token_to_predict_is_skipped_and_counted() -> Result<()> {
    let folder = folder()?;
    let dir = folder.path();
    // Documents of one byte each, as long as two windows, in normal text.
    let normal = |i: usize| format!("{{\"text\": \"a normal document number {i} with enough text\"}}\n");
    let mut text: String = (0..40).map(normal).collect();
    text.extend((0..160).map(|i| format!("{{\"text\": \"{}\"}}\n", char::from(b'a' + (i % 26) as u8))));
    text.extend((40..80).map(normal));
    fs::write(dir.join("docs.jsonl"), text)?;
    let train = "train --config small.json --data docs.jsonl --json --save-every 5 --set train.context=16 \
                 --set train.batch=1 --set train.valid_fraction=0 --steps 200 --seed 2";
    let whole = json(dir, &format!("{train} --out whole"))?;
    let skips = lines(&dir.join("whole"), "reason")?;
    let empty: Vec<_> = skips.iter().filter(|line| line["reason"] == "no token to predict").collect();
    ensure!(
        !empty.is_empty() && whole["skipped_updates"].as_u64() >= Some(empty.len() as u64),
        "{whole} {skips:?}"
    );
    let step = empty[0]["step"].as_u64().context("no step")?;
    let steps = lines(&dir.join("whole"), "grad_norm")?;
    ensure!(steps.len() == 200 && steps[step as usize - 1]["loss"].is_null(), "{}", steps[step as usize - 1]);
    // A run that ends at such a step continues to the same result.
    json(dir, &format!("{train} --out split --stop-after {step}"))?;
    json(dir, "train --resume split --json")?;
    let weights = |run: &str| fs::read(dir.join(run).join("model.safetensors"));
    ensure!(weights("whole")? == weights("split")?, "the resumed run differs");
    // With nothing to predict at all, the training fails at its start.
    fs::write(dir.join("single.jsonl"), "{\"text\": \"a\"}\n".repeat(400))?;
    let message = error(dir, "train --config small.json --data single.jsonl --out x", 1)?;
    ensure!(message.contains("every document has a single token"), "{message}");
    Ok(())
}

#[test]
fn a_run_that_diverges_names_the_step_and_keeps_a_usable_checkpoint() -> Result<()> {
    let folder = folder()?;
    let dir = folder.path();
    for (settings, out) in [
        ("--set train.lr.peak=100 --set train.lr.warmup=0", "a"),
        ("--set train.lr.peak=1e4 --set train.clip=1e9 --set train.muon={}", "b"),
        ("--set train.lr.peak=1e30 --set train.lr.warmup=0 --save-every 1", "c"),
    ] {
        let args = format!(
            "train --config small.json --data text.txt --steps 60 --set train.eval_every=1000 {settings} --out {out}"
        );
        let message = failed(&gd(dir, &args)?, 1)?;
        for part in ["step ", "diverged", "loss ", "learning rate ", "train.lr.peak", "newest checkpoint is"]
        {
            ensure!(message.contains(part), "{settings}: {part}: {message}");
        }
        // The checkpoint can be used.
        let path = message.rsplit("newest checkpoint is ").next().unwrap_or_default().trim().to_owned();
        let result = json(dir, &format!("eval {path} --data text.txt --context 32 --json"))?;
        ensure!(result["loss"].as_f64().is_some_and(f64::is_finite), "{settings}: {result}");
    }
    Ok(())
}

#[test]
fn a_finished_run_that_cannot_be_made_longer_says_what_to_do() -> Result<()> {
    let folder = folder()?;
    let dir = folder.path();
    succeeded(&gd(dir, "train --config small.json --data text.txt --steps 10 --out a")?)?;
    let message = error(dir, "train --resume a --steps 20", 1)?;
    for part in
        ["cannot be resumed as one of 20", "start a new run with --steps 20", "train.lr.shape=constant"]
    {
        ensure!(message.contains(part), "{part}: {message}");
    }
    let message = error(dir, "train --resume a --steps 8", 1)?;
    ensure!(message.contains("at least 10 steps"), "{message}");
    let constant =
        "train --config small.json --data text.txt --steps 10 --set train.lr.shape=constant --out b";
    succeeded(&gd(dir, constant)?)?;
    assert_eq!(json(dir, "train --resume b --steps 20 --json")?["steps"], 20);
    Ok(())
}
