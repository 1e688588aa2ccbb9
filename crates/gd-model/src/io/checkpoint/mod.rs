//! Checkpoint folders in the layout of Hugging Face. They are written atomically.
//!
//! | file | content |
//! |---|---|
//! | `config.json` | the configuration of the model |
//! | `model.safetensors` | the weights, metadata `format: pt`; or shards with `model.safetensors.index.json` |
//! | `tokenizer.json` | the tokenizer |
//! | `generation_config.json` | sampling defaults and end tokens |
//! | `tokenizer_config.json`, `chat_template.jinja` | if the model came with them: special tokens, the chat template |
//! | `README.md` | the model card |
//!
//! The folder of a training run holds such a model at the end, and folders `checkpoint-STEP` ([`Store`]). Each of them holds
//! a model, the training state, and a `manifest.json` with the sizes and hashes of all files.

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
pub use manifest::{FolderWriter, MANIFEST, verify};
pub use store::{Store, StoredCheckpoint, locate};
pub use tensors::{load_json, load_tensors, load_weights, require, weights_file};

use crate::error::{Error, Result};
use crate::io::tokenizer::Tokenizer;
use tensors::is_plain_name;

/// The configuration in a checkpoint folder.
pub const CONFIG: &str = "config.json";
/// The weights in a checkpoint folder.
pub const WEIGHTS: &str = "model.safetensors";
/// The exponential moving average of the weights, if the run computes one; in the format of [`WEIGHTS`].
pub const EMA_WEIGHTS: &str = "model_ema.safetensors";
/// The index of the shards, if the weights are in several files.
pub const INDEX: &str = "model.safetensors.index.json";
/// The tokenizer in a checkpoint folder.
pub const TOKENIZER: &str = "tokenizer.json";
/// The sampling defaults in a checkpoint folder.
pub const GENERATION: &str = "generation_config.json";
/// The settings of the tokenizer in a checkpoint folder, including the chat template and the special tokens.
pub const TOKENIZER_CONFIG: &str = "tokenizer_config.json";
/// The chat template in a checkpoint folder, if it has a file of its own.
pub const CHAT_TEMPLATE: &str = "chat_template.jinja";
/// The model card in a checkpoint folder.
pub const CARD: &str = "README.md";

/// The content of a checkpoint folder.
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
    /// `README.md`, see [`model_card`].
    pub card: &'a str,
    /// Other files by name, without path separators.
    pub extra: &'a BTreeMap<String, Vec<u8>>,
}

/// Writes a checkpoint folder, see [`write_folder`].
///
/// # Errors
/// As [`write_folder`], and [`Error::Invalid`] for an extra file with a path or the name of another file.
pub fn save(folder: &Path, checkpoint: &Checkpoint) -> Result<()> {
    let reserved = [CONFIG, WEIGHTS, INDEX, TOKENIZER, GENERATION, CARD];
    for name in checkpoint.extra.keys() {
        if !is_plain_name(name) || reserved.contains(&name.as_str()) {
            return Err(Error::Invalid(format!("{name:?} cannot be the name of an extra checkpoint file")));
        }
    }
    write_folder(folder, |new| {
        let mut writer = FolderWriter::new(&System, new);
        checkpoint.write(&mut writer)
    })
}

impl Checkpoint<'_> {
    /// Writes all files into a folder.
    ///
    /// # Errors
    /// As [`FolderWriter::file`].
    pub fn write(&self, folder: &mut FolderWriter) -> Result<()> {
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

/// The model card: the template with each `{{key}}` replaced by its value, in which nothing is replaced.
///
/// # Errors
/// [`Error::Invalid`] for a key that is not in the template, and for a key of the template without a value.
pub fn model_card(values: &[(&str, String)]) -> Result<String> {
    let template = include_str!("../../../models/MODEL_CARD.md");
    if let Some((key, _)) = values.iter().find(|(key, _)| !template.contains(&format!("{{{{{key}}}}}"))) {
        return Err(Error::Invalid(format!("the model card has no place for {key:?}")));
    }
    let (mut card, mut rest) = (String::new(), template);
    while let Some((before, key, after)) = rest
        .split_once("{{")
        .and_then(|(before, from)| from.split_once("}}").map(|(key, after)| (before, key, after)))
    {
        let value = values.iter().find(|(name, _)| *name == key);
        let (_, value) =
            value.ok_or_else(|| Error::Invalid(format!("the model card needs a value for {key:?}")))?;
        card += before;
        card += value;
        rest = after;
    }
    Ok(card + rest)
}
