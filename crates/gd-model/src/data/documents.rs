//! Reading documents: whole text files, the parts of text files between separator lines, and the records of JSON files.

use std::fmt;
use std::io::{Cursor, Read};
use std::ops::Range;
use std::path::{Path, PathBuf};

#[cfg(feature = "parquet")]
use super::parquet::Rows;
use super::records::{
    BadRecord, Record, RecordText, Values, format_of, is_json_lines, json_reason, no_template, record_text,
};
use super::source::{self, Format, Reader, Source};
use super::summary::ReadSummary;
use super::text::{split_position, text_files};
use crate::config::DocumentFormat;
use crate::error::{Error, Result};
use crate::io::chat_template::ChatTemplate;
use crate::io::files::decode_utf8;
use crate::io::tokenizer::Tokenizer;

/// The byte-order mark of UTF-8, which may also stand where files were joined.
const UTF8_MARK: &[u8] = "\u{feff}".as_bytes();

/// The number of messages of a kind that are logged, such as those about bad lines. The others are counted.
const MAX_MESSAGES: usize = 5;

/// One document.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Document {
    /// The text, which is not only white space.
    pub text: String,
    /// Whether the document is a whole text file.
    pub is_file: bool,
    /// Whether the document is a chat, written by a chat template with its special tokens.
    pub is_chat: bool,
    /// The byte ranges of the text that are to be learned, see [`Documents::with_marked_turns`]; `None` for all of it.
    pub turns: Option<Vec<Range<usize>>>,
    /// The number of bytes that were read from its file.
    pub bytes: u64,
}

impl Document {
    /// The parts for training and for validation. The last `valid_fraction` of a whole file is for validation. Any other
    /// document belongs to one side as a whole, chosen by a hash of its text, so that equal texts are on the same side.
    /// With a fraction of 0 every text is for training.
    pub fn split(&self, valid_fraction: f64) -> (&str, &str) {
        if valid_fraction == 0.0 {
            return (&self.text, "");
        }
        if self.is_file {
            return self.text.split_at(split_position(&self.text, valid_fraction));
        }
        let hash = blake3::hash(self.text.as_bytes());
        let place = hash.as_bytes().iter().take(8).fold(0u64, |all, &b| all << 8 | u64::from(b));
        let valid = (place as f64) < valid_fraction * u64::MAX as f64;
        self.text.split_at(if valid { 0 } else { self.text.len() })
    }
}

/// The ids of the text of a document or of a part of it. A chat has the special tokens that its template wrote and no
/// others; any other text is encoded as [`Tokenizer::encode_document`] does.
///
/// # Errors
/// As [`Tokenizer::encode`].
pub fn encode_text(tokenizer: &Tokenizer, text: &str, is_chat: bool) -> Result<Vec<u32>> {
    if is_chat { tokenizer.encode_written(text) } else { tokenizer.encode_document(text) }
}

/// The ids of a chat, and for each whether a part of its text is in one of `turns`, the byte ranges that are to be learned.
///
/// # Errors
/// As [`Tokenizer::encode`].
pub fn encode_turns(tokenizer: &Tokenizer, text: &str, turns: &[Range<usize>]) -> Result<Vec<(u32, bool)>> {
    // As transformers marks the tokens of a generation block.
    let learned =
        |token: &Range<usize>| turns.iter().any(|turn| turn.start < token.end && token.start < turn.end);
    let tokens = tokenizer.encode_with_ranges(text)?.into_iter();
    Ok(tokens.map(|(id, range)| (id, learned(&range))).collect())
}

/// An iterator over the documents of files, in their order.
///
/// Bad lines are logged, the first few of them one by one. Unless [`DocumentFormat::skip_bad_lines`] is set, no documents
/// are returned after the first one: the other lines are only checked, and the last item is an error.
#[derive(Debug)]
pub struct Documents {
    files: std::vec::IntoIter<PathBuf>,
    format: DocumentFormat,
    template: Option<ChatTemplate>,
    marks_turns: bool,
    /// The files and folders that were given.
    paths: Vec<PathBuf>,
    /// The file that is being read.
    path: Option<PathBuf>,
    /// The rest of it, if it has several documents.
    open: Option<OpenFile>,
    /// The number of documents and bad lines of the open file.
    in_file: usize,
    /// The first files without documents.
    empty: Vec<PathBuf>,
    /// The error of the first bad line.
    first_bad: Option<Error>,
    /// The number of lines that were separators; `None` if no file was divided by lines.
    separators: Option<usize>,
    summary: ReadSummary,
    /// Whether the last item has been returned.
    ended: bool,
}

/// A file with several documents.
enum OpenFile {
    /// JSON records, one per line.
    Records(Lines),
    /// Text between separators.
    Parts(Lines),
    /// Other JSON.
    Values(Values),
    /// The rows of a parquet file.
    #[cfg(feature = "parquet")]
    Rows(Box<Rows>),
}

impl fmt::Debug for OpenFile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let path = match self {
            Self::Records(lines) | Self::Parts(lines) => &lines.path,
            Self::Values(values) => values.path(),
            #[cfg(feature = "parquet")]
            Self::Rows(rows) => rows.path(),
        };
        f.debug_tuple("OpenFile").field(&path).finish()
    }
}

