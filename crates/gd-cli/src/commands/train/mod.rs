//! `gd train`: trains a model, saves it, reloads it and generates a sample.

mod from;
mod lora;

use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};
use gd_model::config::{Precision, Recipe, Setting};
use gd_model::io::chat_template::ChatTemplate;
use gd_model::model::pretrained::{self, Parts};
use gd_model::train::estimate;
use gd_model::train::parallel::Group;
use gd_model::train::run::{About, RECIPE, Run, Saved, check_folder};
use serde_json::json;

pub use self::lora::LoraArg;

use crate::context::{Context, usage};
use crate::data_source::{DocumentArgs, reads_stdin};
use crate::terminal::note;
use crate::training::{
    Chats, DEFAULT_CONFIG, LoadedCorpus, in_group, load_corpus, load_corpus_for, load_recipe, new_trainer,
    run_to_end, vocabulary_line,
};

/// Train a model and save it
#[derive(Debug, clap::Args)]
#[command(
    after_help = "The folder of the run receives the configuration (recipe.json), a log of all steps (train.jsonl), \
                  checkpoints (checkpoint-STEP) and, at the end, the model. The model is then reloaded to generate a \
                  sample. Ctrl-C or SIGTERM ends the run after the current step with a checkpoint. --resume continues \
                  from there, or from the last checkpoint before a crash, with the same final result.\n\n\
                  Examples:\n  gd train\n  gd train --data book.txt notes.txt --config tiny --steps 600 --seed 1 --out out/book\n  \
                  gd train --config base --dry-run\n  gd train --set train.lr.peak=1e-3 --set model.num_hidden_layers=6\n  \
                  gd train --config tiny --config mine.toml --data chats.jsonl.gz --skip-bad-lines\n  gd train --resume out/book\n  gd train --from out/book --data chats.jsonl --out out/tuned\n  \
                  gd train --from out/book --data chats.jsonl --lora r=16,alpha=32,targets=all-linear --out out/adapter"
)]
pub struct Args {
    /// Text files (UTF-8), JSON records (.jsonl, .ndjson, .json), folders of them, - for standard input, or one folder of
    /// prepared data (default: the sample text). Files may be compressed by gzip or Zstandard
    #[arg(long, value_name = "FILE", num_args = 1..)]
    pub data: Vec<PathBuf>,
    /// How files are split into documents
    #[command(flatten)]
    pub documents: DocumentArgs,
    /// Go on from this model, with its configuration, tokenizer and chat template: a checkpoint folder, a safetensors file
    /// in one, or a GGUF file. Of records with `messages`, only the turns of the assistant are learned
    #[arg(long, value_name = "MODEL", conflicts_with = "resume", requires = "data")]
    pub from: Option<PathBuf>,
    /// Train an adapter of low rank (LoRA) and leave the weights of the model as they are: its rank, its factor alpha, the
    /// dropout of its inputs, and the projections that it changes, or all-linear (default:
    /// r=8,alpha=8,dropout=0,targets=q_proj,v_proj). The result is an adapter as PEFT saves it
    #[arg(long, value_name = "r=N,alpha=X,dropout=P,targets=NAMES", requires = "from")]
    pub lora: Option<LoraArg>,
    /// Preset of models/, or a TOML or JSON configuration file (default: tiny). Can be repeated: later ones replace
    /// values of earlier ones
    #[arg(long, value_name = "PRESET|FILE")]
    pub config: Vec<String>,
    /// Override a value of the configuration by its dotted path. Can be repeated
    #[arg(long, value_name = "KEY=VALUE")]
    pub set: Vec<Setting>,
    /// Number of optimizer steps (default: from the configuration)
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    pub steps: Option<u64>,
    /// Read the data and print its size, the number of parameters and tokens and the predicted peak memory, and write
    /// nothing. Fails where the training would fail at its start
    #[arg(long, conflicts_with = "resume")]
    pub dry_run: bool,
    /// Steps between two checkpoints (default: from the configuration)
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    pub save_every: Option<u64>,
    /// Stop after this many steps with a checkpoint
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    pub stop_after: Option<u64>,
    /// Folder to write (default: out/ and the name of the configuration)
    #[arg(long, value_name = "DIR", conflicts_with = "resume")]
    pub out: Option<PathBuf>,
    /// Continue the run in this folder from its newest intact checkpoint, with its configuration, data and seed.
    /// Other flags may repeat these values, or extend the run if that changes none of the completed steps
    #[arg(long, value_name = "DIR")]
    pub resume: Option<PathBuf>,
}

