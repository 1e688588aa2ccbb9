//! `gd report`: one document about a run.

use std::path::PathBuf;

use anyhow::Result;

use super::Context;
use crate::history::History;
use crate::report;

/// Write a report of a run: summary, curves, selection, samples, configuration
#[derive(Debug, clap::Args)]
#[command(after_help = "The HTML is self-contained. Markdown has its curves in SVG files beside it.\n\n\
                  Example:\n  gd report out/tiny --out tiny.md")]
pub struct Args {
    /// The folder of a run
    #[arg(value_name = "RUN")]
    pub run: PathBuf,
    /// The file to write: Markdown where its name ends in .md, else HTML (default: report.html in the folder)
    #[arg(long, value_name = "FILE")]
    pub out: Option<PathBuf>,
}

/// Runs the command.
///
/// # Errors
/// Names the run or file that cannot be used.
pub fn run(args: Args, ctx: &Context) -> Result<()> {
    let run = History::load(&args.run)?;
    let folder = if args.run.is_file() { args.run.parent().unwrap_or(&args.run) } else { &args.run };
    let out = args.out.unwrap_or_else(|| folder.join(report::FILE));
    report::save(&out, &run)?;
    match ctx.json {
        true => ctx.print(serde_json::json!({ "file": out })),
        false => ctx.print(format_args!("saved {}", out.display())),
    }
}
