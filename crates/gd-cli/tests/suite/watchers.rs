//! What only watches a run never ends it: stderr, the log, files for TensorBoard, the report, and readers of its checkpoints.
#![cfg(unix)]

use std::fs::{self, File};
use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::atomic::AtomicBool;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use candle_core::Device;
use gd_model::config::Recipe;
use gd_model::data::{Corpus, Texts};
use gd_model::io::tokenizer::Tokenizer;
use gd_model::model::pretrained;
use gd_model::train::Trainer;
use gd_model::train::run::{About, Run};
use gd_testing::{case_count, log_cases};
use serde_json::{Value, json};

use crate::program::{SAMPLE, SMALL, command, error, gd, json as run, parsed, succeeded};

const TRAIN: &str = "train --config small.json --data text.txt --json --out";
const SHORT: &str = "train --config small.json --data text.txt --steps 6 --json --out";

/// The number of reads of checkpoints that are being replaced; `GD_READS` sets another one.
const READS: usize = 200;

fn folder() -> Result<tempfile::TempDir> {
    let dir = tempfile::tempdir()?;
    fs::write(dir.path().join("small.json"), SMALL)?;
    fs::write(dir.path().join("text.txt"), SAMPLE.chars().take(6000).collect::<String>())?;
    Ok(dir)
}

#[test]
fn a_closed_or_full_stderr_does_not_end_a_command() -> Result<()> {
    let folder = folder()?;
    let dir = folder.path();
    for (name, log) in [("closed", "warn"), ("closed", "debug"), ("full", "debug")] {
        let mut training = command(dir, &format!("{SHORT} {name}-{log} --set train.sample_every=2"));
        training.env("GD_LOG", log).stdout(Stdio::piped());
        let mut training = match name {
            "full" => training.stderr(File::options().write(true).open("/dev/full")?).spawn()?,
            _ => training.stderr(Stdio::piped()).spawn()?,
        };
        drop(training.stderr.take());
        let result = parsed(&training.wait_with_output()?)?;
        ensure!(result["finished"] == true && result["not_written"] == json!([]), "{name}: {result}");
    }
    // An error keeps its exit code.
    let mut failing = command(dir, "eval nothing --data text.txt");
    let status = failing.stderr(File::options().write(true).open("/dev/full")?).status()?;
    ensure!(status.code() == Some(1), "{status}");
    Ok(())
}

#[test]
fn a_log_that_cannot_be_written_is_reported_at_the_end() -> Result<()> {
    let folder = folder()?;
    let dir = folder.path();
    // The folder of a run that ended before its first checkpoint. Its log is a folder, and that of TensorBoard a file.
    fs::create_dir_all(dir.join("run/train.jsonl"))?;
    fs::write(dir.join("run/tb"), "")?;
    fs::write(dir.join("run/recipe.json"), "{}")?;
    let output = gd(dir, &format!("{SHORT} run"))?;
    let (result, text) = (parsed(&output)?, String::from_utf8_lossy(&output.stderr).into_owned());
    ensure!(result["finished"] == true, "{result}");
    let reasons = result["not_written"].as_array().context("not_written")?;
    ensure!(reasons.len() == 2 && reasons[0].as_str().is_some_and(|r| r.contains("train.jsonl")), "{result}");
    ensure!(text.matches("goes on without a complete log").count() == 1, "{text}");
    ensure!(text.contains("warning: the log or the report of the run is not complete"), "{text}");
    ensure!(run(dir, "eval run --data text.txt --json")?["loss"].is_number());
    // A report that cannot be written.
    let mut resumed = command(dir, &format!("{SHORT} second --stop-after 3"));
    parsed(&resumed.output()?)?;
    fs::create_dir(dir.join("second/report.html"))?;
    let result = run(dir, "train --resume second --json")?;
    ensure!(
        result["finished"] == true && result["not_written"].to_string().contains("report.html"),
        "{result}"
    );
    Ok(())
}

#[test]
fn an_ignored_signal_stays_ignored() -> Result<()> {
    let folder = folder()?;
    let dir = folder.path();
    let program = env!("CARGO_BIN_EXE_gd");
    let script = format!("trap '' HUP; exec '{program}' {TRAIN} run --steps 60 --save-every 1");
    let mut training = Command::new("sh")
        .args(["-c", &script])
        .current_dir(dir)
        .env("GD_LOG", "info")
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()?;
    let mut lines = BufReader::new(training.stderr.take().context("stderr")?).lines();
    let started = lines.any(|line| line.is_ok_and(|line| line.contains("checkpoint-2")));
    ensure!(started, "no checkpoint");
    ensure!(Command::new("kill").args(["-HUP", &training.id().to_string()]).status()?.success());
    lines.for_each(drop);
    ensure!(parsed(&training.wait_with_output()?)?["finished"] == true);
    Ok(())
}

