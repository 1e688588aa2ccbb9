//! Runs the program in the folder of a test, with arguments that are separated by spaces.
// Not every test uses all functions.
#![allow(dead_code)]

use std::path::Path;
use std::process::{Command, Output};

use anyhow::{Result, ensure};
use serde_json::Value;

pub(crate) fn gd(dir: &Path, args: &str) -> Result<Output> {
    let mut program = Command::new(env!("CARGO_BIN_EXE_gd"));
    Ok(program.args(args.split_whitespace()).current_dir(dir).output()?)
}

/// The JSON output of a call that must succeed.
pub(crate) fn json(dir: &Path, args: &str) -> Result<Value> {
    let out = gd(dir, args)?;
    ensure!(out.status.success(), "gd {args}: {}", String::from_utf8_lossy(&out.stderr));
    Ok(serde_json::from_slice(&out.stdout)?)
}

/// The last line of stderr of a call that must fail with this exit code.
pub(crate) fn error(dir: &Path, args: &str, code: i32) -> Result<String> {
    let out = gd(dir, args)?;
    let text = String::from_utf8_lossy(&out.stderr).into_owned();
    ensure!(out.status.code() == Some(code), "gd {args}: {:?} {text}", out.status);
    Ok(text.lines().last().unwrap_or_default().to_owned())
}
