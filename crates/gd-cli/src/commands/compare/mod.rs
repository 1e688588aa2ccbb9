//! `gd compare`: trains several mechanisms under equal conditions and prints a table, or measures the memory of one
//! training step of each.

mod curves;
mod memory;
mod table;

use std::path::{Path, PathBuf};

use anyhow::Result;
use gd_model::analysis::compare::{Comparison, Run, SweepPoint};
use gd_model::analysis::variants::{Variant, equalize, variants};
use gd_model::config::{ModelConfig, Recipe, Setting};
use gd_model::data::Corpus;
use gd_model::eval::reading::ReadingReport;
use gd_model::io::files::{check_writable, write_file};
use gd_model::train::Trainer;
use gd_model::train::memory::Peak;
use serde::{Deserialize, Serialize};

use self::table::{by_position, notes, table};
use crate::context::{Context, usage};
use crate::render::plot;
use crate::render::table::{MARKDOWN, TERMINAL};
use crate::saved_runs::saved_or_new;
use crate::terminal::note;
use crate::training::{load_corpus, load_recipe, train_all};

/// Train several mechanisms with equal parameters, data and steps, and compare them
#[derive(Debug, clap::Args)]
#[command(after_help = help())]
pub struct Args {
    /// Mechanisms, separated by commas, or `all`
    #[arg(long, value_name = "A,B,..", value_delimiter = ',', default_value = "softmax,gd")]
    pub mechanisms: Vec<String>,
    /// Runs per mechanism, with seeds 0 to N-1, or starting with --seed
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u64).range(1..))]
    pub seeds: u64,
    /// UTF-8 text files or folders to train on (default: the sample text)
    #[arg(long, value_name = "FILE", num_args = 1..)]
    pub data: Vec<PathBuf>,
    /// Preset of models/, or a TOML or JSON configuration file. Can be repeated: later ones replace values of earlier ones
    #[arg(long, value_name = "PRESET|FILE", default_value = "tiny")]
    pub config: Vec<String>,
    /// Override a value of the configuration by its dotted path. Can be repeated
    #[arg(long, value_name = "KEY=VALUE")]
    pub set: Vec<Setting>,
    /// Optimizer steps of each run (default: from the configuration)
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    pub steps: Option<u64>,
    /// Peak learning rates. With several, every mechanism is trained with each of them on the first seed, and all further
    /// seeds with its best one (default: that of the configuration)
    #[arg(long, value_name = "LR,..", value_delimiter = ',')]
    pub lrs: Vec<f64>,
    /// Folder for the runs, the table and the curves. Runs that it already has are not repeated
    #[arg(long, value_name = "DIR", default_value = "out/compare")]
    pub out: PathBuf,
    /// Do not train. Measure the peak memory of one training step at these context lengths
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
         The feed-forward blocks are widened until all models have as many parameters as the largest one. The table \
         contains validation loss (nats per token; ± standard deviation over seeds), difference to the first \
         mechanism, bits per byte, training tokens/s, peak memory, abstain rate, first-token share, top-1 \
         margin, the loss without what the heads read, the mean gate, the share of reads with a gate of at least .1, and \
         the losses on tokens whose n-gram (n = 3 for bytes, else 2) occurred before in the window and on all others. If \
         cutting all reads costs every mechanism less than .005 nats, a line says that the table does not measure \
         reading. The folder receives a file for each run in runs/, table.md, curves.svg, curves.html and compare.json with all runs; a \
         repeated command continues with the runs that are missing. nsa, sliding_window and hopfield, which with their \
         defaults are softmax attention at short contexts, have smaller sizes and one update (--config with an own \
         mechanism keeps its sizes).\n\n\
         --memory prints the memory in MiB that a training step on one sequence of each length needs in addition to \
         the memory in use before it. Each step is measured in a separate process.\n\n\
         Examples:\n  gd compare --mechanisms softmax,gd --seeds 3 --out out/compare\n  \
         gd compare --mechanisms softmax,gd --memory 512,1024,2048,4096",
        mechanisms()
    )
}

