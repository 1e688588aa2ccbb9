//! A training and a resumption with every kind of system call failing once, or from then on, by the fault injection of strace:
//! no exit by a panic or a signal, and no checkpoint that was whole is lost.
#![cfg(target_os = "linux")]

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::process::{Command, Output};

use anyhow::{Context, Result, ensure};
use candle_core::Device;
use gd_model::io::checkpoint::{Store, System};
use gd_model::model::pretrained;
use gd_testing::{case_count, log_cases};
use rayon::prelude::*;

use crate::program::{SAMPLE, SMALL, json as run_json, parsed};

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
const RESUME: &str = "train --resume run --json";

/// A command, and how often it makes each call.
struct Traced {
    args: &'static str,
    /// The folder that the command meets.
    base: tempfile::TempDir,
    /// The step of the run there.
    from: Option<u64>,
    counts: BTreeMap<&'static str, usize>,
}

impl Traced {
    fn new(args: &'static str, from: Option<u64>) -> Result<Self> {
        let base = tempfile::tempdir()?;
        fs::write(base.path().join("small.json"), SMALL)?;
        fs::write(base.path().join("text.txt"), SAMPLE.chars().take(3000).collect::<String>())?;
        if let Some(step) = from {
            run_json(base.path(), &format!("{TRAIN} --stop-after {step}"))?;
        }
        let dir = tempfile::tempdir()?;
        copy(base.path(), dir.path())?;
        let trace = format!("trace={}", CALLS.join(","));
        parsed(&traced(dir.path(), &["-e", &trace], args)?)?;
        let text = String::from_utf8_lossy(&fs::read(dir.path().join("strace.txt"))?).into_owned();
        let count = |call: &str| text.lines().filter(|line| line.contains(&format!(" {call}("))).count();
        let counts: BTreeMap<_, _> = CALLS.into_iter().map(|call| (call, count(call))).collect();
        ensure!(counts["fsync"] > 20 && counts["write"] > 30, "{args}: {counts:?}");
        Ok(Self { args, base, from, counts })
    }

    /// About `wished` calls: of each kind in proportion, at least some of each, spread over the command.
    fn calls(&self, wished: usize) -> Vec<(&'static str, usize)> {
        let all: usize = self.counts.values().sum();
        let mut calls = Vec::new();
        for (&call, &count) in &self.counts {
            let wanted = (wished * count / all).max(wished / 20).min(count);
            calls.extend((0..wanted).map(|i| (call, 1 + i * count / wanted)));
        }
        // The loader of the program reads libraries with the first calls, before anything of this program runs.
        calls.retain(|(call, at)| !["openat", "read"].contains(call) || *at >= 12);
        calls
    }
}

/// Copies what is in a folder.
fn copy(from: &Path, to: &Path) -> Result<()> {
    for entry in fs::read_dir(from)? {
        let entry = entry?;
        let target = to.join(entry.file_name());
        match entry.file_type()?.is_dir() {
            true => {
                fs::create_dir(&target).map_err(Into::into).and_then(|()| copy(&entry.path(), &target))?
            }
            false => fs::copy(entry.path(), target).map(drop)?,
        }
    }
    Ok(())
}

/// Runs the program under strace with more options of it.
fn traced(dir: &Path, options: &[&str], args: &str) -> Result<Output> {
    let mut strace = Command::new("strace");
    strace.args(["-f", "--seccomp-bpf", "-qq", "-o", "strace.txt"]).args(options);
    strace.arg(env!("CARGO_BIN_EXE_gd")).args(args.split_whitespace()).current_dir(dir);
    // One thread, so that the calls come in the same order each time. The search path of the tests would let the loader of the
    // program make a hundred calls.
    Ok(strace.env("RAYON_NUM_THREADS", "1").env_remove("LD_LIBRARY_PATH").output()?)
}

/// Lets call number `at` of its kind fail, or all from that on, and checks the run and its continuation.
fn check(command: &Traced, call: &str, at: usize, error: &str, lasting: bool) -> Result<()> {
    let dir = tempfile::tempdir()?;
    let dir = dir.path();
    copy(command.base.path(), dir)?;
    let when = if lasting { format!("{at}+") } else { at.to_string() };
    let case = format!("{}: {call} number {when} fails with {error}", command.args);
    let (trace, inject) = (format!("trace={call}"), format!("inject={call}:error={error}:when={when}"));
    let output = traced(dir, &["-e", &trace, "-e", &inject], command.args)?;
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    let code = output.status.code();
    ensure!(matches!(code, Some(0..=2)) && !text.contains("panicked"), "{case}: {:?}: {text}", output.status);
    // A file system without locks is used without one.
    let is_unlocked = code == Some(0) && text.contains("cannot be locked");
    ensure!(call != "flock" || is_unlocked, "{case}: {:?}: {text}", output.status);
    if code == Some(0) {
        // The result may not have been printed, but the model is there.
        pretrained::load(&dir.join("run"), &Device::Cpu)
            .map_err(|e| anyhow::anyhow!("{case}: {e}: {text}"))?;
    }
    // Every checkpoint that is there is whole, and the newest one can be continued from.
    let run = dir.join("run");
    let step = run.is_dir().then(|| newest(&run)).transpose()?.flatten();
    ensure!(step >= command.from, "{case}: {step:?} is left: {text}");
    let Some(step) = step else { return Ok(()) };
    let resumed =
        run_json(dir, RESUME).with_context(|| format!("{case}, resumed from step {step}: {text}"))?;
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
    let commands = [Traced::new(TRAIN, None)?, Traced::new(RESUME, Some(2))?];
    let wished = case_count("GD_INJECTED_ERRORS", CASES) / commands.len();
    let cases: Vec<_> = commands
        .iter()
        .flat_map(|command| command.calls(wished).into_iter().map(move |(call, at)| (command, call, at)))
        .collect();
    // Threads of their own: operators of tests that run meanwhile would wait for these programs in the common ones.
    let pool = rayon::ThreadPoolBuilder::new().build()?;
    let failures: Vec<String> = pool.install(|| {
        let of_case = |(i, &(command, call, at)): (usize, &(&Traced, &str, usize))| {
            // Reads that all fail would include those of the pipe to lscpu, which ends the library of matrix products.
            let lasting = call != "read" && i / ERRORS.len() % 2 == 1;
            check(command, call, at, ERRORS[i % ERRORS.len()], lasting).err().map(|e| format!("{e:#}"))
        };
        cases.par_iter().enumerate().filter_map(of_case).collect()
    });
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
