//! Loads a model and generates text.
//!
//! `cargo run --release -p gd-examples --bin load_and_generate [MODEL]`, where MODEL is a checkpoint folder, a
//! safetensors file in one, the folder of a training run, or a GGUF file. Without it a small model is trained first.

use std::io::Write;

use candle_core::Device;
use gd_examples::model_or_demo;
use gd_model::{Sampler, Sampling, generate, load};

fn main() -> anyhow::Result<()> {
    let folder = tempfile::tempdir()?;
    let path = model_or_demo("gd", &folder.path().join("model"))?;

    let device = Device::Cpu;
    let loaded = load(&path, &device)?;
    println!("{} parameters, {} tokens", loaded.params.count(), loaded.tokenizer.vocab_size());

    let prompt = "It was the ";
    let ids = loaded.tokenizer.encode(prompt)?;
    let ends = loaded.end_tokens()?;
    let sampling = Sampling { temperature: 0.7, top_p: Some(0.95), ..Sampling::default() };
    let mut sampler = Sampler::new(sampling, 7)?;

    // Prints the text as it is generated. A token can end in the middle of a character, whose text the decoder returns
    // when the character is complete.
    let mut text = loaded.tokenizer.stream_after(&ids)?;
    print!("{prompt}");
    generate(&loaded.model, &ids, 60, &mut sampler, &device, |token| {
        if let Some(chunk) = text.push(token)? {
            print!("{chunk}");
            let _ = std::io::stdout().flush();
        }
        Ok(!ends.contains(&token))
    })?;
    println!("{}", text.finish()?.unwrap_or_default());
    Ok(())
}
