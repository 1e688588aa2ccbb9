//! Runs that are stopped, killed, damaged and resumed. Their results are bit-identical to those of an uninterrupted
//! run.

use std::collections::BTreeSet;
use std::fs;
use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use gd_testing::{case_count, log_cases};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde_json::{Map, Value, json};

use crate::program::{SAMPLE, SMALL, command, failed, gd, parsed};

/// A folder with a text and `c.json`, the small configuration with these values in `train`.
fn folder(train: Value) -> Result<tempfile::TempDir> {
    let dir = tempfile::tempdir()?;
    fs::write(dir.path().join("text.txt"), SAMPLE.chars().take(12_000).collect::<String>())?;
    let mut recipe: Value = serde_json::from_str(SMALL)?;
    for (key, value) in train.as_object().into_iter().flatten() {
        recipe["train"][key] = value.clone();
    }
    fs::write(dir.path().join("c.json"), recipe.to_string())?;
    Ok(dir)
}

const START: &str = "train --config c.json --data text.txt --seed 3 --json --out";

/// The steps in the log of a run, without the values that depend on time.
fn steps(run: &Path) -> Result<Vec<Map<String, Value>>> {
    let text = fs::read_to_string(run.join("train.jsonl"))?;
    let lines = text.lines().map(serde_json::from_str::<Map<String, Value>>);
    let mut lines = lines.collect::<serde_json::Result<Vec<_>>>()?;
    lines.retain(|line| !line.contains_key("event"));
    for line in &mut lines {
        for key in ["time", "tokens_per_second", "mfu", "resident_mib", "peak_mib"] {
            ensure!(line.remove(key).is_some(), "no {key} in {line:?}");
        }
    }
    Ok(lines)
}

/// Fails unless two runs of `last` steps have bit-identical results and the same log.
fn assert_same(a: &Path, b: &Path, last: u64) -> Result<()> {
    let newest = format!("checkpoint-{last}");
    let files = [
        "config.json",
        "generation_config.json",
        "manifest.json",
        "model.safetensors",
        "tokenizer.json",
        "recipe.json",
        &format!("{newest}/model.safetensors"),
        &format!("{newest}/state.safetensors"),
        &format!("{newest}/recipe.json"),
    ];
    for file in files {
        let read =
            |run: &Path| fs::read(run.join(file)).with_context(|| format!("{}: {file}", run.display()));
        ensure!(read(a)? == read(b)?, "{file} differs");
    }
    // The title of the model card is the name of the folder when the run ended.
    let card = |run: &Path| -> Result<String> {
        let card = fs::read_to_string(run.join("README.md"))?;
        let title =
            card.lines().find_map(|line| line.strip_prefix("# ")).context("a card without a title")?;
        Ok(card.replace(title, "RUN"))
    };
    ensure!(card(a)? == card(b)?, "README.md differs");
    let averaged = |run: &Path| fs::read(run.join("model_ema.safetensors")).ok();
    ensure!(averaged(a) == averaged(b), "the averaged weights differ");
    let state = |run: &Path| -> Result<Value> {
        let mut state: Value =
            serde_json::from_slice(&fs::read(run.join(&newest).join("trainer_state.json"))?)?;
        state["trainer"]["seconds"] = Value::Null;
        Ok(state)
    };
    assert_eq!(state(a)?, state(b)?);
    assert_eq!(steps(a)?, steps(b)?);
    assert_eq!(steps(a)?.len() as u64, last);
    Ok(())
}

