//! Completion scripts and manual pages name every command and every flag.

use std::fs;

use anyhow::{Result, ensure};
use gd_cli::commands::definition;

use crate::program::{gd, succeeded};

/// The names of a command and of all below it with their long flags, for every command that is not hidden.
fn flags(command: &clap::Command, path: &str, all: &mut Vec<(String, Vec<String>)>) {
    let names = command.get_arguments().filter(|arg| !arg.is_hide_set()).filter_map(|arg| arg.get_long());
    all.push((path.to_owned(), names.map(str::to_owned).collect()));
    for sub in command.get_subcommands().filter(|sub| sub.get_name() != "help") {
        flags(sub, &format!("{path}-{}", sub.get_name()), all);
    }
}

fn commands() -> Vec<(String, Vec<String>)> {
    let (mut definition, mut all) = (definition(), Vec::new());
    definition.build();
    flags(&definition, "gd", &mut all);
    all
}

/// How often a script has this text where no longer name contains it.
fn occurrences(script: &str, text: &str) -> usize {
    let goes_on = |rest: &str| rest.starts_with(|c: char| c.is_alphanumeric() || c == '-');
    script.match_indices(text).filter(|(at, _)| !goes_on(&script[at + text.len()..])).count()
}

/// A flag is in the part of each command that has it, so as often as there are such commands.
#[test]
fn every_flag_of_every_command_has_a_completion_in_every_shell() -> Result<()> {
    let (dir, commands) = (tempfile::tempdir()?, commands());
    for shell in ["bash", "elvish", "fish", "powershell", "zsh"] {
        let script = succeeded(&gd(dir.path(), &format!("completions {shell}"))?)?;
        for (command, flags) in &commands {
            let name = command.rsplit('-').next().unwrap_or_default();
            ensure!(script.contains(name), "{shell}: {command} is missing");
            for flag in flags {
                // fish writes a flag without its hyphens.
                let written = if shell == "fish" { format!("-l {flag}") } else { format!("--{flag}") };
                let expected = commands.iter().filter(|(_, flags)| flags.contains(flag)).count();
                let written_count = occurrences(&script, &written);
                ensure!(
                    written_count >= expected,
                    "{shell}: {written} is there {written_count} times, and {expected} commands have it, {command} among them"
                );
            }
        }
    }
    Ok(())
}

#[test]
fn every_command_has_a_page_with_its_flags() -> Result<()> {
    let dir = tempfile::tempdir()?;
    succeeded(&gd(dir.path(), "man --out pages")?)?;
    let commands = commands();
    for (command, flags) in &commands {
        let page = fs::read_to_string(dir.path().join(format!("pages/{command}.1")))?.replace('\\', "");
        for flag in flags {
            ensure!(page.contains(&format!("--{flag}")), "{command}.1 lacks --{flag}");
        }
    }
    ensure!(fs::read_dir(dir.path().join("pages"))?.count() == commands.len());
    Ok(())
}
