//! The rows of parquet files as records. Of a file that has the text field, that column alone is read.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use parquet::file::reader::{FileReader, SerializedFileReader};
use parquet::record::Field;
use parquet::record::reader::RowIter;
use parquet::schema::types::Type;

use super::records::Record;
use crate::error::{Error, Result};
use crate::io::files::open_file;
use crate::io::panic::catch_panic;

/// A parquet file that is read row by row.
pub(super) struct Rows {
    path: PathBuf,
    rows: RowIter<'static>,
    /// The number of the last row, from 1.
    row: usize,
}

impl Rows {
    /// Opens a file whose rows have their text in the column `text_field`, or are chats.
    ///
    /// # Errors
    /// A file that cannot be read, or that is no parquet file.
    pub(super) fn open(path: &Path, text_field: &str) -> Result<Self> {
        let file = open_file(path, "parquet file")?;
        let open = || {
            let reader = SerializedFileReader::new(file)?;
            let columns = projection(reader.metadata().file_metadata().schema(), text_field)?;
            RowIter::from_file_into(Box::new(reader)).project(columns)
        };
        let rows = guarded(path, open)?;
        Ok(Self { path: path.into(), rows, row: 0 })
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// The next row; `None` after the last one. After an error there are no more rows.
    pub(super) fn next(&mut self) -> Result<Option<Record>> {
        let row = guarded(&self.path, || self.rows.next().transpose())?;
        let Some(row) = row else { return Ok(None) };
        self.row += 1;
        let mut json = String::new();
        write_json(&mut json, &Field::Group(row));
        let value = serde_json::from_str(&json).map_err(|e| foreign(&self.path, e.to_string()))?;
        let bytes = json.len() as u64;
        Ok(Some(Record { value, json: json.into_bytes(), line: self.row, bytes }))
    }
}

/// Calls the library, which panics on some damaged files.
fn guarded<T>(path: &Path, f: impl FnOnce() -> parquet::errors::Result<T>) -> Result<T> {
    match catch_panic(f) {
        Ok(Ok(value)) => Ok(value),
        Ok(Err(e)) => Err(foreign(path, e.to_string())),
        Err(reason) => Err(foreign(path, reason)),
    }
}

fn foreign(path: &Path, reason: String) -> Error {
    Error::Foreign { path: path.into(), kind: "parquet", reason }
}

/// The schema with the text column alone; `None` for a file without it, of which all columns are read.
fn projection(schema: &Type, text_field: &str) -> parquet::errors::Result<Option<Type>> {
    let column = schema.get_fields().iter().find(|column| column.name() == text_field);
    let only = |column: &Arc<Type>| {
        Type::group_type_builder(schema.name()).with_fields(vec![column.clone()]).build()
    };
    column.map(only).transpose()
}

/// Appends a value as JSON. Bytes are a string if they are UTF-8, and null otherwise; values without a JSON type, such as
/// dates, are strings.
fn write_json(json: &mut String, field: &Field) {
    match field {
        Field::Null => json.push_str("null"),
        Field::Bool(_)
        | Field::Byte(_)
        | Field::Short(_)
        | Field::Int(_)
        | Field::Long(_)
        | Field::UByte(_)
        | Field::UShort(_)
        | Field::UInt(_)
        | Field::ULong(_) => json.push_str(&field.to_string()),
        Field::Float16(x) => write_float(json, f64::from(*x)),
        Field::Float(x) => write_float(json, f64::from(*x)),
        Field::Double(x) => write_float(json, *x),
        Field::Str(text) => write_string(json, text),
        Field::Bytes(bytes) => match std::str::from_utf8(bytes.data()) {
            Ok(text) => write_string(json, text),
            Err(_) => json.push_str("null"),
        },
        Field::Group(row) => {
            write_all(json, ['{', '}'], row.get_column_iter(), |json, (name, value)| {
                write_member(json, name, value);
            });
        }
        Field::ListInternal(list) => {
            write_all(json, ['[', ']'], list.elements().iter(), write_json);
        }
        Field::MapInternal(map) => {
            write_all(json, ['{', '}'], map.entries().iter(), |json, (key, value)| match key {
                Field::Str(key) => write_member(json, key, value),
                key => write_member(json, &key.to_string(), value),
            });
        }
        Field::Decimal(_)
        | Field::Date(_)
        | Field::TimeMillis(_)
        | Field::TimeMicros(_)
        | Field::TimestampMillis(_)
        | Field::TimestampMicros(_) => write_string(json, &field.to_string()),
    }
}

/// Appends the items between brackets, separated by commas.
fn write_all<I>(
    json: &mut String,
    [open, close]: [char; 2],
    items: impl Iterator<Item = I>,
    write: impl Fn(&mut String, I),
) {
    json.push(open);
    for (i, item) in items.enumerate() {
        if i > 0 {
            json.push(',');
        }
        write(json, item);
    }
    json.push(close);
}

fn write_member(json: &mut String, name: &str, value: &Field) {
    write_string(json, name);
    json.push(':');
    write_json(json, value);
}

fn write_string(json: &mut String, text: &str) {
    json.push_str(&serde_json::Value::from(text).to_string());
}

/// JSON has no NaN and no infinity.
fn write_float(json: &mut String, x: f64) {
    json.push_str(&serde_json::Value::from(x).to_string());
}
