//! The commands of a chat, which begin with a slash.

use std::path::PathBuf;

use anyhow::{Result, anyhow, bail};

/// The list of the commands.
pub(super) const HELP: &str = "\
/system TEXT     set the system message; without a text, show it
/reset           forget the chat, but not the system message
/save FILE       write the chat as a JSON record with `messages`
/load FILE       continue such a chat
/set NAME=VALUE  set temperature, top_k, top_p, min_p, repetition_penalty, max_tokens or seed; without a name, show them
/trace           show which positions were read for each word of the last answer
/help            show this list
/quit            end the program
A line that begins with two slashes is a message that begins with one.";

/// A command.
#[derive(Debug, PartialEq)]
pub(super) enum Command {
    System(Option<String>),
    Reset,
    Save(PathBuf),
    Load(PathBuf),
    Set(Option<(String, String)>),
    Trace,
    Help,
    Quit,
}

impl Command {
    /// The command of a line; `None` for a message.
    pub(super) fn parse(line: &str) -> Option<Result<Self>> {
        let rest = line.trim_start().strip_prefix('/')?;
        if rest.starts_with('/') {
            return None;
        }
        let (name, value) = rest.split_once(char::is_whitespace).unwrap_or((rest, ""));
        Some(Self::of(name, value.trim()))
    }

    fn of(name: &str, value: &str) -> Result<Self> {
        let given = (!value.is_empty()).then_some(value);
        let file = || given.map(PathBuf::from).ok_or_else(|| anyhow!("/{name} needs a file"));
        let command = match name {
            "system" => return Ok(Self::System(given.map(str::to_owned))),
            "save" => return file().map(Self::Save),
            "load" => return file().map(Self::Load),
            "set" => {
                let pair = |text: &str| {
                    let (name, value) = text.split_once('=')?;
                    Some((name.trim().to_owned(), value.trim().to_owned()))
                };
                let Some(text) = given else { return Ok(Self::Set(None)) };
                let pair = pair(text).ok_or_else(|| anyhow!("/set {text}: it is /set NAME=VALUE"))?;
                return Ok(Self::Set(Some(pair)));
            }
            "reset" => Self::Reset,
            "trace" => Self::Trace,
            "help" => Self::Help,
            "quit" | "exit" => Self::Quit,
            _ => bail!("there is no command /{name}; /help lists them"),
        };
        match given {
            None => Ok(command),
            Some(value) => bail!("/{name} takes nothing, not {value:?}"),
        }
    }
}

/// The message of a line that is no command.
pub(super) fn message(line: &str) -> &str {
    if line.trim_start().starts_with("//") { &line.trim_start()[1..] } else { line }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_messages_or_commands() {
        let parse = |line: &str| Command::parse(line).unwrap().unwrap();
        assert_eq!(parse("/system Be brief. "), Command::System(Some("Be brief.".into())));
        assert_eq!(parse("/system"), Command::System(None));
        assert_eq!(parse(" /save a b.json"), Command::Save("a b.json".into()));
        assert_eq!(parse("/set top_k = 3"), Command::Set(Some(("top_k".into(), "3".into()))));
        assert_eq!(parse("/exit"), Command::Quit);
        assert!(Command::parse("Hello /reset").is_none() && Command::parse("//reset").is_none());
        assert_eq!((message("//reset"), message(" hi")), ("/reset", " hi"));
        for (line, names) in [
            ("/sistem x", "/sistem"),
            ("/save", "/save needs a file"),
            ("/set top_k", "NAME=VALUE"),
            ("/reset now", "now"),
        ] {
            let error = Command::parse(line).unwrap().unwrap_err().to_string();
            assert!(error.contains(names), "{error}");
        }
    }
}
