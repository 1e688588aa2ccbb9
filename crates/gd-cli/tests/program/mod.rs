//! The program as tests call it: arguments separated by spaces, in a folder of the test's own.
// Not every test file calls it in every way.
#![allow(dead_code)]

use std::path::Path;
use std::process::{Command, Output};

use anyhow::{Result, ensure};
use serde_json::Value;

pub(crate) fn gd(dir: &Path, args: &str) -> Result<Output> {
    let mut program = Command::new(env!("CARGO_BIN_EXE_gd"));
    Ok(program.args(args.split_whitespace()).current_dir(dir).output()?)
}

/// What a call that must succeed prints.
pub(crate) fn json(dir: &Path, args: &str) -> Result<Value> {
    let out = gd(dir, args)?;
    ensure!(out.status.success(), "gd {args}: {}", String::from_utf8_lossy(&out.stderr));
    Ok(serde_json::from_slice(&out.stdout)?)
}

/// The error of a call that must fail with this code: the last line.
pub(crate) fn error(dir: &Path, args: &str, code: i32) -> Result<String> {
    let out = gd(dir, args)?;
    let text = String::from_utf8_lossy(&out.stderr).into_owned();
    ensure!(out.status.code() == Some(code), "gd {args}: {:?} {text}", out.status);
    Ok(text.lines().last().unwrap_or_default().to_owned())
}
