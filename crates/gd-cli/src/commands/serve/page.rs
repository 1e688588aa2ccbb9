//! The chat page. It needs nothing from elsewhere, and its Content-Security-Policy allows it to call this server alone.

use std::sync::LazyLock;

use axum::http::header::{CONTENT_SECURITY_POLICY, CONTENT_TYPE, HeaderName, X_CONTENT_TYPE_OPTIONS};
use axum::response::IntoResponse;

use crate::render::html::digest;

const TEMPLATE: &str = include_str!("page/page.html");
const STYLE: &str = include_str!("page/page.css");
const SCRIPT: &str = include_str!("page/page.js");

/// The page with its style and script.
static PAGE: LazyLock<String> =
    LazyLock::new(|| TEMPLATE.replace("/*style*/", STYLE).replace("/*script*/", SCRIPT));

/// The policy of the page: this style, this script, and requests to this server.
static POLICY: LazyLock<String> = LazyLock::new(|| {
    format!(
        "default-src 'none'; style-src '{}'; script-src '{}'; connect-src 'self'; img-src data:; base-uri 'none'; \
         form-action 'none'; frame-ancestors 'none'",
        digest(STYLE),
        digest(SCRIPT)
    )
});

/// The page.
pub(super) async fn page() -> impl IntoResponse {
    let headers: [(HeaderName, &str); 3] = [
        (CONTENT_TYPE, "text/html; charset=utf-8"),
        (CONTENT_SECURITY_POLICY, POLICY.as_str()),
        (X_CONTENT_TYPE_OPTIONS, "nosniff"),
    ];
    (headers, PAGE.as_str())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_page_is_complete_and_names_no_other_server() {
        assert!(PAGE.contains(STYLE) && PAGE.contains(SCRIPT) && !PAGE.contains("/*script*/"));
        for word in ["http:", "https:", "//cdn", "@import", "url(", "innerHTML", "eval("] {
            assert!(!PAGE.contains(word), "{word}");
        }
        assert!(POLICY.contains(&digest(SCRIPT)) && !POLICY.contains("unsafe"), "{}", *POLICY);
    }
}
