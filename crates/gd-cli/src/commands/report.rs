//! `gd report`: a report of one run, or of several side by side.

use std::path::PathBuf;

use anyhow::Result;

use crate::context::{Context, usage};
use crate::history::History;
use crate::render::report;

/// Write a report of runs: figures, curves, selection, samples, configuration
#[derive(Debug, clap::Args)]
#[command(
    after_help = "An HTML report is one self-contained file. It shows the values of a curve under the pointer, and marks \
                  evaluations, checkpoints and skipped updates. A Markdown report has its curves in SVG files next to \
                  it. Several runs are shown side by side.\n\n\
                  Examples:\n  gd report out/tiny --out tiny.md\n  gd report out/a out/b --out ab.html"
)]
pub struct Args {
    /// Folders of runs
    #[arg(value_name = "RUN", required = true)]
    pub runs: Vec<PathBuf>,
    /// File to write: Markdown if the name ends in .md, else HTML (default: report.html in the folder of a single run)
    #[arg(long, value_name = "FILE")]
    pub out: Option<PathBuf>,
}

/// Runs the command.
///
/// # Errors
/// Names the run or file that is not valid.
pub fn run(args: Args, ctx: &Context) -> Result<()> {
    let out = match (args.out, args.runs.as_slice()) {
        (Some(out), _) => out,
        (None, [run]) if run.is_file() => run.with_file_name(report::FILE),
        (None, [run]) => run.join(report::FILE),
        (None, runs) => return Err(usage(format!("a report of {} runs needs --out", runs.len()))),
    };
    report::save(&out, &History::load_all(&args.runs)?)?;
    match ctx.json {
        true => ctx.print(serde_json::json!({ "file": out })),
        false => ctx.print(format_args!("saved {}", out.display())),
    }
}
