//! Functions that the example programs share: they train a small model if no model is given on the command line.
//!
//! The documentation tests of this package are the Rust examples of the README and of the book in `docs/`.

use std::path::{Path, PathBuf};

use anyhow::Result;
use candle_core::{DType, Device};
use gd_model::config::{Recipe, Setting};
use gd_model::data::{Corpus, Texts};
use gd_model::io::tokenizer::Tokenizer;
use gd_model::model::Transformer;
use gd_model::model::params::Params;
use gd_model::model::pretrained::Loaded;
use gd_model::train::Trainer;

/// The text that the small model is trained on.
pub const TEXT: &str = "It was the best of times, it was the worst of times, it was the age of wisdom, it was the age of \
                        foolishness, it was the epoch of belief, it was the epoch of incredulity, it was the season of \
                        Light, it was the season of Darkness, it was the spring of hope, it was the winter of despair. ";

/// Returns the path in the first command-line argument. Without arguments it trains a model by [`demo_model`] and
/// returns its folder.
///
/// # Errors
/// As [`demo_model`].
pub fn model_or_demo(mechanism: &str, folder: &Path) -> Result<PathBuf> {
    match std::env::args().nth(1) {
        Some(path) => Ok(path.into()),
        None => demo_model(mechanism, folder),
    }
}

/// Trains a byte-level model of 2 layers on [`TEXT`] for a few seconds and saves it as a checkpoint folder.
/// `mechanism` is `gd` or `softmax`.
///
/// # Errors
/// Reports the error of a training step, or names the file that cannot be written.
pub fn demo_model(mechanism: &str, folder: &Path) -> Result<PathBuf> {
    let settings = [
        Setting::new("model.gd.mechanism", vec![mechanism]),
        Setting::new("model.num_hidden_layers", 2),
        Setting::new("model.hidden_size", 64),
        Setting::new("model.intermediate_size", 128),
        Setting::new("model.num_attention_heads", 4),
        Setting::new("model.num_key_value_heads", 4),
        Setting::new("train.steps", 60),
        Setting::new("train.context", 64),
        Setting::new("train.lr.warmup", 10),
        Setting::new("train.eval_every", 60),
    ];
    let recipe = Recipe::load_with("tiny", &settings)?;
    let tokenizer = Tokenizer::bytes()?;
    let texts = Texts::split(&[TEXT.repeat(8)], 0.2)?;
    let device = Device::Cpu;
    let mut trainer = Trainer::new(recipe, Corpus::encode(&texts, &tokenizer)?, 0, &device)?;
    trainer.run(|step| {
        if step.step.is_multiple_of(20) {
            println!("training step {}: loss {:.3}", step.step, step.loss);
        }
        Ok(())
    })?;
    // The trained weights as constants, without gradients.
    let params = Params::stored(trainer.params.tensors(), None, DType::F32, &device);
    let model = Transformer::new(trainer.model.config(), params.frozen())?;
    Loaded::new(model, params, tokenizer).save(folder, &card("demo", "A model of the examples."))?;
    Ok(folder.into())
}

/// The values of a model card, the `README.md` of a checkpoint folder.
pub fn card(name: &str, summary: &str) -> Vec<(&'static str, String)> {
    let mut values = vec![("name", name.to_owned()), ("summary", summary.to_owned())];
    for key in ["parameters", "mechanism", "tokenizer", "context", "data", "steps", "loss"] {
        values.push((key, "not stated".into()));
    }
    values
}

/// The Rust examples of the documentation, compiled and run as documentation tests of this package.
#[cfg(doctest)]
mod documents {
    #[doc = include_str!("../../docs/src/checkpoints.md")]
    mod checkpoints {}
    #[doc = include_str!("../../docs/src/conversion.md")]
    mod conversion {}
    #[doc = include_str!("../../docs/src/generation.md")]
    mod generation {}
    #[doc = include_str!("../../docs/src/layer.md")]
    mod layer {}
    #[doc = include_str!("../../README.md")]
    mod readme {}
}
