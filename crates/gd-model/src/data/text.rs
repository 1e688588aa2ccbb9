//! Text files: reading, and the split into training and validation.

use std::path::{Path, PathBuf};

use super::documents::{Document, Documents};
use crate::config::DocumentFormat;
use crate::error::{Error, Result};

/// The file name endings that are read from a folder.
const ENDINGS: [&str; 4] = ["txt", "md", "text", JSONL];
/// The ending of files with one JSON object a line.
const JSONL: &str = "jsonl";

/// The files that `paths` stand for: a file is itself, a folder the text and JSONL files in it and
/// below, by name.
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

/// Whether a file holds one JSON object a line.
pub fn is_jsonl(path: &Path) -> bool {
    has_ending(path, JSONL)
}

fn has_ending(path: &Path, ending: &str) -> bool {
    path.extension().is_some_and(|e| e.eq_ignore_ascii_case(ending))
}

fn walk(folder: &Path, files: &mut Vec<PathBuf>) -> Result<()> {
    let unreadable = |e| Error::read(folder, "folder", e);
    let mut entries = std::fs::read_dir(folder)
        .and_then(Iterator::collect::<std::io::Result<Vec<_>>>)
        .map_err(unreadable)?;
    // The system's order differs from machine to machine.
    entries.sort_by_key(std::fs::DirEntry::file_name);
    for entry in entries {
        let path = entry.path();
        // A link to a folder is not followed, so that the walk ends.
        if entry.file_type().map_err(unreadable)?.is_dir() {
            walk(&path, files)?;
        } else if ENDINGS.iter().any(|ending| has_ending(&path, ending)) {
            files.push(path);
        }
    }
    Ok(())
}

/// Training and validation text, side by side.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Texts {
    /// Whole documents, and the first parts of files.
    pub train: Vec<String>,
    /// The same for validation.
    pub valid: Vec<String>,
}

impl Texts {
    /// Reads files and folders and splits their documents, see [`Document::split`](super::Document::split).
    ///
    /// # Errors
    /// Names the file, and in JSONL files the line, that cannot be used.
    pub fn load(paths: &[PathBuf], format: &DocumentFormat, valid_fraction: f64) -> Result<Self> {
        Self::of(Documents::open(paths, format)?, valid_fraction)
    }

    /// Splits whole files that are in memory.
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
    /// A share for validation outside (0, 1).
    pub fn split(files: &[String], valid_fraction: f64) -> Result<Self> {
        let document = |text: &String| Ok(Document { text: text.clone(), is_file: true, bytes: 0 });
        Self::of(files.iter().map(document), valid_fraction)
    }

    fn of(documents: impl Iterator<Item = Result<Document>>, valid_fraction: f64) -> Result<Self> {
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

/// Fails unless `valid_fraction` leaves something on both sides.
pub(super) fn check_fraction(valid_fraction: f64) -> Result<()> {
    if valid_fraction > 0.0 && valid_fraction < 1.0 {
        return Ok(());
    }
    Err(Error::out_of_range("the fraction for validation", valid_fraction, "in (0, 1)"))
}

/// Where validation starts: after the first line that ends in the earlier half of what it would take, or
/// else at the character at that share of the bytes.
pub(super) fn cut(text: &str, valid_fraction: f64) -> usize {
    let from = boundary(text, (text.len() as f64 * (1.0 - valid_fraction)) as usize);
    let until = boundary(text, from + (text.len() - from) / 2);
    text[from..until].find('\n').map_or(from, |i| from + i + 1)
}

/// The last place between characters at or before byte `at`, which lies inside the text.
fn boundary(text: &str, at: usize) -> usize {
    (0..=at).rev().find(|&i| text.is_char_boundary(i)).unwrap_or(0)
}
