//! Splits Rust source into tokens, without comments, strings, characters and numbers.

/// A name or a punctuation character, with its line from 1.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Token<'a> {
    /// The name, or the single character.
    pub(super) text: &'a str,
    /// The line in the file, from 1.
    pub(super) line: usize,
}

impl Token<'_> {
    /// Whether this is a name and not punctuation.
    pub(super) fn is_name(&self) -> bool {
        self.text.starts_with(|c: char| c.is_alphabetic() || c == '_')
    }
}

/// The tokens of `text`. Raw names lose their `r#`; lifetimes are left out like literals.
pub(super) fn tokens(text: &str) -> Vec<Token<'_>> {
    let mut lexer = Lexer { text, at: 0, line: 1 };
    let mut tokens = Vec::new();
    while let Some(token) = lexer.next() {
        tokens.extend(token);
    }
    tokens
}

struct Lexer<'a> {
    text: &'a str,
    at: usize,
    line: usize,
}

impl<'a> Lexer<'a> {
    /// The next token, `Some(None)` for something that is skipped, `None` at the end.
    fn next(&mut self) -> Option<Option<Token<'a>>> {
        let rest = &self.text[self.at..];
        let first = rest.chars().next()?;
        if first.is_alphabetic() || first == '_' {
            return Some(self.name(rest));
        }
        let skipped = if rest.starts_with("//") {
            rest.find('\n').unwrap_or(rest.len())
        } else if rest.starts_with("/*") {
            block_comment(rest)
        } else if first == '"' {
            string(rest)
        } else if first == '\'' {
            quote(rest)
        } else if first.is_ascii_digit() {
            number(rest)
        } else if first.is_whitespace() {
            first.len_utf8()
        } else {
            let token = Token { text: &rest[..first.len_utf8()], line: self.line };
            self.at += first.len_utf8();
            return Some(Some(token));
        };
        self.skip(skipped);
        Some(None)
    }

    /// A name, or a literal that begins like one (`b"x"`, `r#"x"#`, `b'x'`).
    fn name(&mut self, rest: &'a str) -> Option<Token<'a>> {
        let end = rest.find(|c: char| !c.is_alphanumeric() && c != '_').unwrap_or(rest.len());
        let (name, after) = rest.split_at(end);
        let literal = match name {
            "r" | "br" | "cr" => raw_string(after),
            "b" | "c" if after.starts_with('"') => Some(string(after)),
            "b" if after.starts_with('\'') => Some(quote(after)),
            _ => None,
        };
        if let Some(length) = literal {
            self.skip(end + length);
            return None;
        }
        let token = Token { text: name, line: self.line };
        self.at += end;
        // The `r` of a raw name is not a name.
        (name != "r" || !after.starts_with('#')).then_some(token)
    }

    fn skip(&mut self, length: usize) {
        self.line += self.text[self.at..self.at + length].matches('\n').count();
        self.at += length;
    }
}

/// The length of a block comment, which may contain further ones.
fn block_comment(rest: &str) -> usize {
    let (mut at, mut depth) = (0, 0usize);
    while at < rest.len() {
        if rest[at..].starts_with("/*") {
            (at, depth) = (at + 2, depth + 1);
        } else if rest[at..].starts_with("*/") {
            (at, depth) = (at + 2, depth - 1);
            if depth == 0 {
                return at;
            }
        } else {
            at += rest[at..].chars().next().map_or(1, char::len_utf8);
        }
    }
    rest.len()
}

/// The length of a string that starts with its opening quote.
fn string(rest: &str) -> usize {
    let mut escaped = false;
    for (at, c) in rest.char_indices().skip(1) {
        match c {
            _ if escaped => escaped = false,
            '\\' => escaped = true,
            '"' => return at + 1,
            _ => {}
        }
    }
    rest.len()
}

/// The length of a raw string after its prefix, or `None` if this is none.
fn raw_string(after: &str) -> Option<usize> {
    let hashes = after.len() - after.trim_start_matches('#').len();
    let body = after[hashes..].strip_prefix('"')?;
    let closing = format!("\"{}", "#".repeat(hashes));
    Some(body.find(&closing).map_or(after.len(), |at| hashes + 1 + at + closing.len()))
}

/// The length of a character or of a lifetime.
fn quote(rest: &str) -> usize {
    let mut chars = rest.char_indices().skip(1);
    let Some((_, first)) = chars.next() else { return 1 };
    if first == '\\' {
        let closing = chars.skip(1).find(|(_, c)| *c == '\'');
        return closing.map_or(rest.len(), |(at, _)| at + 1);
    }
    match chars.next() {
        Some((at, '\'')) => at + 1,
        _ => {
            let name = rest[1..].find(|c: char| !c.is_alphanumeric() && c != '_');
            1 + name.unwrap_or(rest.len() - 1)
        }
    }
}

/// The length of a number; `1..2` is a range and `1.max(2)` a call.
fn number(rest: &str) -> usize {
    let bytes = rest.as_bytes();
    let mut at = 0;
    while at < bytes.len() {
        let exponent = matches!(bytes[at], b'+' | b'-') && matches!(bytes[at - 1], b'e' | b'E');
        let point = bytes[at] == b'.' && bytes.get(at + 1).is_some_and(u8::is_ascii_digit);
        let decimal = !rest.starts_with("0x");
        if bytes[at].is_ascii_alphanumeric() || bytes[at] == b'_' || point || (exponent && decimal) {
            at += 1;
        } else {
            break;
        }
    }
    at
}
