//! Replaces the attention of a softmax model by selection, without training, and prints both perplexities:
//! `cargo run --release -p gd-model --example swap -- MODEL_FOLDER TEXT_FILE`.

use std::path::Path;

use candle_core::Device;
use gd_kernels::Score;
use gd_model::config::Mechanism;
use gd_model::model::swap::{Layers, Swap};
use gd_model::{Result, eval::evaluate, model::pretrained};

/// The perplexities on a text of the model in `folder`, unchanged and with attention to the `candidates` keys of highest
/// score only.
pub(crate) fn swapped(folder: &Path, text: &str, candidates: usize) -> Result<[f64; 2]> {
    let cpu = Device::Cpu;
    let softmax = pretrained::load(folder, &cpu)?;
    let mut parts = pretrained::read(folder, &cpu)?;
    Swap { layers: Layers::All, mechanism: Mechanism::Gd, candidates, score: Score::Dot }
        .apply(&mut parts)?;
    let selecting = parts.build(&cpu)?;
    let tokens = softmax.tokenizer.encode(text)?.into();
    let context = softmax.model.config().max_position_embeddings.min(1024);
    let measure = |model| evaluate(model, &tokens, text.len(), context, 1, &cpu).map(|e| e.perplexity);
    Ok([measure(&softmax.model)?, measure(&selecting.model)?])
}

fn main() -> std::result::Result<(), Box<dyn std::error::Error>> {
    let mut args = std::env::args().skip(1);
    let (Some(folder), Some(text)) = (args.next(), args.next()) else {
        return Err("usage: swap MODEL_FOLDER TEXT_FILE".into());
    };
    let [softmax, selecting] = swapped(Path::new(&folder), &std::fs::read_to_string(text)?, 8)?;
    println!("perplexity {softmax:.3} with softmax, {selecting:.3} with the best 8 keys");
    Ok(())
}
