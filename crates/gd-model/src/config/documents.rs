//! How text files are divided into documents.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};

/// How text files are divided into documents.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct DocumentFormat {
    /// The field of a JSON record that holds the text of its document.
    pub text_field: String,
    /// The line that separates the documents of a text file. Without it each text file is one document. White space at
    /// the end of a line of the file is ignored, unless the separator itself ends with white space.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub separator: Option<String>,
    /// Whether lines and records that cannot be used are left out. Otherwise they are an error.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub skip_bad_lines: bool,
}

impl Default for DocumentFormat {
    fn default() -> Self {
        Self { text_field: "text".into(), separator: None, skip_bad_lines: false }
    }
}

impl DocumentFormat {
    /// Checks that the separator is a single line.
    ///
    /// # Errors
    /// [`Error::OutOfRange`] for a separator with a line break.
    pub fn validate(&self) -> Result<()> {
        match &self.separator {
            Some(separator) if separator.contains(['\n', '\r']) => {
                let allowed = "a single line, without a line break";
                Err(Error::out_of_range("train.documents.separator", format!("{separator:?}"), allowed))
            }
            _ => Ok(()),
        }
    }

    /// Whether a line of a file, without its line break, separates documents.
    pub(crate) fn is_separator(&self, line: &[u8]) -> bool {
        let Some(separator) = &self.separator else { return false };
        let separator = separator.as_bytes();
        line == separator || line.trim_ascii_end() == separator
    }
}