/// Every mechanism that can be compared, one line each.
fn mechanisms() -> String {
    let line = |v: &Variant| format!("  {:<15} {}", v.name, v.what);
    variants().iter().map(line).collect::<Vec<_>>().join("\n")
}

/// Runs the command.
///
/// # Errors
/// Names the flag, file or value that is not valid.
pub fn run(args: Args, ctx: &Context) -> Result<()> {
    let mut base = load_recipe(&args.config, &args.set, args.steps)?;
    let variants = parse_mechanisms(&args.mechanisms, &base)?;
    if !args.memory.is_empty() {
        return memory::run(&args.config, &variants, &args.memory, ctx);
    }
    let corpus = load_corpus(&args.data, &mut base)?.corpus;
    if corpus.valid.is_empty() {
        return Err(usage(
            "compare measures validation losses: it needs a validation text (train.valid_fraction)",
        ));
    }
    check_writable(&args.out)?;
    let data = corpus.hash().to_string();
    let mut models = variants.iter().map(|v| v.config(&base.model)).collect::<gd_model::Result<Vec<_>>>()?;
    equalize(&mut models)?;
    let lrs = if args.lrs.is_empty() { vec![base.train.lr.peak] } else { args.lrs.clone() };
    let (mut runs, mut sweep) = (Vec::new(), Vec::new());
    for (variant, model) in variants.iter().zip(&models) {
        let seeds = (0..args.seeds).map(|i| ctx.seed().wrapping_add(i));
        let inputs = Inputs { variant, model, base: &base, corpus: &corpus, data: &data, out: &args.out };
        runs.extend(inputs.runs(seeds, &lrs, &mut sweep, ctx)?);
    }
    let train = &base.train;
    let tokens_per_step = train.batch * train.context * train.accumulation;
    let result = Comparison::new(runs, sweep, train.steps, tokens_per_step, train.context);
    write_files(&args.out, &result)?;
    if ctx.json {
        return ctx.print(serde_json::to_string(&result)?);
    }
    ctx.print(format_args!(
        "{}\n{}\n{}\nwrote {}",
        table(&result, TERMINAL),
        by_position(&result, TERMINAL),
        notes(&result),
        args.out.display()
    ))
}

/// What the runs of a mechanism have in common.
struct Inputs<'a> {
    variant: &'a Variant,
    model: &'a ModelConfig,
    base: &'a Recipe,
    corpus: &'a Corpus,
    /// The hash of the corpus.
    data: &'a str,
    /// The folder of the command.
    out: &'a Path,
}

/// What determines a run besides its mechanism, seed and learning rate, which its file is named after.
#[derive(Debug, PartialEq, Serialize, Deserialize)]
struct Key {
    recipe: Recipe,
    data: String,
}

impl Inputs<'_> {
    /// The runs of all seeds at the best learning rate of the first seed. With several rates, each is added to `sweep`.
    fn runs(
        &self,
        mut seeds: impl Iterator<Item = u64>,
        lrs: &[f64],
        sweep: &mut Vec<SweepPoint>,
        ctx: &Context,
    ) -> Result<Vec<Run>> {
        let Some(first) = seeds.next() else { return Ok(Vec::new()) };
        let mut lowest: Option<Run> = None;
        for &lr in lrs {
            let run = self.run(first, lr, ctx)?;
            if lrs.len() > 1 {
                let (mechanism, loss) = (self.variant.name.to_owned(), run.result.loss);
                sweep.push(SweepPoint { mechanism, lr, loss });
            }
            lowest = match lowest {
                Some(lowest) if lowest.result.loss <= run.result.loss => Some(lowest),
                _ => Some(run),
            };
        }
        let Some(lowest) = lowest else { return Ok(Vec::new()) };
        let lr = lowest.lr;
        let others = seeds.map(|seed| self.run(seed, lr, ctx));
        std::iter::once(Ok(lowest)).chain(others).collect()
    }

    /// One run, which the folder may have already.
    fn run(&self, seed: u64, lr: f64, ctx: &Context) -> Result<Run> {
        let name = self.variant.name;
        let mut recipe = Recipe { model: self.model.clone(), ..self.base.clone() };
        recipe.train.lr.peak = lr;
        let path = self.out.join("runs").join(format!("{name}-seed{seed}-lr{lr:e}.json"));
        let key = Key { recipe: recipe.clone(), data: self.data.into() };
        saved_or_new(
            &path,
            key,
            |_| true,
            || {
                note(format_args!("{name}, seed {seed}, learning rate {lr:e}"));
                train(name, recipe, self.corpus, seed, ctx)
            },
        )
    }
}

