//! Output of the program: tables, plots, reports and the trace viewer.

pub mod plot;
pub mod report;
pub mod run_curves;
pub mod table;
pub mod terminal;
pub mod viewer;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use sha2::{Digest, Sha256};

/// The hash by which a Content-Security-Policy identifies an inline text.
pub fn inline_digest(text: &str) -> String {
    format!("sha256-{}", STANDARD.encode(Sha256::digest(text)))
}
