//! `gd compare`: trains several mechanisms on equal terms and prints one table; or measures the
//! memory of one training step of each.

mod curves;
mod memory;
mod table;

use std::path::{Path, PathBuf};

use anyhow::Result;
use comfy_table::TableStyle;
use comfy_table::presets::{ASCII_MARKDOWN, UTF8_FULL_CONDENSED};
use gd_model::analysis::compare::{Comparison, Run};
use gd_model::analysis::variants::{VARIANTS, Variant, equalise};
use gd_model::config::{Recipe, Setting};
use gd_model::data::Corpus;
use gd_model::io::checkpoint::{check_writable, write_file};
use gd_model::train::Trainer;
use gd_model::train::memory::Peak;

use super::train::{corpus, recipe, train};
use super::{Context, usage};

/// How tables look in a terminal.
const TERMINAL: TableStyle = UTF8_FULL_CONDENSED;

/// Train several mechanisms at equal parameters, data and steps, and compare them
#[derive(Debug, clap::Args)]
#[command(after_help = help())]
pub struct Args {
    /// The mechanisms, separated by commas
    #[arg(long, value_name = "A,B,..", value_delimiter = ',', default_value = "softmax,gd")]
    pub mechanisms: Vec<String>,
    /// Runs per mechanism: seeds 0 to N-1, or from --seed on
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u64).range(1..))]
    pub seeds: u64,
    /// UTF-8 text files or folders to train on (default: the shipped sample text)
    #[arg(long, value_name = "FILE", num_args = 1..)]
    pub data: Vec<PathBuf>,
    /// A preset of models/ or a TOML or JSON file with a configuration
    #[arg(long, value_name = "PRESET|FILE", default_value = "tiny")]
    pub config: String,
    /// A value in place of the configuration's, by its dotted path; can be given several times
    #[arg(long, value_name = "KEY=VALUE")]
    pub set: Vec<Setting>,
    /// Optimizer steps of each run (default: from the configuration)
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    pub steps: Option<u64>,
    /// The folder for the table and the curves
    #[arg(long, value_name = "DIR", default_value = "out/compare")]
    pub out: PathBuf,
    /// Train nothing: measure the peak memory of one training step at these contexts
    #[arg(
        long,
        value_name = "TOKENS,..",
        value_delimiter = ',',
        value_parser = clap::value_parser!(u32).range(1..),
        conflicts_with_all = ["seeds", "data", "steps", "out"]
    )]
    pub memory: Vec<u32>,
}

fn help() -> String {
    format!(
        "Mechanisms:\n{}\n\n\
         Feed-forward blocks are widened until all have as many parameters as the greatest of them. The table \
         has validation loss (nats per token; ± standard deviation over seeds), difference to the first \
         mechanism, bits per byte, training tokens/s, peak memory, abstain rate, first-token share and top-1 \
         margin. The folder gets table.md, curves.svg and compare.json with every run.\n\n\
         --memory prints, for one sequence of each length, how many MiB a training step needs above what the \
         program holds before it; every step is measured in a process of its own.\n\n\
         Examples:\n  gd compare --mechanisms softmax,gd --seeds 3 --out out/compare\n  \
         gd compare --mechanisms softmax,gd --memory 512,1024,2048,4096",
        mechanisms()
    )
}

/// Every mechanism that can be compared, one line each.
fn mechanisms() -> String {
    let line = |v: &Variant| format!("  {:<15} {}", v.name, v.what);
    VARIANTS.iter().map(line).collect::<Vec<_>>().join("\n")
}

/// Runs the command.
///
/// # Errors
/// Names the flag, file or value that cannot be used.
pub fn run(args: Args, ctx: &Context) -> Result<()> {
    let named = args.mechanisms.iter().map(|name| Variant::named(name));
    let variants =
        named.collect::<gd_model::Result<Vec<_>>>().map_err(|e| usage(format!("--mechanisms: {e}")))?;
    if let Some(twice) = variants.iter().enumerate().find(|(i, v)| variants[..*i].contains(v)) {
        return Err(usage(format!("--mechanisms names {} twice", twice.1.name)));
    }
    if !args.memory.is_empty() {
        return memory::run(&args.config, &variants, &args.memory, ctx);
    }
    let mut base = recipe(&args.config, &args.set, args.steps)?;
    let (corpus, _) = corpus(&args.data, &mut base)?;
    corpus.check(base.train.context)?;
    check_writable(&args.out)?;
    let mut models = variants.iter().map(|v| v.config(&base.model)).collect::<gd_model::Result<Vec<_>>>()?;
    equalise(&mut models)?;
    let first = ctx.seed.unwrap_or(0);
    let (mut runs, total) = (Vec::new(), args.seeds * variants.len() as u64);
    for seed in (0..args.seeds).map(|i| first.wrapping_add(i)) {
        for (variant, model) in variants.iter().zip(&models) {
            eprintln!("{}, seed {seed} ({} of {total})", variant.name, runs.len() + 1);
            let recipe = Recipe { model: model.clone(), ..base.clone() };
            runs.push(one(variant.name, recipe, &corpus, seed, ctx)?);
        }
    }
    let train = &base.train;
    let tokens = train.batch * train.context * train.accumulation;
    let result = Comparison::new(runs, train.steps, tokens, train.context);
    write(&args.out, &result)?;
    if ctx.json {
        return ctx.print(serde_json::to_string(&result)?);
    }
    ctx.print(format_args!("{}\nwrote {}", table::table(&result, TERMINAL), args.out.display()))
}

/// Trains one model and measures it.
fn one(mechanism: &'static str, recipe: Recipe, corpus: &Corpus, seed: u64, ctx: &Context) -> Result<Run> {
    let intermediate_size = recipe.model.intermediate_size;
    let peak = Peak::start();
    let mut trainer = Trainer::new(recipe, corpus.clone(), seed, &ctx.device)?;
    let (mut train_loss, mut valid_loss) = (Vec::new(), Vec::new());
    train(&mut trainer, |step| {
        train_loss.push(step.loss);
        valid_loss.extend(step.valid_loss.map(|loss| (step.step, loss)));
    })?;
    let peak_memory_mib = peak.and_then(Peak::mib);
    Ok(Run {
        mechanism,
        seed,
        intermediate_size,
        parameters: trainer.params.count(),
        result: trainer.validate()?,
        tokens_per_second: trainer.tokens_per_second(),
        peak_memory_mib,
        train_loss,
        valid_loss,
    })
}

fn write(out: &Path, result: &Comparison) -> Result<()> {
    let table = format!("{}\n", table::table(result, ASCII_MARKDOWN));
    write_file(&out.join("compare.json"), serde_json::to_string_pretty(result)?.as_bytes())?;
    write_file(&out.join("table.md"), table.as_bytes())?;
    Ok(write_file(&out.join("curves.svg"), curves::svg(&result.runs)?.as_bytes())?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_help_describes_every_mechanism() {
        assert!(VARIANTS.iter().all(|v| mechanisms().contains(v.name) && mechanisms().contains(v.what)));
    }
}
