//! Text on stderr and on terminals. Files, models and paths may contain escape sequences, which a terminal would execute, so
//! control characters are shown escaped. A stderr that is closed or full ends nothing: it only watches.

use std::fmt::{self, Write as _};
use std::io::{self, Write};

/// The text with its control characters (C0, DEL and C1) as `\\u001b`; line breaks and tabs stay.
pub fn visible(text: &str) -> String {
    let mut shown = String::with_capacity(text.len());
    for c in text.chars() {
        if c.is_control() && c != '\n' && c != '\t' {
            // Writing to a string does not fail.
            let _ = write!(shown, "\\u{:04x}", u32::from(c));
        } else {
            shown.push(c);
        }
    }
    shown
}

/// Writes a line to stderr. Errors of stderr are ignored.
pub fn note(line: impl fmt::Display) {
    let _ = Stderr.write_all(format!("{}\n", visible(&line.to_string())).as_bytes());
}

/// stderr, whose errors are ignored.
#[derive(Debug, Clone, Copy, Default)]
pub struct Stderr;

impl Write for Stderr {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let _ = io::stderr().write_all(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        let _ = io::stderr().flush();
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn control_characters_are_escaped_and_text_is_not() {
        let text = "a\u{1b}[31m\u{7}\r\u{9b}2J\u{7f}\nä\t\u{202e}";
        assert_eq!(visible(text), "a\\u001b[31m\\u0007\\u000d\\u009b2J\\u007f\nä\t\u{202e}");
        // The text of a JSON string stays one.
        let json = serde_json::to_string(text).unwrap();
        let read: String = serde_json::from_str(&visible(&json)).unwrap();
        assert_eq!(read, text);
    }
}
