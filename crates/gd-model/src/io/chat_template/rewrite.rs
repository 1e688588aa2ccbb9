//! Rewrites what chat templates use and minijinja does not have into what it has. Nothing else of a template changes, and
//! every token stays on its line, so that the line numbers of errors are those of the template.
//!
//! | in the template | rewritten |
//! |---|---|
//! | `{% generation %}` … `{% endgeneration %}` | `{% with %}` … `{% endwith %}`, which also has a scope of its own, and the variables [`GENERATION`] before and after its content |
//! | `a % b` | a call of [`MODULO`], which formats strings as Python does |
//! | what makes a value: `a + b`, `a ~ b`, `a * b`, `[a]`, `{a: b}`, `(a, b)`, `a[b:c]`, `a(b)`, `a|b` | an argument of a call of [`LIMITED`], which counts the size of the value |
//! | `set a.b = c` | `set a.b = ` and a call of [`ATTRIBUTE`], which refuses namespaces |
//!
//! The precedences are those of Jinja2: `**`, then `*`, `/`, `//` and `%`, then `~`, then `+` and `-`.

use std::ops::Range;

/// The function that computes `a % b`.
pub(super) const MODULO: &str = "__modulo__";
/// The function that returns its argument if the text or list that it holds is not too large.
pub(super) const LIMITED: &str = "__limited__";

/// The function that returns its argument if it can be an attribute of a namespace.
pub(super) const ATTRIBUTE: &str = "__attribute__";

/// The variables that are written before and after the content of a `{% generation %}` block. Where they are not defined,
/// they have no text.
pub(super) const GENERATION: [&str; 2] = ["__generation__", "__endgeneration__"];

/// The maximal depth of nested brackets, which is more than minijinja allows.
const MAX_DEPTH: usize = 160;
/// The number of operands in a row after which the size of the intermediate result is checked.
const OPERANDS_PER_CHECK: usize = 8;

/// The operators with two or more characters, which are not several tokens.
const LONG_OPERATORS: [&str; 6] = ["**", "//", "==", "!=", "<=", ">="];
/// Names that are operators or parts of a statement, and no operands.
const KEYWORDS: [&str; 11] =
    ["and", "or", "not", "if", "else", "in", "is", "recursive", "import", "as", "with"];
/// The binary operators by precedence, the weakest first.
const LEVELS: [&[&str]; 4] = [&["+", "-"], &["~"], &["*", "/", "//", "%"], &["**"]];

/// The template in the syntax of minijinja. A template that cannot be read is returned as it is, and minijinja reports
/// where.
pub(super) fn rewrite(template: &str) -> String {
    rewritten(template).unwrap_or_else(|| template.to_owned())
}

fn rewritten(template: &str) -> Option<String> {
    let mut out = String::with_capacity(template.len() * 2);
    let mut rest = template;
    while let Some(at) = rest.find('{').filter(|at| at + 1 < rest.len()) {
        let (before, tag) = rest.split_at(at);
        out.push_str(before);
        let length = match tag.as_bytes()[1] {
            b'{' => expression_tag(tag, "}}", &mut out)?,
            b'%' if statement(tag) != "raw" => expression_tag(tag, "%}", &mut out)?,
            other => {
                let length = match other {
                    b'#' => tag.find("#}")? + 2,
                    b'%' => raw_length(tag)?,
                    _ => 1,
                };
                out.push_str(&tag[..length]);
                length
            }
        };
        rest = &tag[length..];
    }
    out.push_str(rest);
    Some(out)
}

/// The length of the `{% raw %}` … `{% endraw %}` at the start of `tag`.
fn raw_length(tag: &str) -> Option<usize> {
    let mut at = 2;
    loop {
        at += tag[at..].find("{%")?;
        if statement(&tag[at..]) == "endraw" {
            return Some(at + tag[at..].find("%}")? + 2);
        }
        at += 2;
    }
}

/// The first word of a `{%` tag.
fn statement(tag: &str) -> &str {
    let inner = tag.get(2..).unwrap_or_default().trim_start_matches(['-', '+']).trim_start();
    &inner[..inner.find(|c: char| !c.is_alphanumeric() && c != '_').unwrap_or(inner.len())]
}

/// Writes the tag at the start of `tag`, rewritten, and returns its length in the template.
fn expression_tag(tag: &str, close: &str, out: &mut String) -> Option<usize> {
    // The sign of white space control.
    let start = 2 + usize::from(tag[2..].starts_with(['-', '+']));
    let (tokens, end) = tokens(tag, start, close)?;
    let mut writer = Writer { text: tag, tokens: &tokens, next: 0, end: start, depth: 0 };
    out.push_str(&tag[..start]);
    if close == "%}" {
        writer.statement(out)?;
    }
    while writer.next < tokens.len() {
        writer.expressions(out)?;
        // A closing bracket without an opening one, which minijinja reports.
        writer.copy(out);
    }
    out.push_str(&tag[writer.end..end]);
    Some(end)
}

