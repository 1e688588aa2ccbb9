//! `gd bench`: measures the operators, candle's attention, the peak rates of the machine, and training steps.

mod contenders;
mod measure;
mod report;
mod shape;
mod step;

use std::path::{Path, PathBuf};

use anyhow::{Result, ensure};
use candle_core::DType;
use gd_model::config::device;
use gd_model::io::files::{check_writable, write_file};

pub use shape::{Pass, Shape};
pub use step::StepArgs;

use self::contenders::{CONTENDERS, Contender, descriptions};
use self::measure::Setup;
use self::report::{Machine, Report, compiled_for};
use crate::context::{Context, usage};
use crate::render::table::TERMINAL;
use crate::terminal::note;

/// Measure speed and memory of the operators
#[derive(Debug, clap::Args)]
#[command(after_help = "Example:\n  gd bench attention --shapes 1x8x4096x64 --pass fwd,decode")]
pub struct Args {
    /// The kind of benchmark.
    #[command(subcommand)]
    pub target: Target,
}

/// The benchmarks.
#[derive(Debug, clap::Subcommand)]
pub enum Target {
    /// Selection against softmax attention on random q, k and v
    #[command(after_help = help())]
    Attention(AttentionArgs),
    /// The time of each operator in a training step
    #[command(
        after_help = "The tokens have no meaning: the time of a step does not depend on them. The time of an operator is \
                      that of the thread that calls it; what candle computes between the operators, and its graph, are \
                      in the last row.\n\n\
                      Example:\n  gd bench step --config small --set train.precision=auto"
    )]
    Step(StepArgs),
}

/// The flags of `gd bench attention`.
#[derive(Debug, clap::Args)]
pub struct AttentionArgs {
    /// Batch, heads, length and head dimension of q, k and v
    #[arg(
        long,
        value_name = "BxHxNxD,..",
        value_delimiter = ',',
        default_value = "1x8x4096x64,1x8x4096x128"
    )]
    pub shapes: Vec<Shape>,
    /// Passes. `bwd` is another name for fwdbwd
    #[arg(
        long = "pass",
        value_name = "PASS,..",
        value_enum,
        value_delimiter = ',',
        default_value = "fwd,fwdbwd,decode"
    )]
    pub passes: Vec<Pass>,
    /// Number of rounds, over which the medians are taken
    #[arg(long, value_name = "R", default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..))]
    pub repeats: u32,
    /// Data type of q, k and v: f32, f16 or bf16
    #[arg(long, value_name = "DTYPE", default_value = "f32")]
    pub dtype: DType,
    /// Contenders, separated by commas (default: all)
    #[arg(long, value_name = "NAME,..", value_delimiter = ',')]
    pub only: Vec<String>,
    /// File for the output of --json. The tables are then printed to stdout
    #[arg(value_name = "FILE")]
    pub file: Option<PathBuf>,
    /// Measure the memory of a single contender in this process
    #[arg(long, hide = true)]
    pub peak: bool,
}

fn help() -> String {
    format!(
        "Contenders:\n{}\n\n\
         fwd and fwdbwd are causal. After a warm-up, every round runs all contenders of a shape and pass in turn. A \
         contender that takes less than 20 ms runs several times per round. Each round also measures a product of two \
         matrices of 1024 rows (8192 on a GPU) and, for decode, the sum of a buffer of the size of K, as the peak rates \
         of the machine at that time. GF/s and GB/s are based on the minimal work: for a selection one score per \
         visible pair, and K; for a blend two products, and K and V. A backward pass adds 2.5 times the forward pass \
         for a blend, and nothing for a selection. The peak memory is that of a first run in a separate process, \
         without the inputs. Contenders that need more than 12 GiB of N x N matrices are skipped. candle selects most \
         vector instructions at compile time: build with RUSTFLAGS=\"-C target-cpu=native\" for its full speed.\n\n\
         Examples:\n  gd bench attention --shapes 1x8x4096x64,1x8x4096x128 --pass fwd,fwdbwd,decode\n  \
         gd bench attention --only \"gd k=1,candle flash\" --pass decode --json out/decode.json",
        descriptions()
    )
}

