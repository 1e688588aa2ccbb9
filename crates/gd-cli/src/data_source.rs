//! Where a command reads text from: text files, JSONL files, folders of them, or one folder of prepared data.

use std::path::PathBuf;

use anyhow::{Result, bail};
use gd_model::config::{DocumentFormat, ModelConfig};
use gd_model::data::{Prepared, Tokens};
use gd_model::io::tokenizer::Tokenizer;

use crate::context::usage;

/// Number of tokens of a text that are checked at a time.
const TOKENS_PER_CHECK: usize = 1 << 16;

/// Flags that define how files are split into documents.
#[derive(Debug, Clone, clap::Args)]
pub struct DocumentArgs {
    /// Field of a JSONL line that contains its text (default: text)
    #[arg(long, value_name = "FIELD")]
    pub text_field: Option<String>,
    /// Line that separates the documents of a text file (default: each file is one document)
    #[arg(long, value_name = "LINE", allow_hyphen_values = true)]
    pub separator: Option<String>,
}

impl DocumentArgs {
    /// Replaces the values of `format` by the flags that were given.
    pub fn apply(&self, format: &mut DocumentFormat) {
        if let Some(field) = &self.text_field {
            format.text_field.clone_from(field);
        }
        if self.separator.is_some() {
            format.separator.clone_from(&self.separator);
        }
    }
}

/// Opens the prepared data that `--data` names. Returns `None` if `paths` contains no prepared data.
///
/// # Errors
/// A usage error if prepared data is one of several paths, or a folder that cannot be opened.
pub fn prepared_data(paths: &[PathBuf]) -> Result<Option<Prepared>> {
    match paths.iter().find(|p| Prepared::is_at(p)) {
        None => Ok(None),
        Some(folder) if paths.len() == 1 => Ok(Some(Prepared::open(folder)?)),
        Some(folder) => Err(usage(format!(
            "--data: {} is prepared data and cannot be combined with other paths",
            folder.display()
        ))),
    }
}

/// As [`prepared_data`] for a model with this tokenizer.
///
/// # Errors
/// As [`prepared_data`], or data that was prepared with another tokenizer.
pub fn prepared_data_for(paths: &[PathBuf], tokenizer: &Tokenizer) -> Result<Option<Prepared>> {
    let Some(prepared) = prepared_data(paths)? else { return Ok(None) };
    if prepared.tokenizer.to_json()? != tokenizer.to_json()? {
        bail!("{}: prepared with another tokenizer than the model's", paths[0].display());
    }
    Ok(Some(prepared))
}

/// Checks that a model has every token of a text. The tokenizer of a model may have more tokens than the model.
///
/// # Errors
/// Names the first token that the model lacks.
pub fn check_tokens(tokens: &Tokens, tokenizer: &Tokenizer, model: &ModelConfig) -> Result<()> {
    if tokenizer.vocab_size() <= model.vocab_size {
        return Ok(());
    }
    for start in (0..tokens.len()).step_by(TOKENS_PER_CHECK) {
        model.check_ids(&tokens.read(start..tokens.len().min(start + TOKENS_PER_CHECK)))?;
    }
    Ok(())
}
