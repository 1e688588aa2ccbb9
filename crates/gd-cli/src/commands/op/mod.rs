//! `gd op`: runs one operator on the tensors of a file, so that other programs can check its results.
//!
//! Shapes: q `[B, Hq, N, D]`, k `[B, Hk, M, D]`, v `[B, Hk, M, Dv]`. The help texts in `args.rs` list all tensors.

mod args;
mod attend;
pub(super) mod barrier;
mod checked;
pub(super) mod inputs;
mod output;
mod problem;
mod select;
pub(super) mod values;

use anyhow::Result;
use gd_kernels::{plan, scan};
use gd_model::io::safetensors::Tensors;

pub use args::{Args, AttendArgs, Operator, ScanArgs, SelectArgs};

use self::inputs::Inputs;
use self::problem::ScanProblem;
use crate::context::Context;

/// Runs the command.
///
/// # Errors
/// Names the flag, file, tensor or value that is not valid; no file is written then.
pub fn run(args: Args, ctx: &Context) -> Result<()> {
    match args.operator {
        Operator::Scan(args) => run_scan(&args, ctx),
        Operator::Select(args) => select::run(&args, ctx),
        Operator::Attend(args) => attend::run(&args, ctx),
    }
}

fn run_scan(args: &ScanArgs, ctx: &Context) -> Result<()> {
    let problem = ScanProblem::new(&Inputs::read(&args.input, &ctx.device)?, args)?;
    let options = problem.options();
    let plan = plan(&problem.q, &problem.k, &options)?;
    let candidates = scan(&problem.q, &problem.k, &options)?;
    let overflowed = candidates.overflowed()?;
    let mut out = Tensors::from([("index".into(), candidates.index), ("energy".into(), candidates.energy)]);
    out.extend(candidates.protected.map(|p| ("protected".into(), p)));
    // A query abstains if its first candidate is padding.
    let first = out["index"].narrow(3, 0, 1)?;
    output::finish("scan", &args.output, &plan, &out, (&first, overflowed), ctx)
}
