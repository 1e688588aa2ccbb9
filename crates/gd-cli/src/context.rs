//! What every command gets besides its own flags, and how an error ends the program.

use std::fmt;
use std::io::{ErrorKind, IsTerminal, Write};

use anyhow::Result;
use candle_core::Device;

use crate::terminal::visible;

/// The values of the flags that all commands share.
#[derive(Debug, Clone)]
pub struct Context {
    /// The open device.
    pub device: Device,
    /// The value of `--seed`, if it was given.
    pub seed: Option<u64>,
    /// Whether stdout is to be JSON.
    pub json: bool,
}

impl Context {
    /// Writes `text` to stdout and flushes it. On a terminal, control characters are shown escaped. Returns false if the reader has closed the pipe, which is not an
    /// error.
    ///
    /// # Errors
    /// Reports any other error of stdout.
    pub fn write(&self, text: impl fmt::Display) -> Result<bool> {
        let mut out = std::io::stdout().lock();
        let written = match out.is_terminal() {
            true => out.write_all(visible(&text.to_string()).as_bytes()),
            false => write!(out, "{text}"),
        };
        match written.and_then(|()| out.flush()) {
            Ok(()) => Ok(true),
            Err(e) if e.kind() == ErrorKind::BrokenPipe => Ok(false),
            Err(e) => Err(anyhow::Error::new(e).context("cannot write to stdout")),
        }
    }

    /// Writes `text` and a newline to stdout.
    ///
    /// # Errors
    /// As [`Context::write`].
    pub fn print(&self, text: impl fmt::Display) -> Result<()> {
        self.write(format_args!("{text}\n")).map(|_| ())
    }

    /// The value of `--seed`, or its default.
    pub fn seed(&self) -> u64 {
        self.seed.unwrap_or(0)
    }
}

/// A usage error that was detected after the flags were parsed. It ends the program with exit code 2.
#[derive(Debug)]
struct Usage(String);

impl fmt::Display for Usage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Usage {}

/// Creates an error that ends the program with exit code 2. `message` names the flag and its value.
pub fn usage(message: impl Into<String>) -> anyhow::Error {
    anyhow::Error::new(Usage(message.into()))
}

/// A check that could not be made completely. It ends the program with exit code 3.
#[derive(Debug)]
struct Incomplete(String);

impl fmt::Display for Incomplete {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Incomplete {}

/// Creates an error that ends the program with exit code 3. `message` says what was not checked.
pub fn incomplete(message: impl Into<String>) -> anyhow::Error {
    anyhow::Error::new(Incomplete(message.into()))
}

/// Turns the error of a setting that is out of range into a usage error that names its flag, such as `--top-p` for
/// `top_p`. Other errors are not changed.
pub fn flag_error(error: gd_model::Error) -> anyhow::Error {
    match error {
        gd_model::Error::OutOfRange { name, value, allowed } => {
            usage(format!("--{} must be {allowed}, not {value}", name.replace('_', "-")))
        }
        other => other.into(),
    }
}

/// The exit code for an error: 2 for a usage error, 3 for a check that could not be made completely, else 1.
pub fn exit_code(error: &anyhow::Error) -> u8 {
    if error.chain().any(|e| e.is::<Usage>()) {
        2
    } else if error.chain().any(|e| e.is::<Incomplete>()) {
        3
    } else {
        1
    }
}

/// The message of an error and of its causes on one line, outermost first, without control characters.
pub fn one_line(error: &anyhow::Error) -> String {
    let mut line = String::new();
    for cause in error.chain() {
        let text = cause.to_string();
        // If RUST_BACKTRACE is set, the message of a candle error ends with a backtrace.
        let text = text.split("\n   0: ").next().unwrap_or_default();
        let text = text.split_whitespace().collect::<Vec<_>>().join(" ");
        // A transparent error repeats the message of its source.
        if !line.ends_with(&text) {
            if !line.is_empty() {
                line.push_str(": ");
            }
            line.push_str(&text);
        }
    }
    visible(&line)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_error_is_one_line_that_contains_each_cause_once() {
        let e = anyhow::anyhow!("in\nner   cause\n   0: frame\n   1: frame").context("outer");
        assert_eq!(one_line(&e), "outer: in ner cause");
        let e = anyhow::anyhow!("key \u{1b}[2J\u{9b}x");
        assert_eq!(one_line(&e), "key \\u001b[2J\\u009bx");
        let e = gd_kernels::Error::from(candle_core::Error::Msg("k is short".into()));
        assert_eq!(one_line(&anyhow::Error::new(e)), "k is short");
    }

    #[test]
    fn a_setting_out_of_range_is_a_usage_error_of_its_flag() {
        let e = flag_error(gd_model::Error::OutOfRange {
            name: "top_p".into(),
            value: "2".into(),
            allowed: "in (0, 1]".into(),
        });
        assert_eq!((exit_code(&e), one_line(&e).as_str()), (2, "--top-p must be in (0, 1], not 2"));
        let e = flag_error(gd_model::Error::Invalid("no text".into()));
        assert_eq!((exit_code(&e), one_line(&e).as_str()), (1, "no text"));
    }
}