/// The mechanisms with these names; for `all`, those that the configuration can have.
pub(super) fn parse_mechanisms(names: &[String], base: &Recipe) -> Result<Vec<Variant>> {
    if matches!(names, [all] if all == "all") {
        return Ok(variants().into_iter().filter(|variant| variant.applies(&base.model)).collect());
    }
    let variants = names.iter().map(|name| Variant::named(name)).collect::<gd_model::Result<Vec<_>>>();
    let variants = variants.map_err(|e| usage(format!("--mechanisms: {e}")))?;
    match variants.iter().enumerate().find(|(i, v)| variants[..*i].contains(v)) {
        Some((_, duplicate)) => Err(usage(format!("--mechanisms names {} twice", duplicate.name))),
        None => Ok(variants),
    }
}

/// Trains a model and evaluates it.
fn train(mechanism: &str, recipe: Recipe, corpus: &Corpus, seed: u64, ctx: &Context) -> Result<Run> {
    let (intermediate_size, lr) = (recipe.model.intermediate_size, recipe.train.lr.peak);
    let layers = recipe.model.gd.mechanism.clone();
    let peak = Peak::start();
    let mut trainer = Trainer::new(recipe, corpus.clone(), seed, &ctx.device)?;
    let (mut train_loss, mut valid_loss) = (Vec::new(), Vec::new());
    train_all(&mut trainer, |step| {
        train_loss.push(step.loss);
        valid_loss.extend(step.valid_loss.map(|loss| (step.step, loss)));
    })?;
    let peak_memory_mib = peak.and_then(Peak::mib);
    Ok(Run {
        mechanism: mechanism.into(),
        layers,
        seed,
        lr,
        intermediate_size,
        parameters: trainer.params.count(),
        result: trainer.validate()?,
        reading: reading(&trainer, corpus)?,
        tokens_per_second: trainer.tokens_per_second(),
        peak_memory_mib,
        train_loss,
        valid_loss,
    })
}

/// What the reads of a trained model are worth on its validation text.
fn reading(trainer: &Trainer, corpus: &Corpus) -> Result<ReadingReport> {
    // Two bytes say little about the third, two subword tokens are a phrase.
    let tokens_are_bytes = corpus.valid.len() == corpus.valid_bytes;
    let ngram = if tokens_are_bytes { 3 } else { 2 };
    Ok(trainer.measure_reading(ngram)?)
}

fn write_files(folder: &Path, result: &Comparison) -> Result<()> {
    let table =
        format!("{}\n\n{}\n\n{}\n", table(result, MARKDOWN), by_position(result, MARKDOWN), notes(result));
    write_file(&folder.join("compare.json"), serde_json::to_string_pretty(result)?.as_bytes())?;
    write_file(&folder.join("table.md"), table.as_bytes())?;
    let panels = [curves::panel(&result.runs)];
    ["curves.svg", "curves.html"].iter().try_for_each(|file| plot::save(&folder.join(file), &panels[..]))
}