/// The tokens of a tag from `start` on, and the end of the tag.
fn tokens(tag: &str, start: usize, close: &str) -> Option<(Vec<Range<usize>>, usize)> {
    let bytes = tag.as_bytes();
    let (mut tokens, mut at, mut braces) = (Vec::new(), start, 0usize);
    loop {
        at += tag[at..].find(|c: char| !c.is_whitespace())?;
        let rest = &tag[at..];
        let unsigned = rest.strip_prefix(['-', '+']).unwrap_or(rest);
        if braces == 0 && unsigned.starts_with(close) {
            return Some((tokens, at + rest.len() - unsigned.len() + close.len()));
        }
        let length = match bytes[at] {
            quote @ (b'\'' | b'"') => string_length(rest, quote)?,
            c if c.is_ascii_digit() => number_length(rest),
            c if c.is_ascii_alphabetic() || c == b'_' || c >= 0x80 => name_length(rest),
            c => {
                braces = match c {
                    b'{' => braces + 1,
                    b'}' => braces.checked_sub(1)?,
                    _ => braces,
                };
                LONG_OPERATORS.iter().find(|operator| rest.starts_with(**operator)).map_or(1, |o| o.len())
            }
        };
        tokens.push(at..at + length);
        at += length;
    }
}

/// The length of a string with its quotes.
fn string_length(text: &str, quote: u8) -> Option<usize> {
    let mut escaped = false;
    let closing = |&(_, c): &(usize, u8)| {
        let closes = c == quote && !escaped;
        escaped = c == b'\\' && !escaped;
        closes
    };
    text.bytes().enumerate().skip(1).find(closing).map(|(at, _)| at + 1)
}

fn number_length(text: &str) -> usize {
    let (mut length, mut previous) = (0, '0');
    for c in text.chars() {
        let next = text[length + c.len_utf8()..].chars().next();
        let part = c.is_ascii_alphanumeric()
            || c == '_'
            || (c == '.' && next.is_some_and(|next| next.is_ascii_digit()))
            || (matches!(c, '+' | '-') && matches!(previous, 'e' | 'E') && !text.starts_with("0x"));
        if !part {
            break;
        }
        length += c.len_utf8();
        previous = c;
    }
    length
}

/// The length of a name, or of a character that is none.
fn name_length(text: &str) -> usize {
    match text.find(|c: char| !c.is_alphanumeric() && c != '_').unwrap_or(text.len()) {
        0 => text.chars().next().map_or(0, char::len_utf8),
        length => length,
    }
}

/// Writes the tokens of a tag with the white space before each of them.
struct Writer<'a> {
    text: &'a str,
    tokens: &'a [Range<usize>],
    /// The next token.
    next: usize,
    /// The end of the text that has been written.
    end: usize,
    depth: usize,
}

