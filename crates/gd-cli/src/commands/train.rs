//! `gd train`: trains a model, saves it, reloads it and generates a sample.

use std::io::IsTerminal;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::{Context as _, Result};
use gd_kernels::Estimator;
use gd_model::config::{Mechanism, Precision, Recipe, Setting, TokenizerChoice};
use gd_model::data::{Corpus, Texts};
use gd_model::eval::Evaluation;
use gd_model::infer::generate::sample;
use gd_model::io::checkpoint;
use gd_model::io::tokenizer::Tokenizer;
use gd_model::model::pretrained::{self, Parts};
use gd_model::train::dry_run::plan;
use gd_model::train::log::Event;
use gd_model::train::parallel::Group;
use gd_model::train::run::{About, RECIPE, Run, Saved};
use gd_model::train::{Step, Trainer};
use indicatif::{HumanDuration, ProgressBar, ProgressDrawTarget, ProgressStyle};
use serde_json::json;

use super::data::{ReadingArgs, prepared};
use super::{Context, usage};
use crate::history::History;
use crate::report;

/// The text that ships with the repository; the program carries it, so that it runs anywhere.
pub const SAMPLE: &str = include_str!("../../../../models/sample.txt");

/// The configuration of a run that names none.
const DEFAULT: &str = "tiny";

/// Steps between two lines of progress where no bar is drawn.
const LINE_EVERY: u64 = 25;

/// Train a model and save it
#[derive(Debug, clap::Args)]
#[command(
    after_help = "Writes a run to the folder: its configuration (recipe.json), a log of every step (train.jsonl), \
                  checkpoints on the way (checkpoint-STEP) and at the end the model; reloads it and generates a \
                  sample. Ctrl-C or SIGTERM ends a run after its step, with a checkpoint; --resume goes on from \
                  there, or from the last checkpoint before a crash, to the same result.\n\n\
                  Examples:\n  gd train\n  gd train --data book.txt notes.txt --config tiny --steps 600 --seed 1 --out out/book\n  \
                  gd train --config base --dry-run\n  gd train --set train.lr.peak=1e-3 --set model.num_hidden_layers=6\n  gd train --resume out/book"
)]
pub struct Args {
    /// Text files (UTF-8), JSONL files, folders of them, or one folder of prepared data (default: the shipped
    /// sample text)
    #[arg(long, value_name = "FILE", num_args = 1..)]
    pub data: Vec<PathBuf>,
    /// How files become documents
    #[command(flatten)]
    pub reading: ReadingArgs,
    /// A preset of models/ or a TOML or JSON file with a configuration (default: tiny)
    #[arg(long, value_name = "PRESET|FILE")]
    pub config: Option<String>,
    /// A value in place of the configuration's, by its dotted path; can be given several times
    #[arg(long, value_name = "KEY=VALUE")]
    pub set: Vec<Setting>,
    /// Optimizer steps (default: from the configuration)
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    pub steps: Option<u64>,
    /// Print parameters, tokens and the predicted peak memory of the run, and write nothing
    #[arg(long, conflicts_with = "resume")]
    pub dry_run: bool,
    /// Steps between two checkpoints (default: from the configuration)
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    pub save_every: Option<u64>,
    /// End after this many steps, with a checkpoint
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    pub stop_after: Option<u64>,
    /// The folder to write (default: out/ and the configuration's name)
    #[arg(long, value_name = "DIR", conflicts_with = "resume")]
    pub out: Option<PathBuf>,
    /// Go on with the run in this folder from its newest whole checkpoint, with its configuration, data and
    /// seed; flags may repeat them, or make it longer where that changes none of the steps it has done
    #[arg(long, value_name = "DIR")]
    pub resume: Option<PathBuf>,
}

/// Runs the command.
///
/// # Errors
/// Names the flag, file or value that cannot be used.
pub fn run(args: Args, ctx: &Context) -> Result<()> {
    together(ctx, |group| train_in(group, args, ctx))
}

/// Runs `work` in every process of the job; one that fails ends them all.
pub(super) fn together(ctx: &Context, work: impl FnOnce(&Group) -> Result<()>) -> Result<()> {
    let group = Group::start(&ctx.device)?;
    match work(&group) {
        Err(e) if group.world() > 1 => group.abort(&super::one_line(&e), super::exit_code(&e)),
        result => result,
    }
}

fn train_in(group: &Group, args: Args, ctx: &Context) -> Result<()> {
    if args.dry_run {
        return if group.leads() { dry_run(&args, ctx) } else { Ok(()) };
    }
    let (run, passed_over) = match &args.resume {
        Some(folder) => resume(group, folder, &args, ctx)?,
        None => (start(group, &args, ctx)?, Vec::new()),
    };
    carry_out(run, passed_over, args.stop_after, ctx)
}

