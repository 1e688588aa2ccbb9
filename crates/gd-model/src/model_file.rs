//! From a checkpoint on disk to a model that runs, and back.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use candle_core::{DType, Device};

use crate::checkpoint::{self, Checkpoint};
use crate::config::{self, ModelConfig};
use crate::error::{Error, Result};
use crate::params::Params;
use crate::tokenizer::Tokenizer;
use crate::transformer::Transformer;

/// A loaded model.
pub struct Loaded {
    /// The model, without gradients.
    pub model: Transformer,
    /// Its parameters.
    pub params: Params,
    /// Its tokenizer.
    pub tokenizer: Tokenizer,
}

/// Loads a checkpoint folder, or the folder of a `.safetensors` file in one.
///
/// # Errors
/// Names the file and the reason.
pub fn load(path: &Path, device: &Device) -> Result<Loaded> {
    let folder: PathBuf = match path.is_file() {
        true => path.parent().map(Path::to_path_buf).unwrap_or_default(),
        false => path.to_path_buf(),
    };
    let tensors = checkpoint::load_tensors(path, device)?;
    let file = folder.join(checkpoint::CONFIG);
    let named = |e: &dyn std::fmt::Display| Error::Invalid(format!("{}: {e}", file.display()));
    let config: ModelConfig =
        config::parse(checkpoint::load_json(&file)?).map_err(|problems| named(&problems.join("; ")))?;
    let tokenizer = Tokenizer::load(&folder.join(checkpoint::TOKENIZER))?;
    if tokenizer.vocab_size() > config.vocab_size {
        return Err(Error::Invalid(format!(
            "{}: the tokenizer has {} tokens, the model {}",
            folder.display(),
            tokenizer.vocab_size(),
            config.vocab_size
        )));
    }
    let params = Params::stored(tensors, DType::F32, device);
    let model = Transformer::new(&config, params.frozen()).map_err(|e| named(&e))?;
    let unused = params.unused();
    if !unused.is_empty() {
        tracing::warn!("{}: tensors without a place in the model: {}", folder.display(), unused.join(", "));
    }
    Ok(Loaded { model, params, tokenizer })
}

/// Writes a checkpoint folder; an existing one stays until the new one is complete.
///
/// # Errors
/// Names the file and the reason.
pub fn save(
    folder: &Path,
    model: &Transformer,
    params: &Params,
    tokenizer: &Tokenizer,
    card: &[(&str, String)],
    extra: &BTreeMap<String, Vec<u8>>,
) -> Result<()> {
    let generation = serde_json::json!({ "do_sample": true, "temperature": 0.8, "top_p": 0.95 });
    checkpoint::save(
        folder,
        &Checkpoint {
            config: &model.config().to_json()?,
            tensors: &params.tensors(),
            tokenizer,
            generation: &generation,
            card: &checkpoint::model_card(card)?,
            extra,
        },
    )
}
