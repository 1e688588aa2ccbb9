//! Models from other programs: warnings, and their effect on results.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Result, ensure};
use candle_core::{DType, Device, Tensor};
use gd_model::io::checkpoint::{CONFIG, TOKENIZER, WEIGHTS, load_tensors, write_tensors};

use crate::program::{gd, succeeded};

fn fixture() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/fixtures/llama/mistral")
}

#[test]
fn a_buffer_beside_the_weights_is_named_once_and_changes_nothing() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let dir = folder.path();
    fs::write(dir.join("text.txt"), "Call me Ishmael. Some years ago, never mind how long precisely.")?;
    let model = dir.join("model");
    fs::create_dir(&model)?;
    for name in [CONFIG, TOKENIZER] {
        fs::copy(fixture().join(name), model.join(name))?;
    }
    let mut tensors = load_tensors(&fixture(), &Device::Cpu)?;
    let mask = Tensor::ones((4, 4), DType::U8, &Device::Cpu)?;
    tensors.insert("model.layers.0.self_attn.bias".into(), mask);
    write_tensors(&model.join(WEIGHTS), &tensors)?;
    let args = |model: &Path| format!("eval {} --data text.txt", model.display());
    let (plain, with_buffer) = (gd(dir, &args(&fixture()))?, gd(dir, &args(&model))?);
    assert_eq!(succeeded(&plain)?, succeeded(&with_buffer)?);
    let warnings = String::from_utf8(with_buffer.stderr)?;
    ensure!(warnings.matches("model.layers.0.self_attn.bias").count() == 1, "{warnings}");
    ensure!(
        warnings.contains("1 tensors that the model does not use") && warnings.contains(WEIGHTS),
        "{warnings}"
    );
    ensure!(!String::from_utf8(plain.stderr)?.contains("does not use"));
    Ok(())
}