/// Trains to the end, or for `stop_after` steps, saves, reloads and reports. All processes of the run's group
/// take part.
pub(super) fn carry_out(
    mut run: Run,
    passed_over: Vec<String>,
    stop_after: Option<u64>,
    ctx: &Context,
) -> Result<()> {
    let leads = run.trainer.group().leads();
    if leads {
        let train = &run.trainer.recipe().train;
        eprintln!(
            "{}: {} parameters, {} steps of {} tokens",
            run.about().name,
            run.trainer.params.count(),
            train.steps,
            train.batch * train.context * train.accumulation
        );
    }
    let stop = interruptible()?;
    let mut progress = Progress::new(&run.trainer)?;
    let finished = run.train(stop_after, stop, |step, sample| {
        progress.show(step, sample.as_deref());
        Ok(())
    })?;
    progress.finish();
    if !leads {
        return Ok(());
    }
    let (step, out) = (run.trainer.step(), run.folder().to_path_buf());
    if !finished {
        let checkpoint = run.save()?;
        if ctx.json {
            return ctx.print(json!({
                "folder": out, "finished": false, "step": step, "steps": run.trainer.steps(),
                "checkpoint": checkpoint, "passed_over": passed_over,
            }));
        }
        return ctx.print(format_args!(
            "stopped after step {step} of {}\nsaved {}\ngo on with: gd train --resume {}",
            run.trainer.steps(),
            checkpoint.display(),
            out.display()
        ));
    }
    let (result, averaged) = (run.trainer.validate()?, run.trainer.validate_ema()?);
    let (about, recipe) = (run.about().clone(), run.trainer.recipe().clone());
    let card = card(&about, &recipe, &run.trainer, &result);
    run.finish(&checkpoint::model_card(&card)?, &result)?;
    // From the folder, as it was saved.
    let loaded = pretrained::load(&out, &ctx.device)?;
    let prompt = recipe.train.sample_prompt.clone();
    let text = sample(&loaded.model, &loaded.tokenizer, &prompt, about.seed, &ctx.device)?;
    let sample = format!("{prompt}{text}");
    if let Some(log) = run.log() {
        log.event(step, &Event::Sample { prompt, text })?;
    }
    report::save(&out.join(report::FILE), &History::load(&out)?)?;
    if ctx.json {
        return ctx.print(json!({
            "folder": out, "finished": true, "parameters": run.trainer.params.count(),
            "steps": recipe.train.steps, "seed": about.seed,
            "loss": result.loss, "perplexity": result.perplexity, "bits_per_byte": result.bits_per_byte,
            "tokens": result.tokens, "heads": result.heads,
            "ema": averaged, "sample": sample, "passed_over": passed_over,
        }));
    }
    let averaged = averaged.map(|e| {
        format!("\nwith averaged weights {:.4} nats/token, {:.4} bits/byte", e.loss, e.bits_per_byte)
    });
    ctx.print(format_args!(
        "validation loss {:.4} nats/token, {:.4} bits/byte, perplexity {:.2} over {} tokens{}\nsaved {}\n\n\
         sample from the reloaded folder:\n{sample}",
        result.loss,
        result.bits_per_byte,
        result.perplexity,
        result.tokens,
        averaged.unwrap_or_default(),
        out.display()
    ))
}

/// A new run.
fn start(group: &Group, args: &Args, ctx: &Context) -> Result<Run> {
    let config = args.config.as_deref().unwrap_or(DEFAULT);
    let mut recipe = recipe(config, &args.set, args.steps)?;
    if recipe.train.uptrain.is_some() {
        return Err(usage("train.uptrain: `gd convert --uptrain` starts a run that learns from a model"));
    }
    recipe.train.save_every = args.save_every.or(recipe.train.save_every);
    args.reading.apply(&mut recipe.train.documents);
    let name = Path::new(config).file_stem().map_or("model".into(), |s| s.to_string_lossy().into_owned());
    let out = args.out.clone().unwrap_or_else(|| Path::new("out").join(&name));
    let (corpus, tokenizer) = corpus(&args.data, &mut recipe)?;
    let about = About { name, data: args.data.clone(), seed: ctx.seed.unwrap_or(0) };
    let trainer = trainer(group, recipe, None, corpus, &about, ctx)?;
    Ok(Run::create(&out, trainer, tokenizer, about)?)
}

/// What the run would need.
fn dry_run(args: &Args, ctx: &Context) -> Result<()> {
    let mut recipe = recipe(args.config.as_deref().unwrap_or(DEFAULT), &args.set, args.steps)?;
    args.reading.apply(&mut recipe.train.documents);
    corpus(&args.data, &mut recipe)?;
    let plan = plan(&recipe)?;
    if ctx.json {
        return ctx.print(serde_json::to_string(&plan)?);
    }
    ctx.print(format_args!(
        "{} parameters\n{} steps of {} tokens\n{:.0} MiB peak memory predicted, above the program and the text",
        plan.parameters, plan.steps, plan.tokens_per_step, plan.peak_memory_mib
    ))
}

