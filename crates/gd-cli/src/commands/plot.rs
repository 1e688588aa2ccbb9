//! `gd plot`: the curves of runs as a plot.

use std::path::PathBuf;

use anyhow::Result;

use crate::context::{Context, usage};
use crate::history::{Axis, History};
use crate::render::plot;
use crate::render::run_curves::panels;

/// Plot the curves of one or more runs
#[derive(Debug, clap::Args)]
#[command(
    after_help = "A run is the folder that gd train writes, or its train.jsonl. The training loss is smoothed. loss \
                  and valid_loss share a panel. The name of a nested number of the log contains `/`.\n\n\
                  Examples:\n  gd plot out/tiny\n  \
                  gd plot out/a out/b --out ab.png --x tokens --y loss,valid_loss,lr,grad_norm"
)]
pub struct Args {
    /// Folders of runs
    #[arg(value_name = "RUN", required = true)]
    pub runs: Vec<PathBuf>,
    /// Plot to write: PNG if the name ends in .png, a page if it ends in .html, else SVG
    #[arg(long, value_name = "FILE", default_value = "curves.svg")]
    pub out: PathBuf,
    /// Quantity of the x axis
    #[arg(long, value_enum, default_value_t = Axis::Step)]
    pub x: Axis,
    /// Numbers of the log to plot, separated by commas
    #[arg(long, value_name = "NAME,..", value_delimiter = ',', default_value = "loss,valid_loss")]
    pub y: Vec<String>,
}

/// Runs the command.
///
/// # Errors
/// Names the run, file or number that is not valid.
pub fn run(args: Args, ctx: &Context) -> Result<()> {
    let runs = History::load_all(&args.runs)?;
    for name in &args.y {
        if !runs.iter().any(|run| run.names().contains(name)) {
            let names: Vec<_> = runs[0].names().into_iter().collect();
            return Err(usage(format!("--y {name}: no run has it; the first has {}", names.join(", "))));
        }
    }
    plot::save(&args.out, &panels(&runs, args.x, &args.y)[..])?;
    match ctx.json {
        true => ctx.print(serde_json::json!({ "file": args.out })),
        false => ctx.print(format_args!("saved {}", args.out.display())),
    }
}
