//! Text files: reading, and the split into training and validation.

use std::collections::HashSet;
use std::path::{Path, PathBuf};

use crate::error::{Error, Result};

/// The file name endings that are read from a folder.
const TEXT_ENDINGS: [&str; 3] = ["txt", "md", "text"];

/// Reads one UTF-8 text file that is not empty.
pub fn read_text(path: &Path) -> Result<String> {
    let bytes = std::fs::read(path).map_err(|e| Error::read(path, "text file", e))?;
    if bytes.is_empty() {
        return Err(Error::Empty { path: path.into(), reason: "the file is empty" });
    }
    String::from_utf8(bytes)
        .map_err(|e| Error::InvalidUtf8 { path: path.into(), offset: e.utf8_error().valid_up_to() })
}

/// The files that `paths` stand for: a file is itself, a folder the text files in it and below, by name.
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
                reason: "the folder has no .txt, .md or .text file",
            });
        }
    }
    if files.is_empty() {
        return Err(Error::Invalid("no text file is given".into()));
    }
    Ok(files)
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
        } else if path.extension().is_some_and(|e| TEXT_ENDINGS.iter().any(|t| e.eq_ignore_ascii_case(t))) {
            files.push(path);
        }
    }
    Ok(())
}

/// How text is divided into training and validation.
#[derive(Clone, Debug, PartialEq)]
pub enum Split {
    /// The last `valid_fraction` of every file, cut after a line where one ends nearby.
    Position {
        /// In (0, 1).
        valid_fraction: f64,
    },
    /// Whole documents, evenly spread over the order in which they come. A document that repeats an earlier
    /// one to the letter is dropped, or it could stand on both sides.
    Documents {
        /// Share of the documents, in (0, 1).
        valid_fraction: f64,
        /// A line that ends a document, without its line break; `None`: every file is one document. The
        /// line itself stays in the text, at the end of its document.
        separator: Option<String>,
    },
}

/// Training and validation text, side by side.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Texts {
    /// One piece per file (`Position`) or document (`Documents`).
    pub train: Vec<String>,
    /// The same for validation.
    pub valid: Vec<String>,
}

impl Texts {
    /// Reads and splits files and folders.
    pub fn load(paths: &[PathBuf], split: &Split) -> Result<Self> {
        let texts = text_files(paths)?.iter().map(|p| read_text(p)).collect::<Result<Vec<_>>>()?;
        Self::split(&texts, split)
    }

    /// Splits texts that are in memory.
    pub fn split(texts: &[String], split: &Split) -> Result<Self> {
        let (Split::Position { valid_fraction } | Split::Documents { valid_fraction, .. }) = split;
        if !(*valid_fraction > 0.0 && *valid_fraction < 1.0) {
            return Err(Error::Invalid(format!(
                "the validation share must lie between 0 and 1 (both excluded), not {valid_fraction}"
            )));
        }
        match split {
            Split::Position { .. } => {
                let (train, valid) = texts
                    .iter()
                    .map(|text| text.split_at(cut(text, *valid_fraction)))
                    .map(|(t, v)| (t.to_string(), v.to_string()))
                    .unzip();
                Ok(Self { train, valid })
            }
            Split::Documents { separator, .. } => {
                let mut seen = HashSet::new();
                let documents: Vec<&str> = texts
                    .iter()
                    .flat_map(|text| documents(text, separator.as_deref()))
                    .filter(|document| !document.trim().is_empty() && seen.insert(*document))
                    .collect();
                let n = documents.len();
                if n < 2 {
                    return Err(Error::Invalid(format!(
                        "a split by document needs at least 2 different documents, not {n}"
                    )));
                }
                let wanted = ((n as f64 * valid_fraction).round() as usize).clamp(1, n - 1);
                let chosen: HashSet<usize> = (0..wanted).map(|i| (2 * i + 1) * n / (2 * wanted)).collect();
                let mut result = Self::default();
                for (i, document) in documents.into_iter().enumerate() {
                    let side = if chosen.contains(&i) { &mut result.valid } else { &mut result.train };
                    side.push(document.to_string());
                }
                Ok(result)
            }
        }
    }
}

/// Where validation starts: after the first line that ends in the earlier half of what it would take, or
/// else at the character at that share of the bytes.
fn cut(text: &str, valid_fraction: f64) -> usize {
    let from = boundary(text, (text.len() as f64 * (1.0 - valid_fraction)) as usize);
    let until = boundary(text, from + (text.len() - from) / 2);
    text[from..until].find('\n').map_or(from, |i| from + i + 1)
}

/// The last place between characters at or before byte `at`, which lies inside the text.
fn boundary(text: &str, at: usize) -> usize {
    (0..=at).rev().find(|&i| text.is_char_boundary(i)).unwrap_or(0)
}

/// The documents of one text, each with the separator line that ends it.
fn documents<'a>(text: &'a str, separator: Option<&str>) -> Vec<&'a str> {
    let Some(separator) = separator else { return vec![text] };
    let mut parts = Vec::new();
    let (mut start, mut end) = (0, 0);
    let mut content = false;
    for line in text.split_inclusive('\n') {
        end += line.len();
        if line.trim_end_matches(['\n', '\r']) == separator {
            // Separators without text between them separate nothing.
            if content {
                parts.push(&text[start..end]);
            }
            (start, content) = (end, false);
        } else {
            content |= !line.trim().is_empty();
        }
    }
    if content {
        parts.push(&text[start..]);
    }
    parts
}