#[test]
fn a_run_in_bf16_saves_f32_master_weights_and_resumes_with_them() -> Result<()> {
    let train = json!({"steps": 12, "eval_every": 4});
    let dir = folder(train)?;
    let dir = dir.path();
    let wide = parsed(&gd(dir, &format!("{START} wide"))?)?;
    let half = "--set train.precision=bf16";
    let whole = parsed(&gd(dir, &format!("{START} whole {half}"))?)?;
    parsed(&gd(dir, &format!("{START} split {half} --stop-after 5"))?)?;
    parsed(&gd(dir, "train --resume split --json")?)?;
    assert_same(&dir.join("whole"), &dir.join("split"), 12)?;
    // The result is close to that of the f32 run, but not equal.
    let loss = |run: &Value| run["loss"].as_f64().unwrap_or(f64::NAN);
    let difference = (loss(&wide) - loss(&whole)).abs();
    assert!(difference > 0.0 && difference < 0.1, "{} and {}", loss(&wide), loss(&whole));
    let config: Value = serde_json::from_slice(&fs::read(dir.join("whole/config.json"))?)?;
    assert_eq!(config["dtype"], "bfloat16");
    let load = |file: &str| candle_core::safetensors::load(dir.join(file), &candle_core::Device::Cpu);
    let (weights, state) = (load("whole/model.safetensors")?, load("whole/checkpoint-12/state.safetensors")?);
    for (name, weight) in &weights {
        assert_eq!(weight.dtype(), candle_core::DType::BF16, "{name}");
        let master = state.iter().find(|(key, _)| key.ends_with(&format!("{name}.master")));
        let (_, master) = master.with_context(|| format!("no master weight of {name}"))?;
        assert_eq!(master.dtype(), candle_core::DType::F32, "{name}");
        let rounded = master.to_dtype(candle_core::DType::BF16)?;
        let error = (rounded - weight)?.to_dtype(candle_core::DType::F32)?.abs()?.flatten_all()?.max(0)?;
        assert_eq!(error.to_scalar::<f32>()?, 0.0, "{name} is not its rounded master weight");
    }
    // The run cannot be resumed in f32.
    let error = failed(&gd(dir, "train --resume split --set train.precision=f32")?, 1)?;
    assert!(error.contains("configuration") || error.contains("recipe"), "{error}");
    Ok(())
}

#[test]
fn a_run_in_mixed_precision_stores_f32_and_resumes_in_it() -> Result<()> {
    let dir = folder(json!({"steps": 12, "eval_every": 4}))?;
    let dir = dir.path();
    let wide = parsed(&gd(dir, &format!("{START} wide --set train.precision=f32"))?)?;
    let mixed = "--set train.precision=bf16_mixed";
    let whole = parsed(&gd(dir, &format!("{START} whole {mixed}"))?)?;
    parsed(&gd(dir, &format!("{START} split {mixed} --stop-after 5"))?)?;
    // A configuration that leaves the precision open does not change that of a run.
    parsed(&gd(dir, "train --resume split --json --config c.json --set train.precision=auto")?)?;
    assert_same(&dir.join("whole"), &dir.join("split"), 12)?;
    let loss = |run: &Value| run["loss"].as_f64().unwrap_or(f64::NAN);
    let difference = (loss(&wide) - loss(&whole)).abs();
    assert!(difference > 0.0 && difference < 0.1, "{} and {}", loss(&wide), loss(&whole));
    let read = |file: &str| -> Result<Value> { Ok(serde_json::from_slice(&fs::read(dir.join(file))?)?) };
    assert_eq!(read("whole/recipe.json")?["train"]["precision"], "bf16_mixed");
    assert_eq!(read("whole/config.json")?["dtype"], "float32");
    let weights =
        candle_core::safetensors::load(dir.join("whole/model.safetensors"), &candle_core::Device::Cpu)?;
    assert!(weights.values().all(|weight| weight.dtype() == candle_core::DType::F32));
    // `auto` is the fastest precision of this machine, and the log has its name.
    parsed(&gd(dir, &format!("{START} auto --set train.precision=auto --stop-after 1"))?)?;
    let fastest = match gd_kernels::MatmulPrecision::fastest() {
        gd_kernels::MatmulPrecision::F32 => "f32",
        gd_kernels::MatmulPrecision::Bf16 => "bf16_mixed",
    };
    let log = fs::read_to_string(dir.join("auto/train.jsonl"))?;
    let start: Value = serde_json::from_str(log.lines().next().context("an empty log")?)?;
    assert_eq!(start["precision"], fastest, "{start}");
    Ok(())
}

