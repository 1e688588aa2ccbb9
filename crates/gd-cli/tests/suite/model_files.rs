//! Models from other programs: warnings, and their effect on results.

use std::fs;
use std::path::Path;

use anyhow::{Result, ensure};
use candle_core::{DType, Device, Tensor};
use gd_model::io::checkpoint::{CONFIG, TOKENIZER, WEIGHTS, load_tensors, write_tensors};

use crate::program::{SMALL, command, failed, gd, json, mistral, parsed, succeeded};

#[test]
fn a_model_of_the_hub_is_found_by_its_name() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let dir = folder.path();
    fs::write(dir.join("small.json"), SMALL)?;
    succeeded(&gd(dir, "train --config small.json --steps 1 --out out/model")?)?;
    let cached = dir.join("hf/hub/models--org--small");
    fs::create_dir_all(cached.join("refs"))?;
    fs::create_dir_all(cached.join("snapshots"))?;
    fs::write(cached.join("refs/main"), "0123abc")?;
    fs::rename(dir.join("out/model"), cached.join("snapshots/0123abc"))?;
    let args = "generate org/small --prompt It --max-tokens 4 --temperature 0 --json";
    let by_name = parsed(&command(dir, args).env("HF_HOME", dir.join("hf")).output()?)?;
    let by_path = json(dir, &args.replace("org/small", "hf/hub/models--org--small/snapshots/0123abc"))?;
    ensure!(by_name["token_ids"] == by_path["token_ids"], "{by_name} {by_path}");
    let file = args.replace("org/small", "org/small:model.safetensors");
    ensure!(command(dir, &file).env("HF_HUB_CACHE", dir.join("hf/hub")).output()?.status.success());
    // A model that is not there is a missing path.
    let missing =
        failed(&command(dir, &args.replace("small", "none")).env("HF_HOME", dir.join("hf")).output()?, 1)?;
    ensure!(missing.contains("org/none"), "{missing}");
    Ok(())
}

#[test]
fn a_buffer_beside_the_weights_is_named_once_and_changes_nothing() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let dir = folder.path();
    fs::write(dir.join("text.txt"), "Call me Ishmael. Some years ago, never mind how long precisely.")?;
    let model = dir.join("model");
    fs::create_dir(&model)?;
    for name in [CONFIG, TOKENIZER] {
        fs::write(model.join(name), fs::read(mistral().join(name))?)?;
    }
    let mut tensors = load_tensors(&mistral(), &Device::Cpu)?;
    let mask = Tensor::ones((4, 4), DType::U8, &Device::Cpu)?;
    tensors.insert("model.layers.0.self_attn.bias".into(), mask);
    write_tensors(&model.join(WEIGHTS), &tensors)?;
    let args = |model: &Path| format!("eval {} --data text.txt", model.display());
    let (plain, with_buffer) = (gd(dir, &args(&mistral()))?, gd(dir, &args(&model))?);
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