/// A run that goes on, and why newer checkpoints were passed over.
fn resume(group: &Group, folder: &Path, args: &Args, ctx: &Context) -> Result<(Run, Vec<String>)> {
    let mut saved = Saved::open(folder, group)?;
    if let Some(seed) = ctx.seed.filter(|seed| *seed != saved.about.seed) {
        return Err(usage(format!(
            "--seed {seed}: the run in {} has seed {}",
            folder.display(),
            saved.about.seed
        )));
    }
    // A recipe of its own says what was not f32.
    let precision = saved.recipe.train.precision.unwrap_or(Precision::F32);
    if let Some(config) = &args.config {
        saved.recipe = recipe(config, &args.set, args.steps)?;
    } else if !args.set.is_empty() {
        saved.recipe = Recipe::load_with(&folder.join(RECIPE).to_string_lossy(), &args.set)?;
    }
    saved.recipe.train.steps = args.steps.unwrap_or(saved.recipe.train.steps);
    saved.recipe.train.save_every = args.save_every.or(saved.recipe.train.save_every);
    if !args.data.is_empty() {
        saved.about.data = args.data.clone();
    }
    args.reading.apply(&mut saved.recipe.train.documents);
    saved.recipe.train.precision.get_or_insert(precision);
    let mut recipe = saved.recipe.clone();
    recipe.train.validate()?;
    if recipe.train.uptrain.is_none() {
        recipe.model.vocab_size = saved.tokenizer.vocab_size();
    }
    let corpus = match prepared(&saved.about.data) {
        Ok(Some(prepared)) => Ok(prepared.corpus),
        Ok(None) => texts(&saved.about.data, &recipe).and_then(|t| Ok(Corpus::encode(&t, &saved.tokenizer)?)),
        Err(e) => Err(e),
    };
    let corpus = corpus.context("the data of the run (--data says where it is now)")?;
    let original = original(&recipe, ctx)?;
    let trainer = trainer(group, recipe, original, corpus, &saved.about, ctx)?;
    let passed_over = saved.damaged().iter().map(|(_, reason)| reason.clone()).collect();
    let run = Run::resume(saved, trainer, &ctx.device)?;
    if group.leads() {
        eprintln!("resumed from step {}", run.trainer.step());
    }
    Ok((run, passed_over))
}

/// The model that a run learns from, where its recipe names one.
fn original(recipe: &Recipe, ctx: &Context) -> Result<Option<Parts>> {
    let Some(uptrain) = &recipe.train.uptrain else { return Ok(None) };
    let parts = pretrained::read(&uptrain.original, &ctx.device);
    Ok(Some(parts.context("the original (--set train.uptrain.original=PATH says where it is now)")?))
}

pub(super) fn trainer(
    group: &Group,
    recipe: Recipe,
    original: Option<Parts>,
    corpus: Corpus,
    about: &About,
    ctx: &Context,
) -> Result<Trainer> {
    let mut trainer = match original {
        Some(original) => Trainer::uptrain(recipe, corpus, about.seed, original, &ctx.device)?,
        None => Trainer::new(recipe, corpus, about.seed, &ctx.device)?,
    };
    trainer.join(group.clone())?;
    Ok(trainer)
}

/// A flag that is set by Ctrl-C, SIGTERM or SIGHUP; the second of them ends the program at once.
fn interruptible() -> Result<&'static AtomicBool> {
    static STOP: AtomicBool = AtomicBool::new(false);
    ctrlc::set_handler(|| {
        if STOP.swap(true, Ordering::Relaxed) {
            std::process::exit(130);
        }
        eprintln!("stopping after this step; again to stop at once");
    })?;
    Ok(&STOP)
}

/// A preset or a file, with the values of `--set` and the steps of `--steps`, which cut a warm-up that is
/// longer than half of them.
pub(super) fn recipe(config: &str, settings: &[Setting], steps: Option<u64>) -> Result<Recipe> {
    let recipe = Recipe::load_with(config, settings)?;
    let Some(steps) = steps else { return Ok(recipe) };
    let warmup = recipe.train.lr.warmup.min(steps / 2);
    let more = [Setting::new("train.lr.warmup", warmup), Setting::new("train.steps", steps)];
    Ok(Recipe::load_with(config, &[settings, &more].concat())?)
}

