//! Records of JSON files: the text of a record, and the values of a file that is not one record per line.

use std::ops::Range;
use std::path::{Path, PathBuf};

use serde::de::IgnoredAny;
use serde_json::Value;

use super::source::Format;
use crate::config::DocumentFormat;
use crate::error::{Error, Result};
use crate::io::chat_template::ChatTemplate;

/// The field of a record that holds a chat.
const MESSAGES: &str = "messages";

/// The number of fields that an error lists.
const LISTED_FIELDS: usize = 8;

/// A record of a JSON file.
pub(super) struct Record {
    pub(super) value: Value,
    /// Its JSON text, in which the keys have their order.
    pub(super) json: Vec<u8>,
    /// The number of its first line, from 1.
    pub(super) line: usize,
    /// The number of bytes that were read for it.
    pub(super) bytes: u64,
}

/// The text of a record.
pub(super) struct RecordText {
    pub(super) text: String,
    /// Whether it is a chat, written by a chat template with its special tokens.
    pub(super) is_chat: bool,
    /// The bytes of the turns of the assistant, if they alone are to be learned.
    pub(super) turns: Option<Vec<Range<usize>>>,
}

/// Why a record has no text.
pub(super) enum BadRecord {
    /// The record cannot be used.
    Malformed(String),
    /// The record is a chat, and there is no template. It concerns all chats, so it is not the fault of the record.
    NoTemplate,
}

/// The text of a record: its text field, or else its chat as `template` writes it.
pub(super) fn record_text(
    Record { value: mut record, json, .. }: Record,
    format: &DocumentFormat,
    template: Option<&ChatTemplate>,
    marks_turns: bool,
) -> std::result::Result<RecordText, BadRecord> {
    let field = &format.text_field;
    let malformed = |reason: String| Err(BadRecord::Malformed(reason));
    match record.get_mut(field).map(Value::take) {
        Some(Value::String(text)) => return Ok(RecordText { text, is_chat: false, turns: None }),
        Some(messages @ Value::Array(_)) if field == MESSAGES => record[MESSAGES] = messages,
        Some(_) => return malformed(format!("{field:?} is not a string")),
        None => {}
    }
    if !record.get(MESSAGES).is_some_and(Value::is_array) {
        return malformed(match &record {
            Value::Object(fields) if fields.is_empty() => format!("no field {field:?}; the record is empty"),
            Value::Object(fields) => {
                let mut names: Vec<_> =
                    fields.keys().take(LISTED_FIELDS).map(|name| format!("{name:?}")).collect();
                if fields.len() > LISTED_FIELDS {
                    names.push("…".into());
                }
                format!("no field {field:?}; the record has {}", names.join(", "))
            }
            Value::Array(_) => {
                format!("no field {field:?} in an array (a .json file may hold an array of records)")
            }
            _ => format!("no field {field:?}, because the record is no object"),
        });
    }
    let Some(template) = template else { return Err(BadRecord::NoTemplate) };
    let rendered = match marks_turns {
        true => template.render_turns(&json).map(|(text, turns)| (text, Some(turns))),
        false => template.render_record(&json).map(|text| (text, None)),
    };
    match rendered {
        Ok((text, turns)) => Ok(RecordText { text, is_chat: true, turns }),
        Err(e) => malformed(e.to_string()),
    }
}

/// The error of a chat without a template, at a line of a file.
pub(super) fn no_template(path: &Path, line: usize) -> Error {
    Error::Invalid(format!(
        "{}:{line}: the record is a chat (\"messages\"), which needs the chat template of a model; prepare the data with \
         the tokenizer of a model that has one (gd data prepare --tokenizer MODEL/tokenizer.json), or give every record a \
         text field",
        path.display()
    ))
}

/// Why a line is no JSON, with the column of the error.
pub(super) fn json_reason(error: &serde_json::Error) -> String {
    format!("no JSON: {} (column {})", json_message(error), error.column())
}

