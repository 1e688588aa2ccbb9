//! Text of models and files on a terminal.

use std::borrow::Cow;
use std::fmt::Write;

/// The text with its control characters written as escapes (`\u{1b}`), so that a terminal shows them and does not obey
/// them. Line breaks and tabs stay. Characters that change the direction of text are escaped, too.
pub fn escape_controls(text: &str) -> Cow<'_, str> {
    let is_safe = |c: char| {
        let directs = matches!(c, '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}');
        matches!(c, '\n' | '\t') || !(c.is_control() || directs)
    };
    if text.chars().all(is_safe) {
        return Cow::Borrowed(text);
    }
    let mut escaped = String::with_capacity(text.len());
    for c in text.chars() {
        match is_safe(c) {
            true => escaped.push(c),
            // Writing to a string does not fail.
            false => _ = write!(escaped, "\\u{{{:x}}}", u32::from(c)),
        }
    }
    Cow::Owned(escaped)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_terminal_gets_no_control_characters() {
        for (text, expected) in [
            ("né\n\tok", "né\n\tok"),
            ("\u{1b}[2J\u{7}", "\\u{1b}[2J\\u{7}"),
            ("a\rb\u{9b}31m\u{7f}", "a\\u{d}b\\u{9b}31m\\u{7f}"),
            ("\u{202e}abc", "\\u{202e}abc"),
        ] {
            assert_eq!(escape_controls(text), expected);
        }
    }
}