impl OpenFile {
    /// A file that is read line by line: text, or one record per line.
    fn lines(path: &Path, reader: Reader, format: Format) -> Self {
        let lines = Lines { path: path.into(), reader, number: 0 };
        if format == Format::Text { Self::Parts(lines) } else { Self::Records(lines) }
    }
}

/// A file that is read line by line.
struct Lines {
    path: PathBuf,
    reader: Reader,
    /// The number of the last line read, counted from 1.
    number: usize,
}

impl Lines {
    /// The next line with its line break; empty at the end of the file.
    fn next(&mut self) -> Result<Vec<u8>> {
        let mut line = Vec::new();
        self.number += 1;
        self.reader.read_until(b'\n', &mut line).map_err(|e| Error::read(&self.path, "text file", e))?;
        Ok(line)
    }

    fn malformed(&self, reason: String) -> Error {
        Error::Line { path: self.path.clone(), line: self.number, reason }
    }

    /// The record of the next line that is not blank; `None` at the end of the file.
    fn record(&mut self) -> Result<Option<Record>> {
        loop {
            let line = self.next()?;
            if line.is_empty() {
                return Ok(None);
            }
            let json = line.strip_prefix(UTF8_MARK).unwrap_or(&line);
            if !json.trim_ascii().is_empty() {
                let value = serde_json::from_slice(json).map_err(|e| self.malformed(json_reason(&e)))?;
                let (json, bytes) = (json.to_vec(), line.len() as u64);
                return Ok(Some(Record { value, json, line: self.number, bytes }));
            }
        }
    }

    /// The text before the next separator, its length with the separator, and whether there was one; `None` at the end
    /// of the file.
    fn part(&mut self, format: &DocumentFormat) -> Result<Option<(String, u64, bool)>> {
        let (mut text, mut bytes) = (Vec::new(), 0);
        let separated = loop {
            let line = self.next()?;
            bytes += line.len() as u64;
            if line.is_empty() {
                break false;
            }
            let content = line.strip_suffix(b"\n").unwrap_or(&line);
            if format.is_separator(content.strip_suffix(b"\r").unwrap_or(content)) {
                break true;
            }
            text.extend_from_slice(&line);
        };
        if bytes == 0 {
            return Ok(None);
        }
        let text = String::from_utf8(text)
            .map_err(|_| self.malformed("invalid UTF-8 in the document that ends here".into()))?;
        Ok(Some((text, bytes, separated)))
    }
}

impl Documents {
    /// The documents of files and folders; the path [`STDIN`](super::STDIN) stands for standard input.
    ///
    /// # Errors
    /// A file or folder that does not exist, a folder without text files, or a separator of several lines.
    pub fn open(paths: &[PathBuf], format: &DocumentFormat) -> Result<Self> {
        format.validate()?;
        Ok(Self {
            files: text_files(paths)?.into_iter(),
            format: format.clone(),
            template: None,
            marks_turns: false,
            paths: paths.to_vec(),
            path: None,
            open: None,
            in_file: 0,
            empty: Vec::new(),
            first_bad: None,
            separators: None,
            summary: ReadSummary::default(),
            ended: false,
        })
    }

    /// The same with a template that writes chats (records with `messages`) as text. Without one they are errors.
    #[must_use]
    pub fn with_chat_template(self, template: Option<ChatTemplate>) -> Self {
        Self { template, ..self }
    }

    /// The same with the turns of the assistant marked in every chat, which a training then learns alone.
    #[must_use]
    pub fn with_marked_turns(self) -> Self {
        Self { marks_turns: true, ..self }
    }

    /// What has been read so far.
    pub fn summary(&self) -> ReadSummary {
        self.summary
    }

    /// Opens a file. Returns its document if it is one as a whole.
    fn open_file(&mut self, path: &Path) -> Result<Option<Document>> {
        if Format::of(path) == Format::Parquet {
            return self.open_parquet(path).map(|()| None);
        }
        let Source { mut reader, mark_bytes } = source::open(path)?;
        (self.open, self.in_file) = (None, 0);
        self.summary.files += 1;
        let divided = self.format.separator.is_some();
        let mut format = Format::of(path);
        if format == Format::JsonLines || (format == Format::Text && divided) {
            self.open = Some(OpenFile::lines(path, reader, format));
            return Ok(None);
        }
        let mut content = Vec::new();
        reader.read_to_end(&mut content).map_err(|e| Error::read(path, "text file", e))?;
        if format == Format::Unnamed {
            format = format_of(&content);
        }
        if format == Format::Text && !divided {
            let bytes = (mark_bytes + content.len()) as u64;
            let text = decode_utf8(path, content, mark_bytes)?;
            return Ok(Some(Document { text, is_file: true, is_chat: false, turns: None, bytes }));
        }
        self.open = Some(match format {
            Format::Json if !is_json_lines(&content) => OpenFile::Values(Values::new(path, content)),
            _ => OpenFile::lines(path, Box::new(Cursor::new(content)), format),
        });
        Ok(None)
    }

