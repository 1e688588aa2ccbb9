//! `gd man`: manual pages of all commands.

use std::path::PathBuf;

use anyhow::{Context as _, Result};

use super::definition;
use crate::context::Context;

/// Write the manual pages of all commands
#[derive(Debug, clap::Args)]
#[command(after_help = "One page for each command: gd.1, gd-train.1, gd-op-scan.1 and so on.\n\n\
                  Example:\n  gd man --out man/man1")]
pub struct Args {
    /// Folder of the pages; it is created if it does not exist
    #[arg(long, value_name = "DIR")]
    pub out: PathBuf,
}

/// Runs the command.
///
/// # Errors
/// Names the folder if it cannot be written.
pub fn run(args: &Args, ctx: &Context) -> Result<()> {
    let unwritable = || format!("{}: cannot be written", args.out.display());
    std::fs::create_dir_all(&args.out).with_context(unwritable)?;
    clap_mangen::generate_to(definition(), &args.out).with_context(unwritable)?;
    let pages = std::fs::read_dir(&args.out).with_context(unwritable)?.count();
    if ctx.json {
        return ctx.print(serde_json::json!({ "pages": pages }));
    }
    ctx.print(format_args!("{pages} pages in {}", args.out.display()))
}
