//! How text files are divided into documents.

use serde::{Deserialize, Serialize};

/// How text files are divided into documents.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct DocumentFormat {
    /// The field of a JSONL line that holds the text of its document. Default: `text`.
    pub text_field: String,
    /// The line that separates the documents of a text file. Without it each text file is one document.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub separator: Option<String>,
}

impl Default for DocumentFormat {
    fn default() -> Self {
        Self { text_field: "text".into(), separator: None }
    }
}
