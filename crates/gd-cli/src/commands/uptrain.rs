//! `gd convert --uptrain`: a run in which the converted model learns from the one it was.

use std::path::PathBuf;

use anyhow::Result;
use gd_model::config::{Recipe, Setting, UPTRAIN};
use gd_model::data::Corpus;
use gd_model::io::tokenizer::Tokenizer;
use gd_model::model::pretrained::{self, Parts};
use gd_model::train::parallel::Group;
use gd_model::train::run::{About, Run};
use gd_model::train::teacher::{reading, schedule};

use super::data::{ReadingArgs, prepared_for};
use super::{Context, convert, train, usage};

/// The flags.
#[derive(Debug, clap::Args)]
// Flattened into those of `gd convert`, which make a group of this name.
#[group(skip)]
pub struct Args {
    /// Train the model on a text and on what the original makes of it
    #[arg(long, requires = "attention")]
    pub uptrain: bool,
    /// The text to train on: files, JSONL files, folders of them, or one folder of prepared data (default: the
    /// shipped sample text)
    #[arg(long, value_name = "FILE", num_args = 1.., requires = "uptrain")]
    pub data: Vec<PathBuf>,
    /// How files become documents
    #[command(flatten)]
    pub reading: ReadingArgs,
    /// Optimizer steps (default: 500)
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..), requires = "uptrain")]
    pub steps: Option<u64>,
    /// A value in place of the one of models/uptrain.json, by its dotted path; can be given several times
    #[arg(long, value_name = "KEY=VALUE", requires = "uptrain")]
    pub set: Vec<Setting>,
    /// End after this many steps, with a checkpoint
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..), requires = "uptrain")]
    pub stop_after: Option<u64>,
}

/// Runs the training.
///
/// # Errors
/// Names the flag, file or value that cannot be used.
pub(super) fn run(group: &Group, args: &convert::Args, ctx: &Context) -> Result<()> {
    let original = pretrained::read(&args.model, &ctx.device)?;
    let (mut recipe, tokenizer) = (recipe(args, &original)?, original.tokenizer.clone());
    let how = &args.uptrain;
    how.reading.apply(&mut recipe.train.documents);
    let corpus = corpus(&how.data, &recipe, &tokenizer)?;
    let name = args.out.file_name().unwrap_or(args.out.as_os_str()).to_string_lossy().into_owned();
    let about = About { name, data: how.data.clone(), seed: ctx.seed.unwrap_or(0) };
    let trainer = train::trainer(group, recipe, Some(original), corpus, &about, ctx)?;
    let run = Run::create(&args.out, trainer, tokenizer, about)?;
    train::carry_out(run, Vec::new(), how.stop_after, ctx)
}

/// The swapped model and its training.
fn recipe(args: &convert::Args, original: &Parts) -> Result<Recipe> {
    let mut model = match args.swap() {
        Some(swap) => swap.of(original)?.0,
        None => original.config.clone(),
    };
    // Trained in f32, whatever it came in.
    (model.dtype, model.origin) = ("float32".into(), None);
    (model.gd.select.candidates, model.gd.select.estimator) = reading(args.k);
    let Some(original) = args.model.to_str() else {
        return Err(usage(format!("{}: a path in UTF-8 is needed to train", args.model.display())));
    };
    let load = |more: &[Setting]| {
        let given = [
            Setting::new("model", serde_json::to_value(&model)?),
            Setting::new("train.uptrain.original", original),
        ];
        let settings = [&given[..], more, &args.uptrain.set].concat();
        train::recipe(UPTRAIN.0, &settings, args.uptrain.steps)
    };
    // The way to few keys begins where the alignment ends, which a setting may have moved.
    let align = load(&[])?.train.uptrain.map_or(0.0, |uptrain| uptrain.align);
    let select = Setting::new("train.select", serde_json::to_value(schedule(args.k, align))?);
    load(&[select])
}

/// The text in the model's tokens.
fn corpus(files: &[PathBuf], recipe: &Recipe, tokenizer: &Tokenizer) -> Result<Corpus> {
    match prepared_for(files, tokenizer)? {
        Some(prepared) => Ok(prepared.corpus),
        None => Ok(Corpus::encode(&train::texts(files, recipe)?, tokenizer)?),
    }
}
