//! Models of this crate in GGUF files, with the architecture `gd`.
//!
//! The file has the configuration as the text of `config.json` in the key `gd.config`, that of `generation_config.json` in
//! `gd.generation_config`, the tokenizer as the text of `tokenizer.json` in `tokenizer.huggingface.json`, the key that the
//! format defines for it, and other files by name in `gd.file.NAME`. The tensors have the names and the order of rows of a
//! checkpoint.

use std::collections::BTreeMap;

use candle_core::quantized::gguf_file;
use serde_json::Value;

use super::Gguf;
use super::header::Header;
use super::tensors::{Loader, Weights};
use super::write::{Metadata, Model};
use crate::io::tokenizer::Tokenizer;

/// The value of `general.architecture`.
pub(super) const ARCHITECTURE: &str = "gd";
/// The key of the configuration.
const CONFIG: &str = "gd.config";
/// The key of the sampling defaults.
const GENERATION: &str = "gd.generation_config";
/// The start of the keys of other files.
const FILE: &str = "gd.file.";
/// The key of the tokenizer.
const TOKENIZER: &str = "tokenizer.huggingface.json";

/// Reads the model.
///
/// # Errors
/// Names the key or tensor.
pub(super) fn read(header: &Header, loader: &mut Loader<'_>) -> Result<Gguf, String> {
    let text = |key: &str| header.text(key)?.ok_or_else(|| format!("key {key} is missing"));
    let json = |key: &str| -> Result<Value, String> {
        serde_json::from_str(text(key)?).map_err(|e| format!("key {key}: {e}"))
    };
    let (config, generation) = (json(CONFIG)?, json(GENERATION)?);
    let tokenizer =
        Tokenizer::from_json(text(TOKENIZER)?.as_bytes()).map_err(|e| format!("key {TOKENIZER}: {e}"))?;
    let mut weights = Weights::default();
    for (name, info) in &header.tensors {
        loader.load(name.clone(), info, None, &mut weights).map_err(|e| format!("tensor {name}: {e}"))?;
    }
    let mut files = BTreeMap::new();
    for key in header.keys().filter(|key| key.starts_with(FILE)) {
        files.insert(key[FILE.len()..].to_owned(), text(key)?.as_bytes().to_vec());
    }
    let Weights { tensors, quantized } = weights;
    Ok(Gguf { config, tensors, quantized, tokenizer, generation, files })
}

/// Adds the metadata of a model.
///
/// # Errors
/// A configuration or tokenizer that cannot be written, or a file that is not UTF-8.
pub(super) fn describe(model: &Model<'_>, metadata: &mut Metadata) -> crate::Result<()> {
    let mut add = |key: &str, text: String| metadata.insert(key.to_owned(), gguf_file::Value::String(text));
    add(CONFIG, model.config.to_json()?.to_string());
    add(GENERATION, model.generation.to_string());
    add(TOKENIZER, model.tokenizer.to_json()?);
    for (name, content) in model.files {
        let text = String::from_utf8(content.clone())
            .map_err(|_| crate::Error::Invalid(format!("the file {name} is not UTF-8")))?;
        add(&format!("{FILE}{name}"), text);
    }
    Ok(())
}
