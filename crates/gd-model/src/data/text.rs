//! Text files, and their split into training and validation text.

use std::ops::Range;
use std::path::{Path, PathBuf};

use super::documents::{Document, Documents};
use super::source::{Format, is_stdin, text_extension};
use super::summary::counted;
use crate::config::DocumentFormat;
use crate::error::{Error, Result};

/// The extensions of the files that are read from a folder; each may be followed by that of a compressed file.
const EXTENSIONS: [&str; 6] = ["txt", "md", "text", "jsonl", "ndjson", "parquet"];

/// The files of `paths`. A folder is replaced by the text, JSONL and parquet files in it and in its subfolders, sorted by name.
///
/// # Errors
/// A path that does not exist, a folder without such files, or no path.
pub fn text_files(paths: &[PathBuf]) -> Result<Vec<PathBuf>> {
    let mut files = Vec::new();
    for path in paths {
        if is_stdin(path) || !metadata(path)?.is_dir() {
            files.push(path.clone());
            continue;
        }
        let (before, mut others) = (files.len(), Vec::new());
        walk(path, &mut files, &mut others)?;
        match others.first() {
            _ if files.len() > before && others.is_empty() => {}
            Some(other) if files.len() > before => tracing::warn!(
                "{}: {} other files are not read, such as {} (.txt, .md, .text, .jsonl, .ndjson and .parquet are)",
                path.display(),
                others.len(),
                other.display()
            ),
            _ => {
                return Err(Error::Empty {
                    path: path.clone(),
                    reason: "the folder has no .txt, .md, .text, .jsonl, .ndjson or .parquet file",
                });
            }
        }
    }
    if files.is_empty() {
        return Err(Error::Invalid("no text file is given".into()));
    }
    Ok(files)
}

fn metadata(path: &Path) -> Result<std::fs::Metadata> {
    std::fs::metadata(path).map_err(|e| Error::read(path, "text file or folder", e))
}

/// Whether the name of a file is that of a JSONL file, compressed or not.
pub fn is_jsonl(path: &Path) -> bool {
    Format::of(path) == Format::JsonLines
}

/// Adds the files with such extensions in a folder and its subfolders to `files`, and the others to `others`.
fn walk(folder: &Path, files: &mut Vec<PathBuf>, others: &mut Vec<PathBuf>) -> Result<()> {
    let unreadable = |e| Error::read(folder, "folder", e);
    let mut entries = std::fs::read_dir(folder)
        .and_then(Iterator::collect::<std::io::Result<Vec<_>>>)
        .map_err(unreadable)?;
    // The order of the file system differs between machines.
    entries.sort_by_key(std::fs::DirEntry::file_name);
    for entry in entries {
        let path = entry.path();
        // Links to folders are not followed, so that the walk ends.
        if entry.file_type().map_err(unreadable)?.is_dir() {
            walk(&path, files, others)?;
        } else if EXTENSIONS.contains(&text_extension(&path).as_str()) {
            files.push(path);
        } else {
            others.push(path);
        }
    }
    Ok(())
}

/// A text for training or for validation.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Text {
    /// The text.
    pub text: String,
    /// Whether it is a chat, see [`Document::is_chat`].
    pub is_chat: bool,
    /// The byte ranges that are to be learned, see [`Document::turns`].
    pub turns: Option<Vec<Range<usize>>>,
}

impl AsRef<str> for Text {
    fn as_ref(&self) -> &str {
        &self.text
    }
}

/// Training and validation texts.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Texts {
    /// Documents for training, and the first parts of whole files.
    pub train: Vec<Text>,
    /// Documents for validation, and the last parts of whole files. It is empty in a training without validation.
    pub valid: Vec<Text>,
}

impl Texts {
    /// Reads files and folders and splits their documents, see [`Texts::from_documents`].
    ///
    /// # Errors
    /// As [`Texts::from_documents`].
    pub fn load(paths: &[PathBuf], format: &DocumentFormat, valid_fraction: f64) -> Result<Self> {
        Self::from_documents(Documents::open(paths, format)?, valid_fraction)
    }

    /// Splits texts in memory, each like a whole file.
    ///
    /// ```
    /// use gd_model::data::{Corpus, Texts};
    /// use gd_model::io::tokenizer::Tokenizer;
    ///
    /// let texts = Texts::split(&["one two three four five six seven eight nine ten ".repeat(10)], 0.2)?;
    /// let corpus = Corpus::encode(&texts, &Tokenizer::bytes()?)?;
    /// assert_eq!(corpus.train_bytes + corpus.valid_bytes, 490);
    /// assert_eq!(corpus.train.len(), corpus.train_bytes);
    /// # Ok::<(), gd_model::Error>(())
    /// ```
    ///
    /// # Errors
    /// As [`Texts::from_documents`].
    pub fn split(files: &[String], valid_fraction: f64) -> Result<Self> {
        let document = |text: &String| {
            Ok(Document { text: text.clone(), is_file: true, is_chat: false, turns: None, bytes: 0 })
        };
        Self::from_documents(files.iter().map(document), valid_fraction)
    }

    /// Splits documents, see [`Document::split`]. If one of the two sides has no text, as with a single document, all of
    /// it is for training, and a warning says so.
    ///
    /// # Errors
    /// The error of a document, or a fraction for validation outside [0, 1).
    pub fn from_documents(
        documents: impl Iterator<Item = Result<Document>>,
        valid_fraction: f64,
    ) -> Result<Self> {
        check_fraction(valid_fraction)?;
        let mut result = Self::default();
        for document in documents {
            let mut document = document?;
            // Without a copy of the larger part.
            let at = document.split(valid_fraction).0.len();
            let valid = match at {
                0 => std::mem::take(&mut document.text),
                at => document.text.split_off(at),
            };
            for (side, text) in [(&mut result.train, document.text), (&mut result.valid, valid)] {
                if !text.is_empty() {
                    // A chat is on one side as a whole, so its turns are those of the document.
                    side.push(Text { text, is_chat: document.is_chat, turns: document.turns.clone() });
                }
            }
        }
        if valid_fraction > 0.0 && (result.train.is_empty() || result.valid.is_empty()) {
            result.train.append(&mut result.valid);
            tracing::warn!("{}", without_validation(result.train.len(), valid_fraction));
        }
        Ok(result)
    }
}

/// The warning that documents cannot be split into training and validation text.
pub(super) fn without_validation(documents: usize, valid_fraction: f64) -> String {
    format!(
        "{} cannot be split by a validation fraction of {valid_fraction}: all text is for training, and there is no \
         validation",
        counted(documents, "document")
    )
}

/// Checks that the fraction of the text for validation is in [0, 1).
pub(super) fn check_fraction(valid_fraction: f64) -> Result<()> {
    if (0.0..1.0).contains(&valid_fraction) {
        return Ok(());
    }
    Err(Error::out_of_range("the fraction for validation", valid_fraction, "in [0, 1)"))
}

/// The byte at which the validation part of a text starts: `valid_fraction` of the bytes before the end, or after the
/// first line that ends in the first half of this part.
pub(super) fn split_position(text: &str, valid_fraction: f64) -> usize {
    let from = boundary(text, (text.len() as f64 * (1.0 - valid_fraction)) as usize);
    let until = boundary(text, from + (text.len() - from) / 2);
    text[from..until].find('\n').map_or(from, |i| from + i + 1)
}

/// The last character boundary at or before byte `at`, which must not exceed the length.
fn boundary(text: &str, at: usize) -> usize {
    (0..=at).rev().find(|&i| text.is_char_boundary(i)).unwrap_or(0)
}