#[test]
fn a_resumed_run_equals_an_uninterrupted_one() -> Result<()> {
    let bpe = json!({"steps": 14, "accumulation": 3, "batch": 2, "eval_every": 3, "save_every": 4,
                     "tokenizer": {"bpe": {"vocab": 300}}});
    let annealed = json!({"steps": 14, "eval_every": 5, "ema": {"decay": 0.8}, "select": {"hardness": [[0.2, 0], [0.7, 1]]}});
    let mut rng = ChaCha8Rng::seed_from_u64(5);
    let mut cases = 0;
    for train in [bpe, annealed] {
        let dir = folder(train)?;
        let dir = dir.path();
        let whole = parsed(&gd(dir, &format!("{START} whole"))?)?;
        for n in 0..4 {
            let name = format!("split{n}");
            let mut at = rng.random_range(1..=6u64);
            let first = parsed(&gd(dir, &format!("{START} {name} --stop-after {at}"))?)?;
            assert_eq!((&first["finished"], &first["step"]), (&json!(false), &json!(at)));
            let end = loop {
                let more = rng.random_range(1..=6u64);
                at += more;
                let next = parsed(&gd(dir, &format!("train --resume {name} --json --stop-after {more}"))?)?;
                if next["finished"] == true {
                    break next;
                }
                assert_eq!(next["step"], at);
            };
            assert_eq!((&end["loss"], &end["sample"]), (&whole["loss"], &whole["sample"]));
            assert_same(&dir.join("whole"), &dir.join(&name), 14)?;
            cases += 1;
        }
        let averaged = dir.join("whole/model_ema.safetensors");
        assert_eq!(averaged.exists(), whole["ema"].is_object());
        if averaged.exists() {
            // The averaged weights are a loadable model. They differ from the weights and from their initial values.
            let averaged = parsed(&gd(dir, "eval whole/model_ema.safetensors --data text.txt --json")?)?;
            let last = parsed(&gd(dir, "eval whole --data text.txt --json")?)?;
            let loss = |evaluated: &Value| evaluated["loss"].as_f64().unwrap_or(f64::NAN);
            assert!(
                (loss(&averaged) - loss(&last)).abs() > 1e-4 && loss(&averaged) < 5.5,
                "{averaged} {last}"
            );
            let logged: Vec<_> = steps(&dir.join("whole"))?
                .into_iter()
                .filter_map(|s| s.get("valid_loss_ema").cloned())
                .collect();
            assert_eq!(logged.len(), 3, "steps 5, 10 and 14");
        }
    }
    log_cases("split", cases);
    Ok(())
}

#[test]
fn a_run_does_not_resume_with_other_inputs() -> Result<()> {
    let dir = folder(json!({}))?;
    let dir = dir.path();
    parsed(&gd(dir, &format!("{START} run --stop-after 7"))?)?;
    let refused = |args: &str, code: i32, names: &[&str]| -> Result<()> {
        let error = failed(&gd(dir, &format!("train --resume run {args}"))?, code)?;
        let all = names.iter().all(|name| error.contains(name));
        ensure!(all && error.starts_with("error: "), "{args}: {error}");
        Ok(())
    };
    let hashes = &["changed since", "its hash was", "and is"];
    let text = fs::read_to_string(dir.join("text.txt"))?;
    fs::write(dir.join("other.txt"), text.replacen('e', "a", 1))?;
    refused("--data other.txt", 1, &[&hashes[..], &["the data"]].concat())?;
    refused("--set train.clip=0.5", 1, &[&hashes[..], &["the configuration"]].concat())?;
    refused("--seed 4", 2, &["--seed 4", "seed 3"])?;
    refused("--out elsewhere", 2, &["--out", "--resume"])?;
    refused("--steps 6", 1, &["has done 7"])?;
    refused("--steps 40", 1, &["20 steps", "40", "another one"])?;
    fs::rename(dir.join("text.txt"), dir.join("moved.txt"))?;
    refused("", 1, &["text.txt", "--data"])?;
    // Data with another path and flags that repeat the saved values are accepted.
    let args =
        "train --resume run --json --data moved.txt --config c.json --seed 3 --steps 20 --save-every 7";
    assert_eq!(parsed(&gd(dir, args)?)?["finished"], true);
    // A run that another process is training is an error.
    let lock = fs::OpenOptions::new().write(true).open(dir.join("run/.lock"))?;
    lock.try_lock()?;
    refused("--data moved.txt", 1, &["another process"])?;
    let error = failed(&gd(dir, "train --config c.json --data moved.txt --out run")?, 1)?;
    ensure!(error.contains("another process"), "{error}");
    Ok(())
}

#[test]
fn a_run_can_be_extended_if_no_completed_step_changes() -> Result<()> {
    let lr = json!({"peak": 5e-3, "warmup": 3, "floor": 0.1, "shape": "constant"});
    let dir = folder(json!({"lr": lr, "steps": 6}))?;
    let dir = dir.path();
    parsed(&gd(dir, &format!("{START} run"))?)?;
    let longer = parsed(&gd(dir, "train --resume run --steps 9 --json")?)?;
    assert_eq!(longer["steps"], 9);
    parsed(&gd(dir, &format!("{START} whole --steps 9"))?)?;
    let weights = |run: &str| fs::read(dir.join(run).join("model.safetensors"));
    assert!(weights("run")? == weights("whole")?);
    Ok(())
}