/// Opens prepared data, or reads the texts and makes the tokenizer; sets the model's vocabulary to it.
pub(super) fn corpus(files: &[PathBuf], recipe: &mut Recipe) -> Result<(Corpus, Tokenizer)> {
    if let Some(prepared) = prepared(files)? {
        recipe.model.vocab_size = prepared.tokenizer.vocab_size();
        return Ok((prepared.corpus, prepared.tokenizer));
    }
    let texts = texts(files, recipe)?;
    let tokenizer = match recipe.train.tokenizer {
        TokenizerChoice::Bytes => Tokenizer::bytes()?,
        TokenizerChoice::Bpe { vocab } => Tokenizer::train_bpe(texts.train.iter(), vocab)?,
    };
    recipe.model.vocab_size = tokenizer.vocab_size();
    Ok((Corpus::encode(&texts, &tokenizer)?, tokenizer))
}

pub(super) fn texts(files: &[PathBuf], recipe: &Recipe) -> Result<Texts> {
    let train = &recipe.train;
    Ok(match files {
        [] => Texts::split(&[SAMPLE.to_owned()], train.valid_fraction)?,
        files => Texts::load(files, &train.documents, train.valid_fraction)?,
    })
}

/// Trains under a progress bar on stderr.
pub(super) fn train(trainer: &mut Trainer, mut watch: impl FnMut(&Step)) -> Result<()> {
    let mut progress = Progress::new(trainer)?;
    let result = trainer.run(|step| {
        progress.show(step, None);
        watch(step);
        Ok(())
    });
    progress.finish();
    Ok(result?)
}

/// A progress bar on stderr, of the process that leads.
struct Progress {
    bar: ProgressBar,
    /// Where the bar is not drawn (a file, a pipe), a line now and then says the same.
    lines: bool,
    valid: Option<f64>,
}

impl Progress {
    fn new(trainer: &Trainer) -> Result<Self> {
        let bar = ProgressBar::new(trainer.steps()).with_position(trainer.step());
        let style = "{bar:30} {pos}/{len} steps  {msg}  {elapsed_precise} (left {eta})";
        bar.set_style(ProgressStyle::with_template(style)?);
        bar.enable_steady_tick(Duration::from_millis(500));
        let leads = trainer.group().leads();
        if !leads {
            bar.set_draw_target(ProgressDrawTarget::hidden());
        }
        Ok(Self { bar, lines: leads && !std::io::stderr().is_terminal(), valid: None })
    }

    fn show(&mut self, step: &Step, sample: Option<&str>) {
        self.valid = step.valid_loss.or(self.valid);
        let valid = self.valid.map_or(String::new(), |v| format!("  valid {v:.4}"));
        let message = format!("loss {:.4}{valid}  {:.0} tokens/s", step.loss, step.tokens_per_second);
        if self.lines && (step.valid_loss.is_some() || step.step.is_multiple_of(LINE_EVERY)) {
            let left = HumanDuration(Duration::from_secs_f64(step.seconds_left));
            eprintln!("{}/{} steps  {message}  left {left:#}", step.step, step.total);
        }
        self.bar.set_message(message);
        self.bar.set_position(step.step);
        if let Some(sample) = sample {
            let text = format!("sample after {} steps: {sample}", step.step);
            self.bar.suspend(|| eprintln!("{text}"));
        }
    }

    fn finish(&self) {
        self.bar.finish();
    }
}

fn card(
    about: &About,
    recipe: &Recipe,
    trainer: &Trainer,
    result: &Evaluation,
) -> Vec<(&'static str, String)> {
    let select = &recipe.model.gd.select;
    let blends = select.estimator == Estimator::Blend && select.candidates > 1;
    let mechanism = match recipe.model.gd.mechanism.contains(&Mechanism::Gd) {
        true if blends => format!("the {} best keys, blended", select.candidates),
        true => "selection (one key a head)".into(),
        false => "softmax".into(),
    };
    let summary = match &recipe.train.uptrain {
        Some(uptrain) => {
            let name = uptrain.original.file_name().unwrap_or(uptrain.original.as_os_str());
            format!("{} with another attention, trained since.", name.to_string_lossy())
        }
        None => "A small language model trained with gd.".into(),
    };
    let data: Vec<_> = about.data.iter().map(|p| p.display().to_string()).collect();
    vec![
        ("name", about.name.clone()),
        ("summary", summary),
        ("parameters", trainer.params.count().to_string()),
        ("mechanism", mechanism),
        ("tokenizer", format!("`tokenizer.json`, {} tokens", recipe.model.vocab_size)),
        ("context", recipe.model.max_position_embeddings.to_string()),
        ("data", if data.is_empty() { "the shipped sample text".to_owned() } else { data.join(", ") }),
        ("steps", recipe.train.steps.to_string()),
        ("loss", format!("{:.4} nats per token, {:.4} bits per byte", result.loss, result.bits_per_byte)),
    ]
}
