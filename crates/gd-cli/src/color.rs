//! Whether the output has colors.

use std::ffi::{OsStr, OsString};
use std::io::IsTerminal;

use clap::{ColorChoice, ValueEnum};

/// The value of `--color` in the arguments, before they are parsed: the help of the parser has colors, too. A value that
/// does not exist is left to the parser.
pub fn requested(args: impl Iterator<Item = OsString>) -> ColorChoice {
    let args: Vec<OsString> = args.take_while(|arg| arg != "--").collect();
    let value =
        args.iter().enumerate().find_map(|(at, arg)| match arg.to_str()?.strip_prefix("--color")? {
            "" => args.get(at + 1).map(OsString::as_os_str),
            rest => rest.strip_prefix('=').map(OsStr::new),
        });
    let choice = value.and_then(OsStr::to_str).and_then(|value| ColorChoice::from_str(value, false).ok());
    choice.unwrap_or(ColorChoice::Auto)
}

/// Whether what is written to stderr has colors. By default, a terminal gets them, unless `NO_COLOR` is set or `TERM` is
/// `dumb`.
pub fn on_stderr(choice: ColorChoice) -> bool {
    let set = |name| std::env::var_os(name).filter(|value| !value.is_empty());
    match choice {
        ColorChoice::Always => true,
        ColorChoice::Never => false,
        ColorChoice::Auto => {
            std::io::stderr().is_terminal()
                && set("NO_COLOR").is_none()
                && set("TERM").is_none_or(|term| term != "dumb")
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_choice_is_read_before_the_arguments_are_parsed() {
        let requested = |line: &str| requested(line.split(' ').map(OsString::from));
        assert_eq!(requested("gd --color never train"), ColorChoice::Never);
        assert_eq!(requested("gd train --color=always"), ColorChoice::Always);
        for line in ["gd train", "gd --color", "gd --color blue", "gd --colors=never", "gd -- --color never"]
        {
            assert_eq!(requested(line), ColorChoice::Auto, "{line}");
        }
    }
}
