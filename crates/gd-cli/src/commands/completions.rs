//! `gd completions`: scripts with which a shell completes commands and flags.

use std::io::Write;

use anyhow::Result;
use clap_complete::Shell;

use super::definition;
use crate::context::Context;

/// Print the completion script of a shell
#[derive(Debug, clap::Args)]
#[command(after_help = "The shell reads the script when it starts:\n\
                  \x20 bash        ~/.local/share/bash-completion/completions/gd\n\
                  \x20 zsh         a file _gd in a folder of $fpath\n\
                  \x20 fish        ~/.config/fish/completions/gd.fish\n\n\
                  Example:\n  gd completions bash")]
pub struct Args {
    /// The shell: bash, elvish, fish, powershell or zsh
    pub shell: Shell,
}

/// Runs the command.
///
/// # Errors
/// Stdout cannot be written.
pub fn run(args: &Args, ctx: &Context) -> Result<()> {
    let mut script = Vec::new();
    clap_complete::generate(args.shell, &mut definition(), "gd", &mut script);
    if ctx.json {
        return ctx.print(serde_json::json!({ "script": String::from_utf8_lossy(&script) }));
    }
    Ok(std::io::stdout().write_all(&script)?)
}