/// Runs the command.
///
/// # Errors
/// Names the flag, file or value that is not valid.
pub fn run(args: Args, ctx: &Context) -> Result<()> {
    in_group(ctx, |group| {
        if args.dry_run {
            return if group.leads() { print_estimate(group, &args, ctx) } else { Ok(()) };
        }
        let (run, skipped_files) = match &args.resume {
            Some(folder) => resume(group, folder, &args, ctx)?,
            None => (start(group, &args, ctx)?, Vec::new()),
        };
        run_to_end(run, skipped_files, args.stop_after, ctx)
    })
}

/// A new run before its trainer is made.
struct NewRun {
    recipe: Recipe,
    name: String,
    out: PathBuf,
    data: LoadedCorpus,
    /// That the tokenizer changed the vocabulary of the configuration, if it did.
    vocabulary: Option<String>,
    /// The model that it goes on from.
    source: Option<Parts>,
}

/// Reads the configuration and the data of a new run, and checks them.
fn read_inputs(group: &Group, args: &Args, ctx: &Context) -> Result<NewRun> {
    if let Some(model) = &args.from {
        return from::read_inputs(group, args, model, ctx);
    }
    let configs = match args.config.as_slice() {
        [] => vec![DEFAULT_CONFIG.to_owned()],
        configs => configs.to_vec(),
    };
    let mut recipe = load_recipe(&configs, &args.set, args.steps)?;
    if recipe.train.uptrain.is_some() {
        return Err(usage("train.uptrain: use `gd convert --uptrain` to start a run that distills a model"));
    }
    if recipe.train.lora.is_some() {
        return Err(usage("train.lora: an adapter belongs to a model; use --from and --lora"));
    }
    recipe.train.save_every = args.save_every.or(recipe.train.save_every);
    args.documents.apply(&mut recipe.train.documents);
    group.check(recipe.train.batch)?;
    check_stdin(group, &args.data)?;
    let last = configs.last().map_or(DEFAULT_CONFIG, String::as_str);
    let name = Path::new(last).file_stem().map_or("model".into(), |s| s.to_string_lossy().into_owned());
    let out = args.out.clone().unwrap_or_else(|| Path::new("out").join(&name));
    let vocab_size = recipe.model.vocab_size;
    let data = load_corpus(&args.data, &mut recipe)?;
    let vocabulary = vocabulary_line(vocab_size, &data.tokenizer);
    Ok(NewRun { recipe, name, out, data, vocabulary, source: None })
}

/// Refuses standard input as the data of several processes, of which one alone would get it.
fn check_stdin(group: &Group, data: &[PathBuf]) -> Result<()> {
    match group.world() > 1 && reads_stdin(data) {
        true => Err(usage("--data -: standard input reaches one of several processes; give them a file")),
        false => Ok(()),
    }
}

/// Creates a new run.
fn start(group: &Group, args: &Args, ctx: &Context) -> Result<Run> {
    let NewRun { recipe, name, out, data, vocabulary, source } = read_inputs(group, args, ctx)?;
    let about = About { name, data: args.data.clone(), from: args.from.clone(), seed: ctx.seed() };
    let trainer = new_trainer(group, recipe, source, data.corpus, &about, ctx)?;
    let run = Run::create(&out, trainer, data.tokenizer, about)?;
    if group.leads() {
        note(&data.summary);
        vocabulary.iter().for_each(note);
    }
    Ok(run)
}

/// Prints the size of a run without training.
fn print_estimate(group: &Group, args: &Args, ctx: &Context) -> Result<()> {
    let NewRun { recipe, out, data, vocabulary, .. } = read_inputs(group, args, ctx)?;
    check_folder(&out)?;
    let estimate = estimate::estimate(&recipe)?;
    if ctx.json {
        let mut json = serde_json::to_value(&estimate)?;
        json["data"] = serde_json::to_value(&data.summary)?;
        json["vocab_size"] = json!(recipe.model.vocab_size);
        return ctx.print(json);
    }
    let vocabulary = vocabulary.map_or(String::new(), |line| format!("{line}\n"));
    let trained = match estimate.trained_parameters {
        trained if trained == estimate.parameters => String::new(),
        trained => format!(", {trained} of them trained"),
    };
    ctx.print(format_args!(
        "{}\n{vocabulary}{} parameters{trained}\n{} steps of {} tokens\n{:.0} MiB predicted peak memory, in addition to the program \
         and the text\n{} bytes of cache per token when decoding in f32",
        data.summary,
        estimate.parameters,
        estimate.steps,
        estimate.tokens_per_step,
        estimate.peak_memory_mib,
        estimate.cache_bytes_per_token
    ))
}

