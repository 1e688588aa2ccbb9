//! Training with every kind of system call failing once, by the fault injection of strace: no exit by a panic or a signal, and
//! no checkpoint that was whole is lost.
#![cfg(target_os = "linux")]

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::process::{Command, Output};

use anyhow::{Context, Result, ensure};
use candle_core::Device;
use gd_model::io::checkpoint::{Store, System};
use gd_model::model::pretrained;
use gd_testing::log_cases;
use rayon::prelude::*;

use crate::program::{SAMPLE, SMALL, parsed};

/// The system calls that touch files, and the errors that they are given in turn.
const CALLS: [&str; 13] = [
    "openat",
    "write",
    "fsync",
    "fdatasync",
    "rename",
    "mkdir",
    "unlinkat",
    "rmdir",
    "ftruncate",
    "flock",
    "statx",
    "read",
    "getdents64",
];
const ERRORS: [&str; 4] = ["ENOSPC", "EIO", "EROFS", "EACCES"];

/// The number of injected errors; `GD_INJECTED_ERRORS` sets another one.
const CASES: usize = 320;

const TRAIN: &str = "train --config small.json --data text.txt --steps 4 --save-every 1 --set train.eval_every=2 \
                     --set train.sample_every=2 --json --out run";

fn folder() -> Result<tempfile::TempDir> {
    let dir = tempfile::tempdir()?;
    fs::write(dir.path().join("small.json"), SMALL)?;
    fs::write(dir.path().join("text.txt"), SAMPLE.chars().take(3000).collect::<String>())?;
    Ok(dir)
}

/// Runs the program under strace with more options of it.
fn traced(dir: &Path, options: &[&str], args: &str) -> Result<Output> {
    let mut strace = Command::new("strace");
    strace.args(["-f", "--seccomp-bpf", "-qq", "-o", "strace.txt"]).args(options);
    strace.arg(env!("CARGO_BIN_EXE_gd")).args(args.split_whitespace()).current_dir(dir);
    // One thread, so that the calls come in the same order each time.
    Ok(strace.env("RAYON_NUM_THREADS", "1").output()?)
}

/// How often each call is made by a run.
fn counts(dir: &Path) -> Result<BTreeMap<&'static str, usize>> {
    let trace = format!("trace={}", CALLS.join(","));
    parsed(&traced(dir, &["-e", &trace], &format!("{TRAIN} --seed 1"))?)?;
    let text = String::from_utf8_lossy(&fs::read(dir.join("strace.txt"))?).into_owned();
    let count = |call: &str| text.lines().filter(|line| line.contains(&format!(" {call}("))).count();
    Ok(CALLS.into_iter().map(|call| (call, count(call))).collect())
}

/// Lets call number `at` of its kind fail, and checks the run and its continuation.
fn check(call: &str, at: usize, error: &str) -> Result<()> {
    let dir = folder()?;
    let dir = dir.path();
    let case = format!("{call} number {at} fails with {error}");
    let (trace, inject) = (format!("trace={call}"), format!("inject={call}:error={error}:when={at}"));
    let output = traced(dir, &["-e", &trace, "-e", &inject], TRAIN)?;
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    let code = output.status.code();
    ensure!(matches!(code, Some(0..=2)) && !text.contains("panicked"), "{case}: {:?}: {text}", output.status);
    if code == Some(0) {
        // The result may not have been printed, but the model is there.
        pretrained::load(&dir.join("run"), &Device::Cpu)
            .map_err(|e| anyhow::anyhow!("{case}: {e}: {text}"))?;
    }
    // Every checkpoint that is there is whole, and the newest one can be continued from.
    let run = dir.join("run");
    let Some(step) = run.is_dir().then(|| newest(&run)).transpose()?.flatten() else { return Ok(()) };
    let resume = Command::new(env!("CARGO_BIN_EXE_gd"))
        .args(["train", "--resume", "run", "--json"])
        .current_dir(dir)
        .output()?;
    let resumed = parsed(&resume).with_context(|| format!("{case}, resumed from step {step}: {text}"))?;
    ensure!(resumed["finished"] == true, "{case}: {resumed}");
    pretrained::load(&run, &Device::Cpu).map_err(|e| anyhow::anyhow!("{case}: {e}"))?;
    Ok(())
}

/// The step of the newest checkpoint, which is whole.
fn newest(run: &Path) -> Result<Option<u64>> {
    let newest = Store::new(run, System).newest()?;
    if let Some(newest) = &newest {
        ensure!(newest.damaged.is_empty(), "{newest:?}");
    }
    Ok(newest.map(|newest| newest.step))
}

#[test]
fn an_error_of_any_system_call_neither_panics_nor_loses_a_checkpoint() -> Result<()> {
    if Command::new("strace").arg("-V").output().is_err() {
        println!("strace is not installed: no system call was made to fail");
        log_cases("injected-errors", 0);
        return Ok(());
    }
    let dir = folder()?;
    let counts = counts(dir.path())?;
    let all: usize = counts.values().sum();
    let wished = std::env::var("GD_INJECTED_ERRORS").ok().and_then(|n| n.parse().ok()).unwrap_or(CASES);
    ensure!(counts["fsync"] > 20 && counts["write"] > 50, "{counts:?}");
    // Calls of each kind in proportion, at least some of each, spread over the run.
    let mut cases = Vec::new();
    for (call, count) in counts {
        let wanted = (wished * count / all).max(wished / 40).min(count);
        cases.extend((0..wanted).map(|i| (call, 1 + i * count / wanted)));
    }
    // The loader of the program reads libraries with the first calls, before anything of this program runs.
    let cases: Vec<_> =
        cases.into_iter().filter(|(call, at)| !(["openat", "read"].contains(call) && *at < 12)).collect();
    let failures: Vec<String> = cases
        .par_iter()
        .enumerate()
        .filter_map(|(i, (call, at))| {
            check(call, *at, ERRORS[i % ERRORS.len()]).err().map(|e| format!("{e:#}"))
        })
        .collect();
    ensure!(
        failures.is_empty(),
        "{} of {}: {}",
        failures.len(),
        cases.len(),
        failures[..failures.len().min(8)].join("\n")
    );
    log_cases("injected-errors", cases.len());
    Ok(())
}
