//! Text files, and their split into training and validation text.

use std::path::{Path, PathBuf};

use super::documents::{Document, Documents};
use crate::config::DocumentFormat;
use crate::error::{Error, Result};

/// The extensions of the files that are read from a folder.
const EXTENSIONS: [&str; 4] = ["txt", "md", "text", JSONL];
/// The extension of files with one JSON object per line.
const JSONL: &str = "jsonl";

/// The files of `paths`. A folder is replaced by the text and JSONL files in it and in its subfolders, sorted by name.
///
/// # Errors
/// A path that does not exist, a folder without such files, or no path.
pub fn text_files(paths: &[PathBuf]) -> Result<Vec<PathBuf>> {
    let mut files = Vec::new();
    for path in paths {
        let kind = std::fs::metadata(path).map_err(|e| Error::read(path, "text file or folder", e))?;
        if !kind.is_dir() {
            files.push(path.clone());
            continue;
        }
        let before = files.len();
        walk(path, &mut files)?;
        if files.len() == before {
            return Err(Error::Empty {
                path: path.clone(),
                reason: "the folder has no .txt, .md, .text or .jsonl file",
            });
        }
    }
    if files.is_empty() {
        return Err(Error::Invalid("no text file is given".into()));
    }
    Ok(files)
}

/// Whether the name of a file is that of a JSONL file.
pub fn is_jsonl(path: &Path) -> bool {
    has_extension(path, JSONL)
}

fn has_extension(path: &Path, extension: &str) -> bool {
    path.extension().is_some_and(|e| e.eq_ignore_ascii_case(extension))
}

/// Adds the text and JSONL files in a folder and its subfolders to `files`.
fn walk(folder: &Path, files: &mut Vec<PathBuf>) -> Result<()> {
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
            walk(&path, files)?;
        } else if EXTENSIONS.iter().any(|extension| has_extension(&path, extension)) {
            files.push(path);
        }
    }
    Ok(())
}

/// Training and validation texts.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Texts {
    /// Documents for training, and the first parts of whole files.
    pub train: Vec<String>,
    /// Documents for validation, and the last parts of whole files.
    pub valid: Vec<String>,
}

impl Texts {
    /// Reads files and folders and splits their documents, see [`Document::split`].
    ///
    /// # Errors
    /// Names the file that cannot be read, or the malformed line of a JSONL file.
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
    /// A fraction for validation outside (0, 1).
    pub fn split(files: &[String], valid_fraction: f64) -> Result<Self> {
        let document = |text: &String| Ok(Document { text: text.clone(), is_file: true, bytes: 0 });
        Self::from_documents(files.iter().map(document), valid_fraction)
    }

    fn from_documents(
        documents: impl Iterator<Item = Result<Document>>,
        valid_fraction: f64,
    ) -> Result<Self> {
        check_fraction(valid_fraction)?;
        let mut result = Self::default();
        for document in documents {
            let document = document?;
            let (train, valid) = document.split(valid_fraction);
            for (side, text) in [(&mut result.train, train), (&mut result.valid, valid)] {
                if !text.is_empty() {
                    side.push(text.to_owned());
                }
            }
        }
        Ok(result)
    }
}

/// Checks that the fraction of the text for validation is in (0, 1).
pub(super) fn check_fraction(valid_fraction: f64) -> Result<()> {
    if valid_fraction > 0.0 && valid_fraction < 1.0 {
        return Ok(());
    }
    Err(Error::out_of_range("the fraction for validation", valid_fraction, "in (0, 1)"))
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