    #[cfg(feature = "parquet")]
    fn open_parquet(&mut self, path: &Path) -> Result<()> {
        self.open = Some(OpenFile::Rows(Box::new(Rows::open(path, &self.format.text_field)?)));
        self.in_file = 0;
        self.summary.files += 1;
        Ok(())
    }

    #[cfg(not(feature = "parquet"))]
    fn open_parquet(&mut self, path: &Path) -> Result<()> {
        Err(source::parquet_unsupported(path))
    }

    /// The next document of the open file; `None` at its end.
    fn next_in_file(&mut self) -> Result<Option<Document>> {
        let (record, path) = match &mut self.open {
            None => return Ok(None),
            Some(OpenFile::Parts(lines)) => {
                let Some((text, bytes, separated)) = lines.part(&self.format)? else { return Ok(None) };
                *self.separators.get_or_insert(0) += usize::from(separated);
                return Ok(Some(Document { text, is_file: false, is_chat: false, turns: None, bytes }));
            }
            Some(OpenFile::Records(lines)) => (lines.record()?, lines.path.clone()),
            Some(OpenFile::Values(values)) => (values.next()?, values.path().to_path_buf()),
            #[cfg(feature = "parquet")]
            Some(OpenFile::Rows(rows)) => (rows.next()?, rows.path().to_path_buf()),
        };
        let Some(record) = record else { return Ok(None) };
        let (line, bytes) = (record.line, record.bytes);
        match record_text(record, &self.format, self.template.as_ref(), self.marks_turns) {
            Ok(RecordText { text, is_chat, turns }) => {
                Ok(Some(Document { text, is_file: false, is_chat, turns, bytes }))
            }
            Err(BadRecord::Malformed(reason)) => Err(Error::Line { path, line, reason }),
            Err(BadRecord::NoTemplate) => Err(no_template(&path, line)),
        }
    }

    /// The next document, of any file; `None` after the last file.
    fn advance(&mut self) -> Result<Option<Document>> {
        loop {
            if let Some(document) = self.next_in_file()? {
                return Ok(Some(document));
            }
            self.close_file();
            let Some(path) = self.files.next() else { return Ok(None) };
            let opened = self.open_file(&path);
            self.path = Some(path);
            if let Some(document) = opened? {
                return Ok(Some(document));
            }
        }
    }

    /// Ends a file; one without documents and bad lines is empty.
    fn close_file(&mut self) {
        let Some(path) = self.path.take() else { return };
        self.open = None;
        if self.in_file == 0 {
            self.summary.empty_files += 1;
            self.empty.extend((self.empty.len() < MAX_MESSAGES).then_some(path));
        }
    }

    /// Counts a bad line and logs the first few.
    fn count_bad_line(&mut self, error: Error) {
        self.in_file += 1;
        self.summary.bad_lines += 1;
        if self.summary.bad_lines <= MAX_MESSAGES {
            match self.format.skip_bad_lines {
                true => tracing::warn!("{error}"),
                false => tracing::error!("{error}"),
            }
        }
        self.first_bad.get_or_insert(error);
    }

    /// The error after the last file, if there is one.
    fn end(&mut self) -> Option<Error> {
        let ReadSummary { documents, bad_lines, empty_files, .. } = self.summary;
        if documents == 0 && bad_lines == 0 {
            let names: Vec<_> = self.paths.iter().map(|path| path.display().to_string()).collect();
            return Some(Error::Invalid(format!("{}: empty, there is no text", names.join(", "))));
        }
        for path in self.empty.drain(..) {
            tracing::warn!("{}: the file is empty and is left out", path.display());
        }
        for (count, what) in [(bad_lines, "bad lines"), (empty_files, "empty files")] {
            if count > MAX_MESSAGES {
                tracing::warn!("{} more {what}, {count} in all", count - MAX_MESSAGES);
            }
        }
        if let (Some(separator), Some(0)) = (&self.format.separator, self.separators.take()) {
            tracing::warn!(
                "no line of the text files is the separator {separator:?}: each file is one document"
            );
        }
        match self.first_bad.take() {
            Some(first) if !self.format.skip_bad_lines || documents == 0 => Some(match bad_lines {
                1 => first,
                count => Error::Lines { first: Box::new(first), count },
            }),
            _ => None,
        }
    }
}

impl Iterator for Documents {
    type Item = Result<Document>;

    fn next(&mut self) -> Option<Self::Item> {
        while !self.ended {
            match self.advance() {
                Ok(Some(document)) if document.text.trim().is_empty() => {
                    self.summary.blank_documents += usize::from(!document.is_file);
                }
                Ok(Some(document)) => {
                    self.in_file += 1;
                    if self.first_bad.is_none() || self.format.skip_bad_lines {
                        self.summary.documents += 1;
                        self.summary.bytes += document.text.len() as u64;
                        return Some(Ok(document));
                    }
                }
                Err(e @ Error::Line { .. }) => self.count_bad_line(e),
                Err(e) => {
                    self.ended = true;
                    return Some(Err(e));
                }
                Ok(None) => {
                    self.ended = true;
                    return self.end().map(Err);
                }
            }
        }
        None
    }
}