#[test]
fn readers_meet_only_whole_checkpoints() -> Result<()> {
    let wanted = case_count("GD_READS", READS);
    let limit = Duration::from_secs(wanted.max(240) as u64);
    let folder = folder()?;
    let dir = folder.path();
    // Every step replaces the only checkpoint.
    let args = "train --config small.json --data text.txt --steps 100000 --set train.keep=1 --save-every 1 \
                --set train.eval_every=1000000 --set train.batch=1 --json --out run";
    let mut training = command(dir, args).stdout(Stdio::piped()).stderr(Stdio::null()).spawn()?;
    let started = Instant::now();
    while !dir.join("run/checkpoint-1").exists() && started.elapsed() < Duration::from_secs(60) {
        std::thread::sleep(Duration::from_millis(5));
    }
    let (mut steps, mut reads) = (0, 0);
    while (reads < wanted || steps < 20) && started.elapsed() < limit {
        let loaded = pretrained::load(&dir.join("run"), &Device::Cpu);
        ensure!(loaded.is_ok(), "read {reads}: {:?}", loaded.err().map(|e| e.to_string()));
        reads += 1;
        steps = newest(&dir.join("run"))?.max(steps);
    }
    ensure!(Command::new("kill").args(["-TERM", &training.id().to_string()]).status()?.success());
    ensure!(training.wait()?.success(), "the training failed");
    ensure!(reads >= wanted && steps >= 20, "{steps} steps during {reads} reads");
    log_cases("concurrent-readers", reads);
    Ok(())
}

/// The step of the newest checkpoint.
fn newest(run: &Path) -> Result<u64> {
    let store = gd_model::io::checkpoint::Store::new(run, gd_model::io::checkpoint::System);
    Ok(store.steps()?.first().copied().unwrap_or(0))
}

#[test]
fn pipes_and_devices_are_not_read_as_files() -> Result<()> {
    let folder = folder()?;
    let dir = folder.path();
    ensure!(Command::new("mkfifo").arg(dir.join("pipe")).status()?.success());
    let start = Instant::now();
    for args in [
        "train --config small.json --data pipe --out run",
        "train --config small.json --data /dev/zero --out run",
        "train --config pipe --data text.txt --out run",
        "verify pipe",
        "verify /dev/zero",
        "op scan --in pipe --out x.safetensors",
    ] {
        let message = error(dir, args, 1)?;
        ensure!(message.contains("it is a pipe, a socket or a device, not a file"), "{args}: {message}");
    }
    ensure!(start.elapsed() < Duration::from_secs(60), "{:?}", start.elapsed());
    Ok(())
}

#[test]
fn control_characters_of_files_do_not_reach_the_terminal() -> Result<()> {
    let folder = folder()?;
    let dir = folder.path();
    let evil = "a\u{1b}[31m\u{9b}2J";
    fs::write(dir.join(evil), "no model")?;
    fs::write(dir.join("recipe.json"), json!({ evil: 1, "train": { evil: 2 } }).to_string())?;
    for args in [
        format!("eval {evil}none --data text.txt"),
        format!("verify {evil}"),
        "train --config small.json --config recipe.json --data text.txt --out x".to_owned(),
        format!("train --config small.json --set train.{evil}=1 --data text.txt --out x"),
        format!("train --config small.json --data {evil}none --out x"),
    ] {
        let output = gd(dir, &args)?;
        let text = String::from_utf8(output.stderr)?;
        ensure!(!output.status.success() && text.contains("\\u001b[31m\\u009b2J"), "{args:?}: {text:?}");
        ensure!(text.chars().all(|c| c == '\n' || !c.is_control()), "{args:?}: {text:?}");
    }
    Ok(())
}