impl<'a> Writer<'a> {
    fn peek(&self) -> Option<&'a str> {
        self.tokens.get(self.next).map(|range| &self.text[range.clone()])
    }

    /// Writes the next token.
    fn copy(&mut self, out: &mut String) {
        if let Some(token) = self.peek() {
            self.replace(token, out);
        }
    }

    /// Writes `with` in the place of the next token.
    fn replace(&mut self, with: &str, out: &mut String) {
        let range = &self.tokens[self.next];
        out.push_str(&self.text[self.end..range.start]);
        out.push_str(with);
        self.end = range.end;
        self.next += 1;
    }

    /// Whether the next token starts an operand.
    fn at_operand(&self) -> bool {
        self.peek().is_some_and(|token| {
            let first = token.chars().next().unwrap_or(' ');
            (first.is_alphanumeric() || matches!(first, '_' | '\'' | '"' | '(' | '[' | '{'))
                && !KEYWORDS.contains(&token)
        })
    }

    /// Writes the keyword of a statement with the names that it defines, and the value of an assignment.
    fn statement(&mut self, out: &mut String) -> Option<()> {
        let end = match self.peek() {
            // The last tag is one of a block, so that the control of white space after it stays.
            Some("generation") => {
                self.replace(&format!("with %}}{{{{ {} }}}}{{% with", GENERATION[0]), out);
                return Some(());
            }
            Some("endgeneration") => {
                self.replace(&format!("endwith %}}{{{{ {} }}}}{{% endwith", GENERATION[1]), out);
                return Some(());
            }
            Some("for") => Some("in"),
            Some("set") => Some("="),
            // What follows is a name or a call, and nothing else may be in its place.
            Some("macro" | "call" | "filter" | "do") => None,
            _ => {
                self.copy(out);
                return Some(());
            }
        };
        while self.peek().is_some_and(|token| Some(token) != end) {
            self.copy(out);
        }
        if end == Some("=") && self.peek() == end {
            let token = |range: &Range<usize>| &self.text[range.clone()];
            let of_namespace = self.tokens[..self.next].iter().any(|range| token(range) == ".");
            self.copy(out);
            let mut value = String::new();
            // A tuple need not have brackets.
            match (self.expressions(&mut value)?, of_namespace) {
                (_, true) => out.push_str(&format!(" {ATTRIBUTE}(({value}))")),
                (true, false) => out.push_str(&format!(" {LIMITED}(({value}))")),
                (false, false) => out.push_str(&value),
            }
        }
        Some(())
    }

    /// Writes expressions and what separates them, up to a closing bracket or the end of the tag. Returns whether a comma or
    /// a colon separates some of them.
    fn expressions(&mut self, out: &mut String) -> Option<bool> {
        let mut separated = false;
        while let Some(token) = self.peek() {
            match token {
                ")" | "]" | "}" => break,
                // A sign, unless it is the `*` or `**` of an argument list.
                "-" | "+" => self.binary(0, out)?,
                _ if self.at_operand() => self.binary(0, out)?,
                _ => {
                    separated |= [",", ":"].contains(&token);
                    self.copy(out);
                }
            }
        }
        Some(separated)
    }

    /// Writes operands that are connected by the operators of a level or of stronger ones.
    fn binary(&mut self, level: usize, out: &mut String) -> Option<()> {
        let Some(operators) = LEVELS.get(level) else { return self.unary(out) };
        // The functions that are called, the innermost first, and the text after their opening brackets.
        let (mut calls, mut body, mut unchecked) = (Vec::new(), String::new(), 0);
        self.binary(level + 1, &mut body)?;
        while let Some(operator) = self.peek().filter(|token| operators.contains(token)) {
            match operator {
                "%" => self.replace(",", &mut body),
                _ => self.copy(&mut body),
            }
            self.binary(level + 1, &mut body)?;
            unchecked += usize::from(["+", "~", "*"].contains(&operator));
            if operator == "%" {
                calls.push(MODULO);
                body.push(')');
            }
            let ends = !self.peek().is_some_and(|token| operators.contains(&token));
            if unchecked == OPERANDS_PER_CHECK || (ends && unchecked > 0) {
                calls.push(LIMITED);
                body.push(')');
                unchecked = 0;
            }
        }
        for call in calls.iter().rev() {
            out.push_str(&format!(" {call}("));
        }
        out.push_str(&body);
        Some(())
    }

    /// Writes an operand with its signs, subscripts, calls, filters and tests.
    fn unary(&mut self, out: &mut String) -> Option<()> {
        let mut operand = String::new();
        while matches!(self.peek(), Some("-" | "+")) {
            self.copy(&mut operand);
        }
        let mut is_new = self.primary(&mut operand)?;
        loop {
            match self.peek() {
                Some("|") => {
                    self.copy(&mut operand);
                    self.name(&mut operand);
                    is_new = true;
                }
                Some("is") => {
                    self.copy(&mut operand);
                    if self.peek() == Some("not") {
                        self.copy(&mut operand);
                    }
                    self.name(&mut operand);
                    // The argument of a test, as in `is divisibleby 3`.
                    if self.at_operand() && self.peek() != Some("(") {
                        self.primary(&mut operand)?;
                    }
                }
                _ => break,
            }
            // The arguments of a filter or test.
            if self.peek() == Some("(") {
                self.brackets(&mut operand)?;
            }
        }
        match is_new {
            true => out.push_str(&format!(" {LIMITED}({operand})")),
            false => out.push_str(&operand),
        }
        Some(())
    }

    /// Writes the name of a filter or test, which may have dots.
    fn name(&mut self, out: &mut String) {
        self.copy(out);
        while self.peek() == Some(".") {
            self.copy(out);
            self.copy(out);
        }
    }

    /// Writes a name, a constant or an expression in brackets, with its subscripts and calls. Returns whether its value is a
    /// new one: a list, dictionary or tuple, a slice, or the result of a call.
    fn primary(&mut self, out: &mut String) -> Option<bool> {
        // These calls write their result, unless they are arguments.
        let writes = matches!(self.peek(), Some("loop" | "super"));
        let mut is_new = match self.peek()? {
            "(" => self.brackets(out)?,
            "[" | "{" => {
                self.brackets(out)?;
                true
            }
            token => {
                let string = token.starts_with(['\'', '"']);
                self.copy(out);
                // Adjacent strings are one string.
                while string && self.peek().is_some_and(|next| next.starts_with(['\'', '"'])) {
                    self.copy(out);
                }
                false
            }
        };
        loop {
            match self.peek() {
                Some(".") => {
                    self.copy(out);
                    self.copy(out);
                }
                Some("[") => is_new |= self.brackets(out)?,
                Some("(") => {
                    self.brackets(out)?;
                    is_new |= !writes;
                }
                _ => return Some(is_new),
            }
        }
    }

    /// Writes brackets and what is between them. Returns whether it has a comma or a colon.
    fn brackets(&mut self, out: &mut String) -> Option<bool> {
        self.depth += 1;
        if self.depth > MAX_DEPTH {
            return None;
        }
        self.copy(out);
        let separated = self.expressions(out)?;
        self.copy(out);
        self.depth -= 1;
        Some(separated)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The rewritten template with short names of the functions.
    fn short(template: &str) -> String {
        let names = [(MODULO, "mod"), (LIMITED, "lim"), (ATTRIBUTE, "attr")];
        names.iter().fold(rewrite(template), |text, (name, short)| text.replace(&format!(" {name}"), short))
    }

    #[test]
    fn operators_become_calls_by_their_precedence() {
        for (template, expected) in [
            ("{{ a % b }}", "{{mod( a , b) }}"),
            ("{{ a + b % c }}", "{{lim( a +mod( b , c)) }}"),
            ("{{ a * b % c }}", "{{lim(mod( a * b , c)) }}"),
            ("{{- a + -b -}}", "{{-lim( a + -b) -}}"),
            ("{{ a ~ b + c }}", "{{lim(lim( a ~ b) + c) }}"),
            ("{{ '%d' % (n + 1) }}", "{{mod( '%d' , (lim(n + 1))) }}"),
            ("{{ -a ** 2 - b.c[1:] / d['e'] }}", "{{ -a ** 2 -lim( b.c[1:]) / d['e'] }}"),
            ("{% if (i % 2 == 0) != (x is not none) %}", "{% if (mod(i , 2) == 0) != (x is not none) %}"),
            ("{% set x = 'a' 'b' ~ {'k': y}['k'] -%}", "{% set x =lim( 'a' 'b' ~lim( {'k': y}['k'])) -%}"),
            ("{% set ns.x %}{{ a % b }}{% endset %}", "{% set ns.x %}{{mod( a , b) }}{% endset %}"),
            ("{% set ns.a = b %}", "{% set ns.a =attr(( b)) %}"),
            ("{% set a, b = c, d %}", "{% set a, b =lim(( c, d)) %}"),
            ("{% set (a, b) = (c, d) %}", "{% set (a, b) =lim( (c, d)) %}"),
            ("{% for (a, b) in c.items() if d %}", "{% for (a, b) inlim( c.items()) if d %}"),
            ("{% macro m(a, b=[]) %}{% call(x) m(a) %}", "{% macro m(a, b=[]) %}{% call(x) m(a) %}"),
            ("{{ f(*a, **b) is divisibleby 3 }}", "{{lim( f(*a, **b) is divisibleby 3) }}"),
            ("{{ loop(a|list) }}", "{{ loop(lim(a|list)) }}"),
            ("{{ a if b + c else d }}", "{{ a iflim( b + c) else d }}"),
        ] {
            assert_eq!(short(template), expected, "{template}");
        }
    }

    #[test]
    fn only_tags_are_rewritten_and_lines_stay() {
        for template in [
            "100 % of {# a % b #} { x % y }",
            "{% raw %}{{ a % b }}{% generation %}{%- endraw +%}",
            "{{ 'a % b }} {% generation %}' }}",
            "{{ \"\\\" % \" }}",
            "{{ open",
            "{{ “a” % }}",
            "{% if x",
            "{",
        ] {
            assert_eq!(rewrite(template), template);
        }
        assert_eq!(
            rewrite("{%- generation -%}\n x\n{%+ endgeneration %}"),
            "{%- with %}{{ __generation__ }}{% with -%}\n x\n\
             {%+ endwith %}{{ __endgeneration__ }}{% endwith %}"
        );
        let lines = "{{ a\n %\n b }}\n{{ c }}";
        assert_eq!(rewrite(lines).matches('\n').count(), lines.matches('\n').count());
        let deep = format!("{{{{ {}1{} }}}}", "(".repeat(5000), ")".repeat(5000));
        assert_eq!(rewrite(&deep), deep);
    }
}
