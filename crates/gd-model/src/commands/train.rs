//! `gd train`: trains a model, saves it, reloads it and generates a sample.

use std::collections::BTreeMap;
use std::io::IsTerminal;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::Result;
use indicatif::{HumanDuration, ProgressBar, ProgressDrawTarget, ProgressStyle};
use serde_json::json;

use super::Context;
use super::data::{ReadingArgs, prepared};
use crate::checkpoint;
use crate::config::{Mechanism, Recipe, Setting, TokenizerChoice};
use crate::data::{Corpus, Texts};
use crate::evaluate::Evaluation;
use crate::generate::generate;
use crate::model_file;
use crate::parallel::Group;
use crate::sampler::{Sampler, Sampling};
use crate::tokenizer::Tokenizer;
use crate::trainer::{Step, Trainer};

/// The text that ships with the repository; the program carries it, so that it runs anywhere.
pub const SAMPLE: &str = include_str!("../../../../models/sample.txt");

/// Tokens of the sample that is generated at the end.
const SAMPLE_TOKENS: usize = 200;

/// Steps between two lines of progress where no bar is drawn.
const LINE_EVERY: u64 = 25;

/// Train a model and save it
#[derive(Debug, clap::Args)]
#[command(
    after_help = "Writes the checkpoint, a log of every step (train.jsonl) and the resolved configuration \
                  (recipe.json) to the folder, reloads the folder and generates a sample from it.\n\n\
                  Examples:\n  gd train\n  gd train --data book.txt notes.txt --config tiny --steps 600 --seed 1 --out out/book\n  \
                  gd train --set train.lr.peak=1e-3 --set model.num_hidden_layers=6"
)]
pub struct Args {
    /// Text files (UTF-8), JSONL files, folders of them, or one folder of prepared data (default: the shipped
    /// sample text)
    #[arg(long, value_name = "FILE", num_args = 1..)]
    pub data: Vec<PathBuf>,
    /// How files become documents
    #[command(flatten)]
    pub reading: ReadingArgs,
    /// A preset of models/ or a TOML or JSON file with a configuration
    #[arg(long, value_name = "PRESET|FILE", default_value = "tiny")]
    pub config: String,
    /// A value in place of the configuration's, by its dotted path; can be given several times
    #[arg(long, value_name = "KEY=VALUE")]
    pub set: Vec<Setting>,
    /// Optimizer steps (default: from the configuration)
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    pub steps: Option<u64>,
    /// The folder to write (default: out/ and the configuration's name)
    #[arg(long, value_name = "DIR")]
    pub out: Option<PathBuf>,
}

/// Runs the command.
///
/// # Errors
/// Names the flag, file or value that cannot be used.
pub fn run(args: Args, ctx: &Context) -> Result<()> {
    let group = Group::start(&ctx.device)?;
    match train_in(&group, args, ctx) {
        Err(e) if group.world() > 1 => group.abort(&super::one_line(&e), super::exit_code(&e)),
        result => result,
    }
}

fn train_in(group: &Group, args: Args, ctx: &Context) -> Result<()> {
    let seed = ctx.seed.unwrap_or(0);
    let mut recipe = recipe(&args.config, &args.set, args.steps)?;
    let name =
        Path::new(&args.config).file_stem().map_or("model".into(), |s| s.to_string_lossy().into_owned());
    let out = args.out.clone().unwrap_or_else(|| Path::new("out").join(&name));
    args.reading.apply(&mut recipe.train.documents);
    let (corpus, tokenizer) = corpus(&args.data, &mut recipe)?;
    // Before the training, so that its result is not lost after it.
    checkpoint::check_replaceable(&out)?;
    let mut trainer = Trainer::new(recipe.clone(), corpus, seed, &ctx.device)?;
    trainer.join(group.clone())?;
    if group.leads() {
        eprintln!(
            "{name}: {} parameters, {} steps of {} tokens",
            trainer.params.count(),
            recipe.train.steps,
            recipe.train.batch * recipe.train.context * recipe.train.accumulation
        );
    }
    let mut log = String::new();
    train(&mut trainer, |step| {
        log.push_str(&serde_json::to_string(step).unwrap_or_default());
        log.push('\n');
    })?;
    trainer.require_equal()?;
    if !group.leads() {
        return Ok(());
    }
    let result = trainer.validate()?;
    let card = card(&name, &recipe, &trainer, &result, &args.data);
    let extra = BTreeMap::from([
        ("train.jsonl".to_owned(), log.into_bytes()),
        ("recipe.json".to_owned(), serde_json::to_vec_pretty(&recipe)?),
    ]);
    model_file::save(&out, &trainer.model, &trainer.params, &tokenizer, &card, &extra)?;
    let sample = sample(&out, seed, ctx)?;
    if ctx.json {
        return ctx.print(json!({
            "folder": out, "parameters": trainer.params.count(), "steps": recipe.train.steps, "seed": seed,
            "loss": result.loss, "perplexity": result.perplexity, "bits_per_byte": result.bits_per_byte,
            "tokens": result.tokens, "heads": result.heads, "sample": sample,
        }));
    }
    ctx.print(format_args!(
        "validation loss {:.4} nats/token, {:.4} bits/byte, perplexity {:.2} over {} tokens\nsaved {}\n\n\
         sample from the reloaded folder:\n{sample}",
        result.loss,
        result.bits_per_byte,
        result.perplexity,
        result.tokens,
        out.display()
    ))
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
    let texts = match files {
        [] => Texts::split(&[SAMPLE.to_owned()], recipe.train.valid_fraction)?,
        files => Texts::load(files, &recipe.train.documents, recipe.train.valid_fraction)?,
    };
    let tokenizer = match recipe.train.tokenizer {
        TokenizerChoice::Bytes => Tokenizer::bytes()?,
        TokenizerChoice::Bpe { vocab } => Tokenizer::train_bpe(texts.train.iter(), vocab)?,
    };
    recipe.model.vocab_size = tokenizer.vocab_size();
    Ok((Corpus::encode(&texts, &tokenizer)?, tokenizer))
}