#[test]
fn a_damaged_checkpoint_is_skipped_and_reported() -> Result<()> {
    let dir = folder(json!({"save_every": 3, "eval_every": 20}))?;
    let dir = dir.path();
    parsed(&gd(dir, &format!("{START} whole"))?)?;
    parsed(&gd(dir, &format!("{START} run --stop-after 7"))?)?;
    let file = dir.join("run/checkpoint-7/state.safetensors");
    let mut bytes = fs::read(&file)?;
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    fs::write(&file, bytes)?;
    // The model of an unfinished run is that of its newest intact checkpoint.
    let output = gd(dir, "eval run --data text.txt --json")?;
    let evaluated = parsed(&output)?;
    let skipped = evaluated["passed_over"].to_string();
    assert!(skipped.contains("not ended") && skipped.contains("checkpoint-7/state.safetensors"), "{skipped}");
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(stderr.contains("damaged") && stderr.contains("checkpoint-6"), "{stderr}");
    let same = parsed(&gd(dir, "eval run/checkpoint-6 --data text.txt --json")?)?;
    assert_eq!((&same["loss"], &same["passed_over"]), (&evaluated["loss"], &json!([])));
    let error = failed(&gd(dir, "eval run/checkpoint-7 --data text.txt")?, 1)?;
    assert!(error.contains("checkpoint-7/state.safetensors: damaged"), "{error}");
    // The run resumes from that checkpoint, and the damaged one is renamed.
    let resumed = parsed(&gd(dir, "train --resume run --json")?)?;
    assert!(resumed["passed_over"].to_string().contains("checkpoint-7"), "{resumed}");
    assert!(dir.join("run/checkpoint-7.damaged").is_dir());
    assert_same(&dir.join("whole"), &dir.join("run"), 20)?;
    // A new run does not overwrite an existing one.
    parsed(&gd(dir, &format!("{START} run"))?)?;
    assert!(dir.join("run.1/checkpoint-7.damaged").is_dir());
    assert_same(&dir.join("run.1"), &dir.join("run"), 20)?;
    // A damaged final model is also detected.
    let weights = dir.join("run/model.safetensors");
    let length = fs::metadata(&weights)?.len();
    fs::OpenOptions::new().write(true).open(&weights)?.set_len(length - 1)?;
    let evaluated = parsed(&gd(dir, "eval run --data text.txt --json")?)?;
    assert!(evaluated["passed_over"].to_string().contains("run/model.safetensors: damaged"), "{evaluated}");
    Ok(())
}

/// A run that logs its checkpoints on stderr.
fn spawn(dir: &Path, args: &str) -> Result<Child> {
    let mut run = command(dir, args);
    Ok(run.env("GD_LOG", "info").stdout(Stdio::piped()).stderr(Stdio::piped()).spawn()?)
}

/// The step in a log line about a saved checkpoint.
fn saved(line: &str) -> Option<u64> {
    line.split_once("saved ")?.1.rsplit_once("checkpoint-")?.1.trim().parse().ok()
}

/// Whether this process, and with it the programs that it starts, ignores SIGINT, as in the background of a shell.
#[cfg(unix)]
fn ignores_interrupts() -> bool {
    const SIGINT: u64 = 1 << 1;
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    let ignored = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
    ignored.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok()).is_some_and(|mask| mask & SIGINT != 0)
}

#[cfg(unix)]
#[test]
fn a_signal_ends_a_run_with_a_checkpoint() -> Result<()> {
    for signal in ["-TERM", "-INT"] {
        if signal == "-INT" && ignores_interrupts() {
            println!("skipped: SIGINT is ignored here");
            continue;
        }
        let dir = folder(json!({"steps": 100_000, "eval_every": 100_000, "save_every": 2}))?;
        let dir = dir.path();
        let mut run = spawn(dir, &format!("{START} run"))?;
        let lines = BufReader::new(run.stderr.take().context("stderr")?).lines();
        let mut steps = lines.map_while(|line| line.ok()).filter_map(|line| saved(&line));
        steps.find(|step| *step > 0).context("no checkpoint")?;
        assert!(Command::new("kill").args([signal, &run.id().to_string()]).status()?.success());
        let last = steps.last();
        let output = run.wait_with_output()?;
        assert!(output.status.success(), "{:?}", output.status);
        let result: Value = serde_json::from_slice(&output.stdout)?;
        assert_eq!(result["finished"], false, "{result}");
        let step = result["step"].as_u64().context("step")?;
        assert!(last.is_none_or(|last| last == step), "{last:?} {result}");
        assert!(dir.join(format!("run/checkpoint-{step}/manifest.json")).is_file());
        let next = parsed(&gd(dir, "train --resume run --json --stop-after 1")?)?;
        assert_eq!(next["step"], step + 1);
    }
    Ok(())
}

