//! `gd map`: measures attention mechanisms on two axes and draws them.

mod figure;

use std::path::PathBuf;

use anyhow::Result;
use comfy_table::Table;
use gd_model::analysis::mechanism_map::{
    ENTRIES, Graded, Interval, Measurement, Settings, entries_named, measure,
};
use serde_json::{Map, Value, json};

use crate::context::{Context, usage};
use crate::render::plot;
use crate::render::table::{TERMINAL, plain_table};

/// Measure attention mechanisms by selectivity and consistency control, and draw their map
#[derive(Debug, clap::Args)]
#[command(
    after_help = "X, selectivity, is 1 - H / ln n with the entropy H of the weights of random rows of n scores. C is the \
                  concentration of the weights on high scores. Y, consistency control, is the mean of G, J and R in a recall \
                  task: detection of queries that belong to no key by the confidence, abstention on them, and the order of \
                  all answers by confidence. Intervals are 95 % bootstrap intervals; differences count only where they do \
                  not overlap. Points are colored by the share of outputs that are a single value row.\n\n\
                  Everything is computed on the CPU; all mechanisms take several minutes. GD_LOG=info names each when it is done.\n\n\
                  Example:\n  gd map --mechanisms softmax,sparsemax,hard,gd+threshold --out map.svg"
)]
pub struct Args {
    /// Mechanisms, separated by commas [default: all]. An unknown name prints the names
    #[arg(long, value_name = "NAMES", value_delimiter = ',', num_args = 1)]
    pub mechanisms: Option<Vec<String>>,
    /// Key banks of the recall task
    #[arg(long, value_name = "N", default_value_t = 5)]
    pub seeds: usize,
    /// Plot to write: PNG if the name ends in .png, a page if it ends in .html, else SVG
    #[arg(long, value_name = "FILE", default_value = "map.svg")]
    pub out: PathBuf,
}

/// Runs the command.
///
/// # Errors
/// Names the flag or the file that is not valid.
pub fn run(args: Args, ctx: &Context) -> Result<()> {
    let all = || ENTRIES.iter().map(|entry| entry.name.to_owned()).collect();
    let mechanisms = args.mechanisms.unwrap_or_else(all);
    entries_named(&mechanisms).map_err(|e| usage(format!("--mechanisms: {e}")))?;
    if args.seeds == 0 {
        return Err(usage("--seeds 0: at least 1 expected"));
    }
    let settings = Settings { mechanisms, seeds: args.seeds, seed: ctx.seed() };
    let measurements = measure(&settings, |m| tracing::info!("measured {}", m.name))?;
    plot::save(&args.out, &figure::plots(&measurements, args.seeds)[..])?;
    if ctx.json {
        return ctx.print(json!({
            "file": args.out,
            "seeds": args.seeds,
            "seed": ctx.seed(),
            "x": selectivities(&measurements),
            "y": consistencies(&measurements),
        }));
    }
    ctx.print(format_args!("{}\nsaved {}", table(&measurements), args.out.display()))
}

fn selectivities(measurements: &[Measurement]) -> Map<String, Value> {
    measurements.iter().map(|m| (m.name.to_owned(), json!(m.selectivity))).collect()
}

/// The figures of every mechanism. Where a rule decides whether to answer, there are two: `NAME/graded` with the score of the
/// rule as confidence, and `NAME/gate` with the decision.
fn consistencies(measurements: &[Measurement]) -> Map<String, Value> {
    let of = |m: &Measurement| -> Vec<(String, Value)> {
        match (&m.consistency, &m.gate) {
            (Some(graded), Some(gate)) => {
                vec![(format!("{}/graded", m.name), json!(graded)), (format!("{}/gate", m.name), json!(gate))]
            }
            (Some(own), None) => vec![(m.name.to_owned(), json!(own))],
            (None, _) => Vec::new(),
        }
    };
    measurements.iter().flat_map(of).collect()
}

fn table(measurements: &[Measurement]) -> Table {
    let header = ["mechanism", "X", "C", "AUROC far", "AUROC mix", "G", "J", "R", "Y", "Y 95 %", "one value"];
    let mut table = plain_table(TERMINAL, &header);
    for m in measurements {
        // Without the sign of a rounded zero.
        let number = |x: f64| format!("{:.3}", if x.abs() < 5e-4 { 0.0 } else { x });
        let mut row = vec![m.name.to_owned(), number(m.selectivity.x.mean), number(m.selectivity.c.mean)];
        match &m.consistency {
            Some(Graded { auroc_far, auroc_mix, g, j, r, y, colour_one_value, .. }) => {
                row.extend([auroc_far, auroc_mix, g, j, r, y].map(|i: &Interval| number(i.mean)));
                row.push(format!("{:.3} .. {:.3}", y.low, y.high));
                row.push(number(*colour_one_value));
            }
            None => row.extend(std::iter::repeat_n("-".to_owned(), 8)),
        }
        table.add_row(row);
    }
    table
}
