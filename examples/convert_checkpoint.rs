//! Replaces the attention of a model and measures how its perplexity changes.
//!
//! `cargo run --release -p gd-examples --bin convert_checkpoint [MODEL [TEXT_FILE]]`, where MODEL is a checkpoint
//! of Llama, Mistral, Qwen2 or Qwen3. Without it a small softmax model is trained first.

use candle_core::Device;
use gd_examples::{TEXT, card, model_or_demo};
use gd_kernels::Score;
use gd_model::config::Mechanism;
use gd_model::eval::evaluate;
use gd_model::model::pretrained::{self, Loaded};
use gd_model::model::swap::{Layers, Swap};

/// Perplexity of a model on a text, in windows of its context.
fn perplexity(loaded: &Loaded, text: &str, device: &Device) -> gd_model::Result<f64> {
    let tokens = loaded.tokenizer.encode(text)?.into();
    let context = loaded.model.config().max_position_embeddings.min(1024);
    Ok(evaluate(&loaded.model, &tokens, text.len(), context, 1, device)?.perplexity)
}

fn main() -> anyhow::Result<()> {
    let folder = tempfile::tempdir()?;
    let path = model_or_demo("softmax", &folder.path().join("model"))?;
    let text = match std::env::args().nth(2) {
        Some(file) => std::fs::read_to_string(file)?,
        None => TEXT.into(),
    };

    let device = Device::Cpu;
    println!("softmax: perplexity {:.3}", perplexity(&pretrained::load(&path, &device)?, &text, &device)?);
    for candidates in [64, 8, 1] {
        let mut parts = pretrained::read(&path, &device)?;
        // The weights do not change. Every layer now takes the softmax over its `candidates` highest-scoring keys.
        let swap = Swap { layers: Layers::All, mechanism: Mechanism::Gd, candidates, score: Score::Dot };
        swap.apply(&mut parts)?;
        let converted = parts.build(&device)?;
        println!("{candidates:>2} keys: perplexity {:.3}", perplexity(&converted, &text, &device)?);

        // `gd` and `transformers` can load this folder.
        let out = folder.path().join(format!("gd-{candidates}"));
        converted.save(&out, &card("converted", "A model with its attention replaced."))?;
        anyhow::ensure!(out.join("config.json").exists(), "{} has no config.json", out.display());
    }
    Ok(())
}
