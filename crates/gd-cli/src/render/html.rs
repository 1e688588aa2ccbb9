//! What the pages that this program writes have in common: their Content-Security-Policy, and text in HTML.

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use sha2::{Digest, Sha256};

/// The element of a page with a Content-Security-Policy that allows only these inline texts: a script, if there is one, and a style sheet. So the content of
/// a page can neither add any nor fetch anything.
pub(super) fn policy(script: Option<&str>, style: &str) -> String {
    let script = script.map_or(String::new(), |script| format!(" script-src '{}';", digest(script)));
    format!(
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none';{script} style-src '{}'; img-src data:; \
         base-uri 'none'; form-action 'none'\">",
        digest(style)
    )
}

/// The hash by which a Content-Security-Policy identifies an inline text.
pub(crate) fn digest(text: &str) -> String {
    format!("sha256-{}", STANDARD.encode(Sha256::digest(text)))
}

/// A text as the content of an element or an attribute.
pub(super) fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}