/// Runs the command.
///
/// # Errors
/// Names the flag, file or value that is not valid.
pub fn run(args: Args, ctx: &Context) -> Result<()> {
    match args.target {
        Target::Attention(args) => attention(&args, ctx),
        Target::Step(args) => step::run(&args, ctx),
    }
}

fn attention(args: &AttentionArgs, ctx: &Context) -> Result<()> {
    let contenders = select_contenders(&args.only)?;
    let mut passes: Vec<Pass> = Vec::new();
    for pass in &args.passes {
        if !passes.contains(pass) {
            passes.push(*pass);
        }
    }
    if let Some(file) = &args.file {
        if !ctx.json {
            return Err(usage(format!("{} is the output file of --json, which is missing", file.display())));
        }
        ensure!(!file.is_dir(), "{} is a folder, not a file for the report", file.display());
        let folder = file.parent().filter(|p| *p != Path::new("")).unwrap_or(Path::new("."));
        check_writable(folder)?;
    }
    let (seed, repeats) = (ctx.seed(), args.repeats as usize);
    let setup = |shape, pass| Setup { shape, pass, repeats, dtype: args.dtype, seed, device: &ctx.device };
    let with_pass = |pass: Pass| -> Vec<&Contender> {
        contenders.iter().copied().filter(|c| c.passes.contains(&pass)).collect()
    };
    if args.peak {
        let ([shape], [pass]) = (&args.shapes[..], &passes[..]) else {
            return Err(usage("--peak measures one shape and one pass"));
        };
        let [contender] = with_pass(*pass)[..] else { return Err(usage("--peak measures one contender")) };
        return ctx.print(serde_json::to_string(&measure::peak(&setup(*shape, *pass), contender)?)?);
    }
    let (mut results, mut rates) = (Vec::new(), Vec::new());
    for &shape in &args.shapes {
        for &pass in &passes {
            let contenders = with_pass(pass);
            if contenders.is_empty() {
                continue;
            }
            note(format_args!("{pass} {shape}: {} contenders, {} rounds", contenders.len(), args.repeats));
            let lines = measure::group(&setup(shape, pass), &contenders)?;
            rates.push(lines[0].gemm_gflops);
            results.extend(lines);
        }
    }
    if results.is_empty() {
        let passes = passes.iter().map(Pass::to_string).collect::<Vec<_>>();
        return Err(usage(format!("--only {} has no pass {}", args.only.join(","), passes.join(","))));
    }
    let report = Report {
        device: device::name(&ctx.device),
        dtype: args.dtype.as_str(),
        machine: Machine {
            threads: rayon::current_num_threads(),
            compiled_for: compiled_for(),
            gemm_gflops: shape::median(&rates),
        },
        repeats,
        seed,
        results,
    };
    match &args.file {
        None if ctx.json => ctx.print(serde_json::to_string(&report)?),
        None => ctx.print(report.tables(TERMINAL)),
        Some(file) => {
            write_file(file, serde_json::to_string_pretty(&report)?.as_bytes())?;
            let tables = report.tables(TERMINAL);
            ctx.print(format_args!("{tables}\nwrote {}", file.display()))
        }
    }
}

/// The contenders with these names, in the order of the table. Without names, all contenders.
fn select_contenders(names: &[String]) -> Result<Vec<&'static Contender>> {
    if let Some(name) = names.iter().find(|n| CONTENDERS.iter().all(|c| c.name != n.as_str())) {
        let names: Vec<&str> = CONTENDERS.iter().map(|c| c.name).collect();
        return Err(usage(format!("--only: no contender `{name}`; the contenders are {}", names.join(", "))));
    }
    let wanted = |c: &&Contender| names.is_empty() || names.iter().any(|n| n == c.name);
    Ok(CONTENDERS.iter().filter(wanted).collect())
}