fn json_message(error: &serde_json::Error) -> String {
    error.to_string().split(" at line ").next().unwrap_or_default().to_owned()
}

/// Whether a JSON file has one value per line: whether its first line is a whole value, and no array.
pub(super) fn is_json_lines(content: &[u8]) -> bool {
    let first = content.split(|&b| b == b'\n').map(<[u8]>::trim_ascii).find(|line| !line.is_empty());
    first.is_some_and(|line| !line.starts_with(b"[") && serde_json::from_slice::<IgnoredAny>(line).is_ok())
}

/// The format of a text without a name: JSON if it starts with a record or with an array of records.
pub(super) fn format_of(content: &[u8]) -> Format {
    let start = content.trim_ascii_start();
    let is_record = |text: &[u8]| text.trim_ascii_start().starts_with(b"{");
    match start.strip_prefix(b"[") {
        Some(elements) if is_record(elements) => Format::Json,
        None if is_record(start) && is_json_lines(content) => Format::JsonLines,
        _ => Format::Text,
    }
}

/// The elements of a JSON array, or consecutive JSON values, in a file that is in memory.
pub(super) struct Values {
    path: PathBuf,
    content: Vec<u8>,
    at: usize,
    /// Whether the values are the elements of an array.
    is_array: bool,
    /// The line of `counted`, from 1.
    line: usize,
    counted: usize,
}

impl Values {
    pub(super) fn new(path: &Path, content: Vec<u8>) -> Self {
        let start = content.len() - content.trim_ascii_start().len();
        let is_array = content.get(start) == Some(&b'[');
        Self { path: path.into(), at: start + usize::from(is_array), content, is_array, line: 1, counted: 0 }
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// The next value; `None` after the last one.
    ///
    /// # Errors
    /// [`Error::Foreign`] for text that is not JSON, after which the rest of the file cannot be read.
    pub(super) fn next(&mut self) -> Result<Option<Record>> {
        let from = self.at;
        self.skip_white_space();
        let is_first = self.content[..self.at].trim_ascii().len() <= 1;
        match (self.is_array, self.content.get(self.at).copied()) {
            (false, None) => return Ok(None),
            (true, Some(b']')) => return self.end(),
            (true, Some(b',')) if !is_first => {
                self.at += 1;
                self.skip_white_space();
            }
            (true, Some(_)) if !is_first => return Err(self.broken_here("`,` or `]` is expected")),
            (true, None) => return Err(self.broken_here("the array does not end")),
            _ => {}
        }
        let line = self.line();
        let mut values = serde_json::Deserializer::from_slice(&self.content[self.at..]).into_iter::<Value>();
        let value = values.next();
        let used = values.byte_offset();
        match value {
            Some(Ok(value)) => {
                let json = self.content[self.at..self.at + used].to_vec();
                self.at += used;
                Ok(Some(Record { value, json, line, bytes: (self.at - from) as u64 }))
            }
            Some(Err(e)) => Err(self.broken(line + e.line().saturating_sub(1), &json_message(&e))),
            None => Err(self.broken(line, "a value is expected")),
        }
    }

    /// The end of the array, after which the file must end.
    fn end(&mut self) -> Result<Option<Record>> {
        match self.content[self.at + 1..].trim_ascii().is_empty() {
            true => Ok(None),
            false => Err(self.broken_here("text follows the array")),
        }
    }

    fn skip_white_space(&mut self) {
        self.at = self.content.len() - self.content[self.at..].trim_ascii_start().len();
    }

    /// The number of the line of the current position.
    fn line(&mut self) -> usize {
        self.line += self.content[self.counted..self.at].iter().filter(|&&b| b == b'\n').count();
        self.counted = self.at;
        self.line
    }

    fn broken_here(&mut self, reason: &str) -> Error {
        let line = self.line();
        self.broken(line, reason)
    }

    fn broken(&self, line: usize, reason: &str) -> Error {
        Error::Foreign { path: self.path.clone(), kind: "JSON", reason: format!("line {line}: {reason}") }
    }
}
