//! Reading documents: whole text files, the parts of text files between separator lines, and the lines of JSONL files.

use std::fs::File;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};

use super::text::{is_jsonl, split_position, text_files};
use crate::config::DocumentFormat;
use crate::error::{Error, Result};
use crate::io::files::read_text;

/// One document.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Document {
    /// The text, which is not only white space.
    pub text: String,
    /// Whether the document is a whole text file.
    pub is_file: bool,
    /// The number of bytes that were read from its file.
    pub bytes: u64,
}

impl Document {
    /// The parts for training and for validation. The last `valid_fraction` of a whole file is for validation. Any other
    /// document belongs to one side as a whole, chosen by a hash of its text, so that equal texts are on the same side.
    pub fn split(&self, valid_fraction: f64) -> (&str, &str) {
        if self.is_file {
            return self.text.split_at(split_position(&self.text, valid_fraction));
        }
        let hash = blake3::hash(self.text.as_bytes());
        let place = hash.as_bytes().iter().take(8).fold(0u64, |all, &b| all << 8 | u64::from(b));
        let valid = (place as f64) < valid_fraction * u64::MAX as f64;
        self.text.split_at(if valid { 0 } else { self.text.len() })
    }
}

/// An iterator over the documents of files, in their order. Every malformed line is logged. After the first one no
/// documents are returned: the other lines are only checked, and the last item is an error.
#[derive(Debug)]
pub struct Documents {
    files: std::vec::IntoIter<PathBuf>,
    format: DocumentFormat,
    open: Option<Lines>,
    /// The error of the first malformed line, and the number of all malformed lines.
    malformed: Option<(Error, usize)>,
}

/// A file that is read line by line.
#[derive(Debug)]
struct Lines {
    path: PathBuf,
    file: BufReader<File>,
    /// The number of the last line read, counted from 1.
    number: usize,
}

impl Lines {
    fn open(path: &Path) -> Result<Self> {
        let file = File::open(path).map_err(|e| Error::read(path, "text file", e))?;
        Ok(Self { path: path.into(), file: BufReader::with_capacity(1 << 16, file), number: 0 })
    }

    /// The next line with its line break; empty at the end of the file.
    fn next(&mut self) -> Result<Vec<u8>> {
        let mut line = Vec::new();
        self.number += 1;
        self.file.read_until(b'\n', &mut line).map_err(|e| Error::read(&self.path, "text file", e))?;
        Ok(line)
    }

    fn malformed(&self, reason: String) -> Error {
        Error::Line { path: self.path.clone(), line: self.number, reason }
    }

    /// The document of the next JSONL line that is not blank; `None` at the end of the file.
    fn json(&mut self, field: &str) -> Result<Option<Document>> {
        let line = loop {
            let line = self.next()?;
            if line.is_empty() {
                return Ok(None);
            }
            if !line.trim_ascii().is_empty() {
                break line;
            }
        };
        let mut value: serde_json::Value =
            serde_json::from_slice(&line).map_err(|e| self.malformed(format!("no JSON: {e}")))?;
        let bytes = line.len() as u64;
        match value.get_mut(field).map(serde_json::Value::take) {
            Some(serde_json::Value::String(text)) => Ok(Some(Document { text, is_file: false, bytes })),
            Some(_) => Err(self.malformed(format!("{field:?} is not a string"))),
            None => Err(self.malformed(format!("no field {field:?}"))),
        }
    }

    /// The lines before the next separator; `None` at the end of the file.
    fn before(&mut self, separator: &str) -> Result<Option<Document>> {
        let (mut text, mut bytes) = (Vec::new(), 0);
        loop {
            let line = self.next()?;
            bytes += line.len() as u64;
            let ends = line.trim_ascii_end() == separator.as_bytes();
            if !ends {
                text.extend_from_slice(&line);
            }
            if line.is_empty() && bytes == 0 {
                return Ok(None);
            }
            if line.is_empty() || ends {
                break;
            }
        }
        let text = String::from_utf8(text)
            .map_err(|_| self.malformed("invalid UTF-8 in the document that ends here".into()))?;
        Ok(Some(Document { text, is_file: false, bytes }))
    }
}

impl Documents {
    /// The documents of files and folders.
    ///
    /// # Errors
    /// A file or folder that does not exist, or a folder without text files.
    pub fn open(paths: &[PathBuf], format: &DocumentFormat) -> Result<Self> {
        let files = text_files(paths)?.into_iter();
        Ok(Self { files, format: format.clone(), open: None, malformed: None })
    }

    /// The next document of the open file, or of the next one; `None` after the last file.
    fn advance(&mut self) -> Result<Option<Document>> {
        loop {
            if let Some(lines) = &mut self.open {
                let next = match &self.format.separator {
                    _ if is_jsonl(&lines.path) => lines.json(&self.format.text_field),
                    Some(separator) => lines.before(separator),
                    None => Ok(None),
                };
                match next? {
                    Some(document) => return Ok(Some(document)),
                    None => self.open = None,
                }
            }
            let Some(path) = self.files.next() else { return Ok(None) };
            if is_jsonl(&path) || self.format.separator.is_some() {
                self.open = Some(Lines::open(&path)?);
            } else {
                let text = read_text(&path)?;
                let bytes = text.len() as u64;
                return Ok(Some(Document { text, is_file: true, bytes }));
            }
        }
    }
}

impl Iterator for Documents {
    type Item = Result<Document>;

    fn next(&mut self) -> Option<Self::Item> {
        loop {
            match self.advance() {
                Ok(Some(document)) if self.malformed.is_none() && !document.text.trim().is_empty() => {
                    return Some(Ok(document));
                }
                Ok(Some(_)) => {}
                Err(e @ Error::Line { .. }) => {
                    tracing::error!("{e}");
                    let (_, count) = self.malformed.get_or_insert((e, 0));
                    *count += 1;
                }
                Err(e) => {
                    (self.files, self.open, self.malformed) = (Vec::new().into_iter(), None, None);
                    return Some(Err(e));
                }
                Ok(None) => {
                    let (first, count) = self.malformed.take()?;
                    return Some(Err(match count {
                        1 => first,
                        _ => Error::Lines { first: Box::new(first), count },
                    }));
                }
            }
        }
    }
}
