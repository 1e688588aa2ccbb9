//! The memory that reading weights needs. A program of its own, because the greatest memory is that of a process.
#![cfg(target_os = "linux")]

use std::fs;

use anyhow::{Context, Result, ensure};
use candle_core::{Device, Tensor};
use gd_model::io::safetensors;

const TENSORS: usize = 16;
const TENSOR_BYTES: usize = 4 << 20;

/// The greatest resident memory of this process in bytes.
fn greatest_memory() -> Result<usize> {
    let status = fs::read_to_string("/proc/self/status")?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).context("VmHWM")?;
    Ok(line.trim().trim_end_matches(" kB").parse::<usize>()? << 10)
}

/// A file is freed while its tensors are made.
#[test]
fn a_file_is_not_held_beside_its_tensors() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let path = folder.path().join("model.safetensors");
    // One number in memory, and written as many.
    let tensor = |i: usize| {
        Ok((format!("t{i}"), Tensor::new(&[i as f32], &Device::Cpu)?.broadcast_as(TENSOR_BYTES / 4)?))
    };
    safetensors::write(&path, &(0..TENSORS).map(tensor).collect::<Result<_>>()?)?;
    let before = greatest_memory()?;
    let tensors = safetensors::load(&path, &Device::Cpu)?;
    let more = greatest_memory()? - before;
    for (i, tensor) in (0..TENSORS).map(|i| (i, &tensors[&format!("t{i}")])) {
        ensure!(tensor.mean_all()?.to_scalar::<f32>()? == i as f32, "t{i}");
    }
    ensure!(((TENSORS - 4) * TENSOR_BYTES..(TENSORS + 4) * TENSOR_BYTES).contains(&more), "{more} bytes");
    Ok(())
}
