//! Opening files of text: standard input, compressed files, and the formats and encodings that are refused.

use std::io::{self, BufRead, BufReader, Cursor, Read};
use std::path::Path;
use std::sync::OnceLock;

use flate2::bufread::MultiGzDecoder;

use crate::error::{Error, Result};
use crate::io::files::{byte_order_mark, open_regular};

/// The path that stands for standard input.
pub const STDIN: &str = "-";

/// The number of bytes by which the format of a file is recognised.
const HEAD_BYTES: usize = 64;
const READ_BYTES: usize = 1 << 16;

/// The suffixes of names of compressed files.
const COMPRESSED: [&str; 4] = ["gz", "gzip", "zst", "zstd"];

/// The format of a file, by its name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Format {
    /// Text without a structure, except that a separator line may divide it.
    Text,
    /// One JSON object per line.
    JsonLines,
    /// An array of JSON objects, a single one, or one per line.
    Json,
    /// Decided by the content: standard input has no name.
    Unnamed,
    /// A table, whose rows are records.
    Parquet,
}

impl Format {
    /// The format that the name of a file announces, without the suffix of a compressed file.
    pub(super) fn of(path: &Path) -> Self {
        if is_stdin(path) {
            return Self::Unnamed;
        }
        match text_extension(path).as_str() {
            "jsonl" | "ndjson" => Self::JsonLines,
            "json" => Self::Json,
            "parquet" => Self::Parquet,
            _ => Self::Text,
        }
    }
}

/// Whether `path` stands for standard input.
pub(super) fn is_stdin(path: &Path) -> bool {
    path.as_os_str() == STDIN
}

/// The extension of a file in lower case, without the suffix of a compressed file: `jsonl` of `a.JSONL.gz`.
pub(super) fn text_extension(path: &Path) -> String {
    let extension = |path: &Path| path.extension().unwrap_or_default().to_string_lossy().to_lowercase();
    match extension(path) {
        suffix if COMPRESSED.contains(&suffix.as_str()) => {
            path.file_stem().map_or(String::new(), |stem| extension(Path::new(stem)))
        }
        suffix => suffix,
    }
}

/// The decompressed bytes of a file after its byte-order mark.
pub(super) type Reader = Box<dyn BufRead + Send>;

/// A file that is being read.
pub(super) struct Source {
    pub(super) reader: Reader,
    /// The length of the byte-order mark before the bytes of the reader.
    pub(super) mark_bytes: usize,
}

/// Opens a file, or standard input, and decompresses gzip and Zstandard, which are recognised by their first bytes.
///
/// # Errors
/// A file that cannot be opened, another compression, a parquet file under another name, or text in UTF-16 or UTF-32.
pub(super) fn open(path: &Path) -> Result<Source> {
    let unreadable = |e| Error::read(path, "text file", e);
    let raw: Reader = match is_stdin(path) {
        true => Box::new(stdin().map_err(unreadable)?),
        false => Box::new(BufReader::with_capacity(READ_BYTES, open_regular(path).map_err(unreadable)?)),
    };
    let (head, raw) = peek(raw).map_err(unreadable)?;
    let decompressed: Reader = match head.as_slice() {
        [0x1f, 0x8b, ..] => Box::new(BufReader::with_capacity(READ_BYTES, MultiGzDecoder::new(raw))),
        // A frame of data, or one to be skipped before it.
        [0x28, 0xb5, 0x2f, 0xfd, ..] | [0x50..=0x5f, 0x2a, 0x4d, 0x18, ..] => {
            let decoder = zstd::Decoder::with_buffer(raw).map_err(unreadable)?;
            Box::new(BufReader::with_capacity(READ_BYTES, decoder))
        }
        _ => raw,
    };
    let (head, mut reader) = peek(decompressed).map_err(unreadable)?;
    refuse_binary(path, &head)?;
    let mark_bytes = byte_order_mark(path, &head)?;
    reader.consume(mark_bytes);
    Ok(Source { reader, mark_bytes })
}

/// All bytes of standard input. They stay in memory, so that a command can read them more than once.
fn stdin() -> io::Result<&'static [u8]> {
    static CONTENT: OnceLock<Vec<u8>> = OnceLock::new();
    if let Some(content) = CONTENT.get() {
        return Ok(content);
    }
    let mut bytes = Vec::new();
    io::stdin().lock().read_to_end(&mut bytes)?;
    Ok(CONTENT.get_or_init(|| bytes))
}

/// The first bytes of a reader, and a reader of the same bytes.
fn peek(mut reader: Reader) -> io::Result<(Vec<u8>, Reader)> {
    let mut head = Vec::new();
    reader.by_ref().take(HEAD_BYTES as u64).read_to_end(&mut head)?;
    Ok((head.clone(), Box::new(Cursor::new(head).chain(reader))))
}

/// Refuses formats that are recognised by their first bytes.
fn refuse_binary(path: &Path, head: &[u8]) -> Result<()> {
    let compressed = |with: &str, tool: &str| Error::Foreign {
        path: path.into(),
        kind: "text",
        reason: format!(
            "it is compressed with {with}; gzip and Zstandard are read, so decompress it first ({tool})"
        ),
    };
    match head {
        [0xfd, b'7', b'z', b'X', b'Z', 0, ..] => Err(compressed("xz", "xz -d")),
        [b'B', b'Z', b'h', b'1'..=b'9', b'1', b'A', b'Y', ..] => Err(compressed("bzip2", "bzip2 -d")),
        [b'P', b'K', 3, 4, ..] => Err(compressed("zip", "unzip")),
        // The mark, followed by the header of the first page.
        [b'P', b'A', b'R', b'1', 0x15, ..] => Err(parquet(path)),
        _ => Ok(()),
    }
}

/// The refusal of a parquet file that is not read as one, by its content.
fn parquet(path: &Path) -> Error {
    Error::Foreign {
        path: path.into(),
        kind: "text",
        reason: "it is a parquet file; such a file is read from disk, uncompressed, with a name that ends in .parquet"
            .into(),
    }
}

/// The refusal of parquet files by a build without the feature that reads them.
#[cfg(not(feature = "parquet"))]
pub(super) fn parquet_unsupported(path: &Path) -> Error {
    Error::Foreign {
        path: path.into(),
        kind: "text",
        reason: "parquet files are read by a build with the feature `parquet`, which this one lacks; or write their rows as JSON lines, for example with pandas: \
                 read_parquet(FILE).to_json(\"rows.jsonl\", orient=\"records\", lines=True)"
            .into(),
    }
}