/// Trains under a progress bar on stderr.
pub(super) fn train(trainer: &mut Trainer, mut watch: impl FnMut(&Step)) -> Result<()> {
    let bar = ProgressBar::new(trainer.steps());
    let style = "{bar:30} {pos}/{len} steps  {msg}  {elapsed_precise} (left {eta})";
    bar.set_style(ProgressStyle::with_template(style)?);
    bar.enable_steady_tick(Duration::from_millis(500));
    let leads = trainer.group().leads();
    if !leads {
        bar.set_draw_target(ProgressDrawTarget::hidden());
    }
    // Where the bar is not drawn (a file, a pipe), a line now and then says the same.
    let lines = leads && !std::io::stderr().is_terminal();
    let mut valid = None;
    let result = trainer.run(|step| {
        valid = step.valid_loss.or(valid);
        let valid = valid.map_or(String::new(), |v| format!("  valid {v:.4}"));
        let message = format!("loss {:.4}{valid}  {:.0} tokens/s", step.loss, step.tokens_per_second);
        if lines && (step.valid_loss.is_some() || step.step.is_multiple_of(LINE_EVERY)) {
            let left = HumanDuration(Duration::from_secs_f64(step.seconds_left));
            eprintln!("{}/{} steps  {message}  left {left:#}", step.step, step.total);
        }
        bar.set_message(message);
        bar.set_position(step.step);
        watch(step);
        Ok(())
    });
    bar.finish();
    Ok(result?)
}

/// Generates from the folder as it was saved.
fn sample(folder: &Path, seed: u64, ctx: &Context) -> Result<String> {
    let loaded = model_file::load(folder, &ctx.device)?;
    let (prompt, end) = (loaded.tokenizer.encode("The ")?, loaded.tokenizer.end_of_text());
    let sampling = Sampling { temperature: 0.7, top_p: Some(0.95), ..Sampling::default() };
    let mut sampler = Sampler::new(sampling, seed)?;
    let new = generate(&loaded.model, &prompt, SAMPLE_TOKENS, &mut sampler, &ctx.device, |token| {
        Ok(Some(token) != end)
    })?;
    Ok(loaded.tokenizer.decode(&[prompt, new].concat())?)
}

fn card(
    name: &str,
    recipe: &Recipe,
    trainer: &Trainer,
    result: &Evaluation,
    data: &[PathBuf],
) -> Vec<(&'static str, String)> {
    let selects = recipe.model.gd.mechanism.contains(&Mechanism::Gd);
    let data: Vec<_> = data.iter().map(|p| p.display().to_string()).collect();
    vec![
        ("name", name.to_owned()),
        ("summary", "A small language model trained with gd.".to_owned()),
        ("parameters", trainer.params.count().to_string()),
        ("mechanism", if selects { "selection (one key a head)" } else { "softmax" }.to_owned()),
        ("tokenizer", format!("`tokenizer.json`, {} tokens", recipe.model.vocab_size)),
        ("context", recipe.model.max_position_embeddings.to_string()),
        ("data", if data.is_empty() { "the shipped sample text".to_owned() } else { data.join(", ") }),
        ("steps", recipe.train.steps.to_string()),
        ("loss", format!("{:.4} nats per token, {:.4} bits per byte", result.loss, result.bits_per_byte)),
    ]
}