/// Opens a run to continue it. Also returns why newer checkpoints cannot be used.
fn resume(group: &Group, folder: &Path, args: &Args, ctx: &Context) -> Result<(Run, Vec<String>)> {
    let mut saved = Saved::open(folder, group)?;
    if let Some(seed) = ctx.seed.filter(|seed| *seed != saved.about.seed) {
        return Err(usage(format!(
            "--seed {seed}: the run in {} has seed {}",
            folder.display(),
            saved.about.seed
        )));
    }
    update_recipe(&mut saved, folder, args)?;
    if !args.data.is_empty() {
        saved.about.data = args.data.clone();
    }
    let mut recipe = saved.recipe.clone();
    recipe.train.validate()?;
    let inherited = saved.about.from.is_some().then(|| saved.inherited()).transpose()?;
    if inherited.is_some() {
        recipe.model.origin = saved.model()?.origin;
    } else if recipe.train.uptrain.is_none() {
        recipe.model.vocab_size = saved.tokenizer.vocab_size();
    }
    check_stdin(group, &saved.about.data)?;
    if args.data.is_empty() && reads_stdin(&saved.about.data) {
        let folder = folder.display();
        return Err(usage(format!(
            "--resume {folder}: the run read its text from standard input; give the same text again with --data - or as a \
             file"
        )));
    }
    let source = source(&recipe, ctx)?;
    let files = inherited.as_ref().map(|i| &i.files).or(source.as_ref().map(|source| &source.files));
    let template = files.map_or(Ok(None), ChatTemplate::find)?;
    let chats = Chats { template, marks_turns: inherited.is_some() };
    let data = load_corpus_for(&saved.about.data, &recipe, &saved.tokenizer, chats)
        .context("the data of the run (--data gives its new location)")?;
    if group.leads() {
        note(&data.summary);
    }
    let mut trainer = new_trainer(group, recipe, source, data.corpus, &saved.about, ctx)?;
    if let Some(inherited) = inherited {
        trainer.inherit(inherited);
    }
    let skipped_files = saved.damaged().iter().map(|(_, reason)| reason.clone()).collect();
    let run = Run::resume(saved, trainer, &ctx.device)?;
    if group.leads() {
        note(format_args!("resumed from step {}", run.trainer.step()));
    }
    Ok((run, skipped_files))
}

/// Applies the flags to the recipe of a saved run.
fn update_recipe(saved: &mut Saved, folder: &Path, args: &Args) -> Result<()> {
    // A recipe without a precision was trained in f32.
    let precision = saved.recipe.train.precision.unwrap_or(Precision::F32);
    if !args.config.is_empty() {
        saved.recipe = load_recipe(&args.config, &args.set, args.steps)?;
    } else if !args.set.is_empty() {
        saved.recipe = Recipe::load_with(&folder.join(RECIPE).to_string_lossy(), &args.set)?;
    }
    let train = &mut saved.recipe.train;
    train.steps = args.steps.unwrap_or(train.steps);
    train.save_every = args.save_every.or(train.save_every);
    args.documents.apply(&mut train.documents);
    // A resumed run keeps its precision on any machine.
    if matches!(train.precision, None | Some(Precision::Auto)) {
        train.precision = Some(precision);
    }
    Ok(())
}

/// Reads the model that a run distills, or whose adapter it trains, if its recipe names one.
fn source(recipe: &Recipe, ctx: &Context) -> Result<Option<Parts>> {
    let (path, what) = match (&recipe.train.uptrain, &recipe.train.lora) {
        (Some(uptrain), _) => {
            (&uptrain.teacher, "the teacher model (--set train.uptrain.original=PATH gives its new location)")
        }
        (None, Some(lora)) => (
            &lora.base,
            "the model that the adapter belongs to (--set train.lora.base=PATH gives its new location)",
        ),
        (None, None) => return Ok(None),
    };
    Ok(Some(pretrained::read(path, &ctx.device).context(what)?))
}
