//! `gd report`: a report of a run.

use std::path::PathBuf;

use anyhow::Result;

use crate::context::Context;
use crate::history::History;
use crate::render::report;

/// Write a report of a run: summary, curves, selection, samples, configuration
#[derive(Debug, clap::Args)]
#[command(
    after_help = "An HTML report is one self-contained file. A Markdown report has its curves in SVG files next to \
                  it.\n\n\
                  Example:\n  gd report out/tiny --out tiny.md"
)]
pub struct Args {
    /// Folder of a run
    #[arg(value_name = "RUN")]
    pub run: PathBuf,
    /// File to write: Markdown if the name ends in .md, else HTML (default: report.html in the folder)
    #[arg(long, value_name = "FILE")]
    pub out: Option<PathBuf>,
}

/// Runs the command.
///
/// # Errors
/// Names the run or file that is not valid.
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
