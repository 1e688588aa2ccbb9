//! Peak memory, in a process without other tests.

use std::hint::black_box;

use candle_core::{DType, Device, Result, Tensor, Var};
use gd_kernels::cross_entropy::{cross_entropy, linear_cross_entropy};
use gd_model::io::safetensors;
use gd_model::train::memory::Peak;

const MIB: usize = 1 << 20;

#[test]
fn peaks() -> Result<()> {
    // Not tested on systems that do not report the peak.
    let Some(peak) = Peak::start() else { return Ok(()) };
    drop(black_box(vec![1u8; 64 * MIB]));
    let above = peak.above_start().unwrap_or(0.0);
    assert!((60.0..80.0).contains(&above), "{above} MiB");
    assert!(peak.mib().is_some_and(|m| m > above), "{peak:?}");
    let next = Peak::start().and_then(Peak::above_start).unwrap_or(f64::NAN);
    assert!(next < 10.0, "{next} MiB");
    a_file_is_not_held_beside_its_tensors()?;
    the_output_loss_does_not_store_all_logits()
}

/// A file is freed while its tensors are made.
fn a_file_is_not_held_beside_its_tensors() -> Result<()> {
    const TENSORS: usize = 16;
    const TENSOR_MIB: usize = 4;
    let folder = tempfile::tempdir()?;
    let path = folder.path().join("model.safetensors");
    // One number in memory, and written as many.
    let tensor = |i: usize| {
        let elements = TENSOR_MIB * MIB / size_of::<f32>();
        Ok((format!("t{i}"), Tensor::new(&[i as f32], &Device::Cpu)?.broadcast_as(elements)?))
    };
    let failed = candle_core::Error::wrap;
    safetensors::write(&path, &(0..TENSORS).map(tensor).collect::<Result<_>>()?).map_err(failed)?;
    let peak = Peak::start();
    let tensors = safetensors::load(&path, &Device::Cpu).map_err(failed)?;
    let above = peak.and_then(Peak::above_start).unwrap_or(f64::NAN) as usize / TENSOR_MIB;
    for i in 0..TENSORS {
        assert_eq!(tensors[&format!("t{i}")].mean_all()?.to_scalar::<f32>()?, i as f32);
    }
    assert!((TENSORS - 4..TENSORS + 4).contains(&above), "memory of {above} tensors");
    Ok(())
}

/// The 1111 x 32,000 logits have 136 MiB in f32.
fn the_output_loss_does_not_store_all_logits() -> Result<()> {
    let (rows, vocab, width) = (1111, 32_000, 16);
    let logits = (rows * vocab * 4) as f64 / MIB as f64;
    let hidden = Var::from_tensor(&Tensor::randn(0f32, 1.0, (rows, width), &Device::Cpu)?)?;
    let weight = Var::from_tensor(&Tensor::randn(0f32, 1.0, (vocab, width), &Device::Cpu)?)?;
    let targets = Tensor::arange(0, rows as u32, &Device::Cpu)?;
    let measured = |loss: &dyn Fn() -> Result<Tensor>| -> Result<(f64, Tensor)> {
        let peak = Peak::start();
        let loss = loss()?;
        let grads = loss.backward()?;
        let above = peak.and_then(Peak::above_start).unwrap_or(f64::NAN);
        let grad = grads.get(&weight).map(Tensor::detach);
        grad.map(|grad| (above, grad)).ok_or_else(|| candle_core::Error::Msg("no gradient".into()))
    };
    let (fused, a) = measured(&|| Ok(linear_cross_entropy(&hidden, &weight, &targets)?))?;
    let (whole, b) = measured(&|| Ok(cross_entropy(&hidden.matmul(&weight.t()?)?, &targets)?))?;
    let worst = (a - b)?.abs()?.max_all()?.to_dtype(DType::F64)?.to_scalar::<f64>()?;
    assert!(worst <= 1e-6, "{worst}");
    println!(
        "loss of {rows} x {vocab} logits ({logits:.0} MiB): peak {fused:.0} MiB fused, {whole:.0} MiB with all logits"
    );
    assert!(fused < 0.25 * logits && whole > logits, "{fused} and {whole} of {logits} MiB");
    Ok(())
}
