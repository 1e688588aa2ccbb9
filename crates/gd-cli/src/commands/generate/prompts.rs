//! The prompts of `--prompt` and `--prompts`.

use std::fmt;
use std::io::Read;
use std::path::Path;

use anyhow::Result;
use gd_model::Error;
use gd_model::data::is_jsonl;
use gd_model::io::files::read_text;
use serde_json::Value;

use super::Args;
use crate::context::usage;

/// The value of `--prompt` and `--prompts` that stands for stdin.
const STDIN: &str = "-";

/// A prompt.
pub(super) struct Prompt {
    /// The text.
    pub(super) text: String,
    /// The number of its line, from 1, if it comes from a file.
    pub(super) line: Option<usize>,
    /// Where it comes from, in messages.
    place: String,
}

impl fmt::Display for Prompt {
    /// Writes where the prompt comes from.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.line {
            Some(line) => write!(f, "{}:{line}", self.place),
            None => f.write_str(&self.place),
        }
    }
}

/// All prompts in their order.
///
/// # Errors
/// A file that cannot be read, and its lines that are no prompts.
pub(super) fn read(args: &Args) -> Result<Vec<Prompt>> {
    let from_stdin = args.prompt.iter().filter(|text| *text == STDIN).count()
        + usize::from(args.prompts.as_deref() == Some(Path::new(STDIN)));
    if from_stdin > 1 {
        return Err(usage("stdin can be read once: give `-` to --prompt or --prompts alone"));
    }
    let mut prompts = Vec::new();
    for (index, text) in args.prompt.iter().enumerate() {
        let text = match text == STDIN {
            true => without_line_break(&stdin()?).to_owned(),
            false => text.clone(),
        };
        prompts.push(Prompt { text, line: None, place: format!("--prompt {}", index + 1) });
    }
    if let Some(path) = &args.prompts {
        prompts.extend(read_lines(path)?);
    }
    Ok(prompts)
}

/// The text of stdin.
fn stdin() -> Result<String> {
    let mut bytes = Vec::new();
    std::io::stdin()
        .read_to_end(&mut bytes)
        .map_err(|source| Error::Unreadable { path: "stdin".into(), source })?;
    let text = String::from_utf8(bytes)
        .map_err(|e| Error::InvalidUtf8 { path: "stdin".into(), offset: e.utf8_error().valid_up_to() })?;
    Ok(text.strip_prefix('\u{feff}').unwrap_or(&text).to_owned())
}

/// The text without the line break at its end, which `echo` and editors add.
fn without_line_break(text: &str) -> &str {
    text.strip_suffix('\n').map_or(text, |text| text.strip_suffix('\r').unwrap_or(text))
}

/// Reads a file of prompts, or stdin. A text file has one prompt in each line that is not empty; a JSONL file has one in
/// every line.
fn read_lines(path: &Path) -> Result<Vec<Prompt>> {
    let (name, text) = match path == Path::new(STDIN) {
        true => (Path::new("stdin"), stdin()?),
        false => (path, read_text(path)?),
    };
    let text = text.strip_prefix('\u{feff}').unwrap_or(&text);
    // Without a name, the first line says what it is.
    let jsonl = match path == Path::new(STDIN) {
        true => text.lines().next().is_some_and(|line| field(line).is_ok()),
        false => is_jsonl(path),
    };
    let (mut prompts, mut malformed) = (Vec::new(), Vec::new());
    for (line, number) in text.lines().zip(1..) {
        let text = match jsonl {
            true => field(line),
            false if line.is_empty() => continue,
            false => Ok(line.to_owned()),
        };
        match text {
            Ok(text) => {
                prompts.push(Prompt { text, line: Some(number), place: name.display().to_string() });
            }
            Err(reason) => malformed.push(Error::Line { path: name.into(), line: number, reason }),
        }
    }
    match (malformed.len(), prompts.len()) {
        (0, 0) => Err(Error::Empty { path: name.into(), reason: "the file has no prompts" }.into()),
        (0, _) => Ok(prompts),
        (1, _) => Err(malformed.remove(0).into()),
        (count, _) => Err(Error::Lines { first: Box::new(malformed.remove(0)), count }.into()),
    }
}

/// The field `prompt` of a line of a JSONL file. The error is what is wrong with the line.
fn field(line: &str) -> std::result::Result<String, String> {
    if line.trim().is_empty() {
        return Err("an empty line is no prompt; remove it, or write {\"prompt\": \"…\"}".into());
    }
    let mut value: Value = serde_json::from_str(line).map_err(|e| format!("no JSON: {e}"))?;
    match value.get_mut("prompt").map(Value::take) {
        Some(Value::String(text)) => Ok(text),
        Some(_) => Err("\"prompt\" is not a string".into()),
        None => Err("no field \"prompt\"".into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_line_break_at_the_end_is_removed() {
        for (text, expected) in
            [("a", "a"), ("a\n", "a"), ("a\r\n", "a"), ("a\n\n", "a\n"), ("\n", ""), ("a\r", "a\r")]
        {
            assert_eq!(without_line_break(text), expected);
        }
    }

    #[test]
    fn a_line_that_is_no_prompt_says_why() {
        assert_eq!(field("{\"prompt\": \"\", \"id\": 1}").unwrap(), "");
        for (line, reason) in [
            (" ", "empty line"),
            ("x", "no JSON"),
            ("{\"prompt\": 3}", "\"prompt\" is not a string"),
            ("{\"text\": \"a\"}", "no field \"prompt\""),
            ("[\"a\"]", "no field \"prompt\""),
            ("{\"prompt\": \"\\ud800\"}", "no JSON"),
        ] {
            let error = field(line).unwrap_err();
            assert!(error.contains(reason), "{line}: {error}");
        }
    }
}
