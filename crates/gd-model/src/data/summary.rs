//! What was read from the files of a text.

use std::fmt;

use serde::Serialize;

/// The number of files and documents of a text, and of what was left out.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct ReadSummary {
    /// Files that were opened.
    pub files: usize,
    /// Documents with text.
    pub documents: usize,
    /// The size of their text in bytes.
    pub bytes: u64,
    /// Files without any document.
    pub empty_files: usize,
    /// Documents of white space, which are left out.
    pub blank_documents: usize,
    /// Lines and records that could not be used.
    pub bad_lines: usize,
}

impl fmt::Display for ReadSummary {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{}, {}, {} bytes",
            counted(self.files, "file"),
            counted(self.documents, "document"),
            self.bytes
        )?;
        let left_out = [
            (self.bad_lines, "bad line"),
            (self.empty_files, "empty file"),
            (self.blank_documents, "blank document"),
        ];
        let left_out: Vec<_> =
            left_out.into_iter().filter(|(n, _)| *n > 0).map(|(n, what)| counted(n, what)).collect();
        if left_out.is_empty() { Ok(()) } else { write!(f, "; left out: {}", left_out.join(", ")) }
    }
}

/// A number with its noun: `1 file`, `2 files`.
pub fn counted(n: usize, noun: &str) -> String {
    format!("{n} {noun}{}", if n == 1 { "" } else { "s" })
}
