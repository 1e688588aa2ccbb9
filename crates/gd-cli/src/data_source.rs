//! Where a command reads text from: text files, JSON records, folders of them, standard input, or one folder of prepared
//! data.

use std::path::{Path, PathBuf};

use anyhow::{Result, anyhow, bail};
use gd_model::Error;
use gd_model::config::{DocumentFormat, ModelConfig};
use gd_model::data::{Corpus, Prepared, ReadSummary, STDIN, Tokens, counted};
use gd_model::io::tokenizer::Tokenizer;
use serde::Serialize;

use crate::context::usage;

/// Number of tokens of a text that are checked at a time.
const TOKENS_PER_CHECK: usize = 1 << 16;

/// Flags that define how files are split into documents.
#[derive(Debug, Clone, clap::Args)]
pub struct DocumentArgs {
    /// Field of a JSON record that contains its text (default: text)
    #[arg(long, value_name = "FIELD")]
    pub text_field: Option<String>,
    /// Line that separates the documents of a text file (default: each file is one document)
    #[arg(long, value_name = "LINE", allow_hyphen_values = true)]
    pub separator: Option<String>,
    /// Leave out JSON lines and records that cannot be used, and count them, instead of failing
    #[arg(long)]
    pub skip_bad_lines: bool,
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
        format.skip_bad_lines |= self.skip_bad_lines;
    }
}

/// An error of reading documents. One about bad lines also names the flags that help.
pub fn document_error(error: Error) -> anyhow::Error {
    match error {
        Error::Line { .. } | Error::Lines { .. } => {
            anyhow!(
                "{error}; --text-field names the field of the text, --skip-bad-lines leaves out bad lines"
            )
        }
        other => other.into(),
    }
}

/// Whether `paths` contains standard input, which can be read by one process and one time.
pub fn reads_stdin(paths: &[PathBuf]) -> bool {
    paths.iter().any(|path| path == Path::new(STDIN))
}

/// What a run reads: files and documents, as far as they were read here, and tokens.
#[derive(Debug, Clone, Serialize)]
pub struct DataSummary {
    /// What was read from files; `None` for prepared data.
    #[serde(flatten, skip_serializing_if = "Option::is_none")]
    pub read: Option<ReadSummary>,
    /// The training part.
    pub train: PartSummary,
    /// The validation part.
    pub valid: PartSummary,
}

/// The size of a part.
#[derive(Debug, Clone, Copy, Serialize)]
pub struct PartSummary {
    /// Documents, or parts of documents.
    pub documents: usize,
    /// Tokens.
    pub tokens: usize,
    /// Bytes of text.
    pub bytes: usize,
}

impl PartSummary {
    fn new(tokens: &Tokens, bytes: usize) -> Self {
        Self { documents: tokens.document_count(), tokens: tokens.len(), bytes }
    }
}

impl DataSummary {
    /// The summary of a corpus, and of the files that it was read from if it is no prepared data.
    pub fn new(corpus: &Corpus, read: Option<ReadSummary>) -> Self {
        let train = PartSummary::new(&corpus.train, corpus.train_bytes);
        Self { read, train, valid: PartSummary::new(&corpus.valid, corpus.valid_bytes) }
    }
}

impl std::fmt::Display for DataSummary {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match &self.read {
            Some(read) => writeln!(f, "data: {read}")?,
            None => writeln!(f, "data: prepared")?,
        }
        let part =
            |part: &PartSummary| format!("{} tokens in {}", part.tokens, counted(part.documents, "document"));
        write!(f, "training: {}; validation: ", part(&self.train))?;
        if self.valid.tokens == 0 { write!(f, "none") } else { write!(f, "{}", part(&self.valid)) }
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