#[test]
fn a_finished_run_that_was_made_longer_is_read_at_its_newest_step() -> Result<()> {
    let folder = folder()?;
    let dir = folder.path();
    let constant = "--set train.lr.shape=constant --save-every 2";
    succeeded(&gd(dir, &format!("{SHORT} run {constant}"))?)?;
    let eval = |model: &str| run(dir, &format!("eval {model} --data text.txt --json"));
    let finished = eval("run")?;
    ensure!(finished["passed_over"] == json!([]), "{finished}");
    let resumed = run(dir, "train --resume run --steps 12 --stop-after 2 --json")?;
    ensure!(resumed["step"] == 8, "{resumed}");
    let longer = eval("run")?;
    ensure!(longer["passed_over"].to_string().contains("an earlier step of the run"), "{longer}");
    ensure!(longer["loss"] == eval("run/checkpoint-8")?["loss"] && longer["loss"] != finished["loss"]);
    // A model without the number of its steps, of an older version, is compared by its weights.
    let unmarked = |run: &str| -> Result<()> {
        let path = dir.join(run).join("manifest.json");
        let mut files: Value = serde_json::from_slice(&fs::read(&path)?)?;
        files["files"].as_object_mut().context("files")?.remove("training_step.json").context("no step")?;
        let hash = blake3::hash(files["files"].to_string().as_bytes());
        let sorted = json!({ "blake3": hash.to_hex().as_str(), "files": files["files"] });
        fs::write(&path, format!("{sorted:#}\n"))?;
        Ok(fs::remove_file(dir.join(run).join("training_step.json"))?)
    };
    unmarked("run")?;
    ensure!(eval("run")? == longer);
    run(dir, "train --resume run --json")?;
    ensure!(eval("run")?["passed_over"] == json!([]));
    unmarked("run")?;
    ensure!(eval("run")?["passed_over"] == json!([]));
    Ok(())
}

#[test]
fn a_damaged_recipe_or_log_does_not_prevent_a_resumption() -> Result<()> {
    let folder = folder()?;
    let dir = folder.path();
    run(dir, &format!("{SHORT} run --stop-after 4"))?;
    let log = dir.join("run/train.jsonl");
    let whole = fs::read_to_string(&log)?;
    let lines: Vec<&str> = whole.lines().collect();
    let damaged = [&lines[..2], &["{\"step\": 2, \"lo\u{fffd}"], &lines[2..]].concat().join("\n") + "\n";
    fs::write(&log, &damaged)?;
    fs::write(dir.join("run/recipe.json"), "")?;
    let output = gd(dir, "train --resume run --json --set train.save_every=3")?;
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    ensure!(parsed(&output)?["finished"] == true, "{text}");
    ensure!(text.contains("recipe.json") && text.contains("1 damaged lines were removed"), "{text}");
    ensure!(fs::read_to_string(dir.join("run/train.jsonl.damaged"))? == damaged);
    ensure!(dir.join("run/recipe.json.damaged").exists());
    ensure!(fs::read_to_string(&log)?.starts_with(&whole), "the log lost lines");
    let recipe: Value = serde_json::from_slice(&fs::read(dir.join("run/recipe.json"))?)?;
    ensure!(recipe["train"]["save_every"] == 3, "{recipe}");
    Ok(())
}

#[test]
fn errors_that_can_be_known_at_the_start_come_there() -> Result<()> {
    let folder = folder()?;
    let dir = folder.path();
    let long = "x".repeat(80);
    let message = error(dir, &format!("{TRAIN} run --set train.sample_prompt={long}"), 1)?;
    ensure!(message.contains("train.sample_prompt") && !dir.join("run").exists(), "{message}");
    // Braces in a path are not those of the model card.
    fs::copy(dir.join("text.txt"), dir.join("a{{x}}{{loss}}.txt"))?;
    let args = "train --config small.json --data a{{x}}{{loss}}.txt --steps 3 --json --out run";
    ensure!(run(dir, args)?["finished"] == true);
    ensure!(fs::read_to_string(dir.join("run/README.md"))?.contains("a{{x}}{{loss}}.txt"));
    // Folders above that of the run are made.
    ensure!(run(dir, &format!("{TRAIN} a/b/c --steps 2"))?["finished"] == true);
    Ok(())
}

#[test]
fn an_error_inside_a_training_saves_the_last_step_first() -> Result<()> {
    let folder = folder()?;
    let recipe = Recipe::load(folder.path().join("small.json").to_str().context("path")?)?;
    let (tokenizer, path) = (Tokenizer::bytes()?, folder.path().join("run"));
    let texts = Texts::split(&[fs::read_to_string(folder.path().join("text.txt"))?], 0.1)?;
    let trainer = Trainer::new(recipe, Corpus::encode(&texts, &tokenizer)?, 1, &Device::Cpu)?;
    let about = About { name: "small".into(), data: Vec::new(), seed: 1, from: None };
    let mut run = Run::create(&path, trainer, tokenizer, about)?;
    let failed = run.train(None, &AtomicBool::new(false), |step, _| match step.step {
        3 => Err(gd_model::Error::Invalid("the watcher failed".into())),
        _ => Ok(()),
    });
    ensure!(failed.err().context("no error")?.to_string() == "the watcher failed");
    ensure!(newest(&path)? == 3, "the third step is not saved");
    Ok(())
}
