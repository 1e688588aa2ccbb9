//! `gd bench`: how fast the operators are, next to candle's attention and to what the machine can do.

mod contenders;
mod measure;
mod report;
mod shape;

use std::path::{Path, PathBuf};

use anyhow::{Result, ensure};
use candle_core::DType;
use comfy_table::presets::UTF8_FULL_CONDENSED;
use gd_model::config::device;
use gd_model::io::checkpoint::{check_writable, write_file};

pub use shape::{Pass, Shape};

use self::contenders::{CONTENDERS, Contender, table};
use self::measure::Setup;
use self::report::{Machine, Report, compiled_for};
use super::{Context, usage};

/// Measure speed and memory of the operators
#[derive(Debug, clap::Args)]
#[command(after_help = "Example:\n  gd bench attention --shapes 1x8x4096x64 --pass fwd,decode")]
pub struct Args {
    /// What is measured.
    #[command(subcommand)]
    pub target: Target,
}

/// What can be measured.
#[derive(Debug, clap::Subcommand)]
pub enum Target {
    /// Selection against softmax attention on random q, k and v
    #[command(after_help = help())]
    Attention(AttentionArgs),
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
    /// Which passes; `bwd` is another name of fwdbwd
    #[arg(
        long = "pass",
        value_name = "PASS,..",
        value_enum,
        value_delimiter = ',',
        default_value = "fwd,fwdbwd,decode"
    )]
    pub passes: Vec<Pass>,
    /// Rounds; the medians are over these
    #[arg(long, value_name = "R", default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..))]
    pub repeats: u32,
    /// Element type of q, k and v: f32, f16 or bf16
    #[arg(long, value_name = "DTYPE", default_value = "f32")]
    pub dtype: DType,
    /// Contenders, separated by commas (default: all)
    #[arg(long, value_name = "NAME,..", value_delimiter = ',')]
    pub only: Vec<String>,
    /// Where --json writes to; the tables are then printed as well
    #[arg(value_name = "FILE")]
    pub file: Option<PathBuf>,
    /// Measure the memory of a single contender in this process
    #[arg(long, hide = true)]
    pub peak: bool,
}

fn help() -> String {
    format!(
        "Contenders:\n{}\n\n\
         fwd and fwdbwd are causal. All contenders of a shape and pass take turns, round after round, after a \
         warm-up; what takes less than 20 ms is run several times a round. Beside them a product of two \
         matrices of 1024 rows (8192 on a GPU) and, for decode, the sum of a buffer of the size of K show what the machine \
         can do at that time. GF/s and GB/s count what a contender cannot do without: a selection one score \
         per visible pair and K, a blend two products and K and V (with a backward pass 3.5 times the \
         forward pass; of a selection only the scan). The peak memory is that of a first run in a process of \
         its own, without the inputs. What needs more than 12 GiB of N x N matrices is left out. \
         candle chooses most vector instructions when it is compiled: build with \
         RUSTFLAGS=\"-C target-cpu=native\" to see its best.\n\n\
         Examples:\n  gd bench attention --shapes 1x8x4096x64,1x8x4096x128 --pass fwd,fwdbwd,decode\n  \
         gd bench attention --only \"gd k=1,candle flash\" --pass decode --json out/decode.json",
        table()
    )
}

/// Runs the command.
///
/// # Errors
/// Names the flag, file or value that cannot be used.
pub fn run(args: Args, ctx: &Context) -> Result<()> {
    match args.target {
        Target::Attention(args) => attention(&args, ctx),
    }
}

fn attention(args: &AttentionArgs, ctx: &Context) -> Result<()> {
    let chosen = chosen(&args.only)?;
    let mut passes: Vec<Pass> = Vec::new();
    for pass in &args.passes {
        if !passes.contains(pass) {
            passes.push(*pass);
        }
    }
    if let Some(file) = &args.file {
        if !ctx.json {
            return Err(usage(format!(
                "{} is where --json writes to, but there is no --json",
                file.display()
            )));
        }
        ensure!(!file.is_dir(), "{} is a folder, not a file for the report", file.display());
        let folder = file.parent().filter(|p| *p != Path::new("")).unwrap_or(Path::new("."));
        check_writable(folder)?;
    }
    let (seed, repeats) = (ctx.seed.unwrap_or(0), args.repeats as usize);
    let setup = |shape, pass| Setup { shape, pass, repeats, dtype: args.dtype, seed, device: &ctx.device };
    let of = |pass: Pass| -> Vec<&Contender> {
        chosen.iter().copied().filter(|c| c.passes.contains(&pass)).collect()
    };
    if args.peak {
        let ([shape], [pass]) = (&args.shapes[..], &passes[..]) else {
            return Err(usage("--peak measures one shape and one pass"));
        };
        let [contender] = of(*pass)[..] else { return Err(usage("--peak measures one contender")) };
        return ctx.print(serde_json::to_string(&measure::peak(&setup(*shape, *pass), contender)?)?);
    }
    let (mut results, mut rates) = (Vec::new(), Vec::new());
    for &shape in &args.shapes {
        for &pass in &passes {
            let contenders = of(pass);
            if contenders.is_empty() {
                continue;
            }
            eprintln!("{pass} {shape}: {} contenders, {} rounds", contenders.len(), args.repeats);
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
        None => ctx.print(report.tables(UTF8_FULL_CONDENSED)),
        Some(file) => {
            write_file(file, serde_json::to_string_pretty(&report)?.as_bytes())?;
            let tables = report.tables(UTF8_FULL_CONDENSED);
            ctx.print(format_args!("{tables}\nwrote {}", file.display()))
        }
    }
}

/// The contenders of these names, in the order of the table; all without names.
fn chosen(names: &[String]) -> Result<Vec<&'static Contender>> {
    if let Some(name) = names.iter().find(|n| CONTENDERS.iter().all(|c| c.name != n.as_str())) {
        let known: Vec<&str> = CONTENDERS.iter().map(|c| c.name).collect();
        return Err(usage(format!("--only: no contender `{name}`; there are {}", known.join(", "))));
    }
    let wanted = |c: &&Contender| names.is_empty() || names.iter().any(|n| n == c.name);
    Ok(CONTENDERS.iter().filter(wanted).collect())
}
