//! Checkpoint folders in the Hugging Face layout: written whole or not at all, read with every reason named.
//!
//! | file | content |
//! |---|---|
//! | `config.json` | the model's shape |
//! | `model.safetensors` | the weights, metadata `format: pt`; or shards with `model.safetensors.index.json` |
//! | `tokenizer.json` | the tokenizer |
//! | `generation_config.json` | sampling defaults, and the tokens that end a text |
//! | `tokenizer_config.json`, `chat_template.jinja` | of models from elsewhere: special tokens, how a chat is written |
//! | `README.md` | the model card |
//!
//! A run's folder holds such a model, and while it trains `checkpoint-STEP` folders ([`Store`]): each a model
//! with the training state and a `manifest.json` of sizes and hashes beside it.

mod disk;
mod folder;
mod manifest;
mod store;
mod tensors;

use std::collections::BTreeMap;
use std::path::Path;

use candle_core::Tensor;

pub use disk::{Disk, Output, System};
pub use folder::{check_replaceable, write_folder, write_tensors};
pub use manifest::{Filling, MANIFEST, verify};
pub use store::{Store, StoredCheckpoint, locate};
pub use tensors::{load_json, load_tensors, require};

use crate::error::{Error, Result};
use crate::io::tokenizer::Tokenizer;
use tensors::is_plain_name;

/// The configuration in a checkpoint folder.
pub const CONFIG: &str = "config.json";
/// The weights in a checkpoint folder.
pub const WEIGHTS: &str = "model.safetensors";
/// The averaged weights of a run that keeps them; a model file like the other.
pub const EMA_WEIGHTS: &str = "model_ema.safetensors";
/// The list of shards, where the weights are in several files.
pub const INDEX: &str = "model.safetensors.index.json";
/// The tokenizer in a checkpoint folder.
pub const TOKENIZER: &str = "tokenizer.json";
/// The sampling defaults in a checkpoint folder.
pub const GENERATION: &str = "generation_config.json";
/// The tokenizer's settings in a checkpoint folder, among them the chat template and names of special tokens.
pub const TOKENIZER_CONFIG: &str = "tokenizer_config.json";
/// The chat template in a checkpoint folder, where it has a file of its own.
pub const CHAT_TEMPLATE: &str = "chat_template.jinja";
/// The model card in a checkpoint folder.
pub const CARD: &str = "README.md";

/// What a checkpoint folder holds.
#[derive(Clone, Copy, Debug)]
pub struct Checkpoint<'a> {
    /// `config.json`.
    pub config: &'a serde_json::Value,
    /// The weights by name.
    pub tensors: &'a BTreeMap<String, Tensor>,
    /// `tokenizer.json`.
    pub tokenizer: &'a Tokenizer,
    /// `generation_config.json`.
    pub generation: &'a serde_json::Value,
    /// `README.md`; [`model_card`] makes one.
    pub card: &'a str,
    /// Further files by plain name.
    pub extra: &'a BTreeMap<String, Vec<u8>>,
}

/// Writes a checkpoint folder. An existing checkpoint at `folder` stays until the new one is complete.
pub fn save(folder: &Path, checkpoint: &Checkpoint) -> Result<()> {
    let reserved = [CONFIG, WEIGHTS, INDEX, TOKENIZER, GENERATION, CARD];
    for name in checkpoint.extra.keys() {
        if !is_plain_name(name) || reserved.contains(&name.as_str()) {
            return Err(Error::Invalid(format!("{name:?} cannot be the name of an extra checkpoint file")));
        }
    }
    write_folder(folder, |new| {
        let mut filling = Filling::new(&System, new);
        checkpoint.write(&mut filling)
    })
}

impl Checkpoint<'_> {
    /// Writes every file.
    ///
    /// # Errors
    /// Names the file and the reason.
    pub fn write(&self, folder: &mut Filling) -> Result<()> {
        folder.json(CONFIG, self.config)?;
        folder.json(GENERATION, self.generation)?;
        folder.file(TOKENIZER, self.tokenizer.to_json()?.as_bytes())?;
        folder.file(CARD, self.card.as_bytes())?;
        for (name, content) in self.extra {
            folder.file(name, content)?;
        }
        folder.tensors(WEIGHTS, self.tensors)
    }
}

/// Fills the model card template: `{{key}}` becomes the value. A key that the template lacks, or lacks a
/// value, is an error.
pub fn model_card(values: &[(&str, String)]) -> Result<String> {
    let mut card = include_str!("../../../models/MODEL_CARD.md").to_string();
    for (key, value) in values {
        let place = format!("{{{{{key}}}}}");
        if !card.contains(&place) {
            return Err(Error::Invalid(format!("the model card has no place for {key:?}")));
        }
        card = card.replace(&place, value);
    }
    match card.split_once("{{").and_then(|(_, rest)| rest.split_once("}}")) {
        Some((key, _)) => Err(Error::Invalid(format!("the model card needs a value for {key:?}"))),
        None => Ok(card),
    }
}
