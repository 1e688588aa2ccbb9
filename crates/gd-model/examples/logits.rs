//! Writes the logits of a text to a file, for comparison with other implementations:
//! `cargo run --release -p gd-model --example logits -- MODEL_FOLDER TEXT_FILE OUT.safetensors` writes the
//! `ids` `[N]` of the text and their `logits` `[N, V]`.

use std::path::Path;

use candle_core::{Device, Tensor};
use gd_kernels::Mask;
use gd_layer::Pass;
use gd_model::io::safetensors;
use gd_model::model::pretrained;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let [folder, text, out] = args.as_slice() else {
        return Err("usage: logits MODEL_FOLDER TEXT_FILE OUT.safetensors".into());
    };
    let loaded = pretrained::load(Path::new(folder), &Device::Cpu)?;
    let ids = Tensor::new(loaded.tokenizer.encode(&std::fs::read_to_string(text)?)?, &Device::Cpu)?;
    let logits = loaded.model.forward(&ids.unsqueeze(0)?, &Pass::new(&Mask::causal(0)), None)?.squeeze(0)?;
    let ids = ids.to_dtype(candle_core::DType::I64)?;
    safetensors::write(Path::new(out), &[("ids".into(), ids), ("logits".into(), logits)].into())?;
    Ok(())
}
