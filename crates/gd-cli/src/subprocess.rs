//! Measurements in a separate process of this program.

use std::process::Command;

use anyhow::{Context as _, Result, bail};
use candle_core::Device;
use gd_model::config::device;
use serde::de::DeserializeOwned;

/// Runs this program with the arguments `args`, `--device` and `--seed`, and parses the JSON that it prints.
///
/// # Errors
/// Reports that the program cannot be started or that its output is not valid, or the exit status and the error of a
/// process that fails.
pub fn json_of_process<T: DeserializeOwned>(args: &[&str], device: &Device, seed: u64) -> Result<T> {
    let program = std::env::current_exe().context("the path of the program cannot be determined")?;
    let output = Command::new(program)
        .args(args)
        .args(["--device", &device::name(device), "--seed", &seed.to_string()])
        .output()
        .context("the program cannot be started")?;
    if !output.status.success() {
        let error = String::from_utf8_lossy(&output.stderr);
        bail!("{}: {}", output.status, error.trim().trim_start_matches("error: "));
    }
    serde_json::from_slice(&output.stdout).context("the output of the measuring process is not valid")
}