/// How often a run is killed; `GD_KILLS` sets another number.
const KILLS: usize = 100;

/// Kills a run at random times and resumes it.
#[test]
fn kills_lose_no_reported_checkpoint() -> Result<()> {
    let wanted_kills = case_count("GD_KILLS", KILLS);
    // More steps than are done between the kills.
    let last = 4 * wanted_kills as u64 + 20;
    let dir = folder(json!({"steps": last, "batch": 1, "context": 16, "eval_every": 50, "save_every": 1}))?;
    let dir = dir.path();
    let mut rng = ChaCha8Rng::seed_from_u64(9);
    let mut reported = None;
    let (mut kills, mut resumed_from) = (0, BTreeSet::new());
    while kills < wanted_kills {
        let args = match reported {
            None => format!("{START} run"),
            Some(_) => "train --resume run --json".to_owned(),
        };
        let mut run = spawn(dir, &args)?;
        let mut lines = BufReader::new(run.stderr.take().context("stderr")?).lines();
        // Wait for some checkpoints, so that the run makes progress, and then for a random part of a step.
        let mut wanted = rng.random_range(0..3);
        let pause = if wanted == 0 { 200_000 } else { 10_000 };
        let mut text = String::new();
        let from = reported;
        while wanted > 0 || reported.is_none() {
            let Some(line) = lines.next() else { break };
            let line = line?;
            if let Some(step) = saved(&line) {
                reported = reported.max(Some(step));
                wanted -= 1;
            }
            text += &line;
            text.push('\n');
        }
        std::thread::sleep(Duration::from_micros(rng.random_range(0..pause)));
        let ended = run.try_wait()?;
        ensure!(ended.is_none_or(|status| status.success()), "{text}");
        run.kill()?;
        run.wait()?;
        kills += usize::from(ended.is_none());
        // The lines that were written before the kill.
        let rest = lines.map_while(|line| line.ok()).filter_map(|line| saved(&line)).max();
        reported = reported.max(rest);
        let newest = gd_model::io::checkpoint::Store::new(&dir.join("run"), gd_model::io::checkpoint::System)
            .newest()?;
        let newest = newest.context("no intact checkpoint")?;
        ensure!(newest.damaged.is_empty(), "{newest:?}");
        ensure!(Some(newest.step) >= reported, "{newest:?}, but {reported:?} was reported");
        // The log contains all lines up to the checkpoint.
        let logged = steps(&dir.join("run")).or_else(|_| -> Result<_> {
            // The last line may be incomplete.
            Ok(gd_model::train::log::read(&dir.join("run/train.jsonl"))?)
        })?;
        let logged = logged.iter().filter(|line| !line.contains_key("event")).count() as u64;
        ensure!(logged >= newest.step, "{logged} lines at step {}", newest.step);
        resumed_from.insert(newest.step);
        ensure!(newest.step < last, "the run ended after {kills} kills, from {from:?}");
    }
    parsed(&gd(dir, "train --resume run --json --save-every 100")?)?;
    parsed(&gd(dir, &format!("{START} whole --save-every 100"))?)?;
    assert_same(&dir.join("whole"), &dir.join("run"), last)?;
    // The log has the event of every checkpoint that the run was resumed from.
    let log = gd_model::train::log::read(&dir.join("run/train.jsonl"))?;
    let events = log.iter().filter(|line| line.get("event") == Some(&json!("checkpoint")));
    let logged: BTreeSet<u64> = events.filter_map(|line| line["step"].as_u64()).collect();
    ensure!(resumed_from.is_subset(&logged), "{resumed_from:?}, {logged:?}");
    log_cases("kill", kills);
    Ok(())
}
