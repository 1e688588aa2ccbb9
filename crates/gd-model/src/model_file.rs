//! From a checkpoint on disk to a model that runs, and back.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use candle_core::{DType, Device};

use crate::checkpoint::{self, Checkpoint, Filling};
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
    /// Why something newer in the folder of a run was passed over for a checkpoint there; mostly empty.
    pub passed_over: Vec<String>,
}

/// Loads a checkpoint folder, the folder of a `.safetensors` file in one, or the newest whole checkpoint in
/// the folder of a run without a whole model.
///
/// # Errors
/// Names the file and the reason.
pub fn load(path: &Path, device: &Device) -> Result<Loaded> {
    let (path, passed_over) = checkpoint::locate(path)?;
    for reason in &passed_over {
        tracing::warn!("{reason}; the model is loaded from {}", path.display());
    }
    let folder: PathBuf = match path.is_file() {
        true => path.parent().map(Path::to_path_buf).unwrap_or_default(),
        false => path.clone(),
    };
    let tensors = checkpoint::load_tensors(&path, device)?;
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
    Ok(Loaded { model, params, tokenizer, passed_over })
}

/// Writes a model's files into the folder of a checkpoint.
///
/// # Errors
/// Names the file and the reason.
pub fn write(
    folder: &mut Filling,
    model: &Transformer,
    params: &Params,
    tokenizer: &Tokenizer,
) -> Result<()> {
    folder.json(checkpoint::CONFIG, &model.config().to_json()?)?;
    folder.json(checkpoint::GENERATION, &generation())?;
    folder.file(checkpoint::TOKENIZER, tokenizer.to_json()?.as_bytes())?;
    folder.tensors(checkpoint::WEIGHTS, &params.tensors())
}

fn generation() -> serde_json::Value {
    serde_json::json!({ "do_sample": true, "temperature": 0.8, "top_p": 0.95 })
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
    checkpoint::save(
        folder,
        &Checkpoint {
            config: &model.config().to_json()?,
            tensors: &params.tensors(),
            tokenizer,
            generation: &generation(),
            card: &checkpoint::model_card(card)?,
            extra,
        },
    )
}
