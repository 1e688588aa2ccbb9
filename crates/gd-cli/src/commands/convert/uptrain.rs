//! `gd convert --uptrain`: a run in which the converted model distills the source model.

use anyhow::Result;
use gd_model::config::{Recipe, Setting, UPTRAIN, training_candidates, uptrain_schedule};
use gd_model::io::chat_template::ChatTemplate;
use gd_model::model::pretrained::{self, Parts};
use gd_model::train::parallel::Group;
use gd_model::train::run::{About, Run};

use super::args::Args;
use crate::context::{Context, usage};
use crate::data_source::check_tokens;
use crate::terminal::note;
use crate::training::{Chats, load_corpus_for, load_recipe, new_trainer, run_to_end};

/// Runs the training.
///
/// # Errors
/// Names the flag, file or value that is not valid.
pub(super) fn run(group: &Group, args: &Args, ctx: &Context) -> Result<()> {
    let teacher = pretrained::read(&args.model, &ctx.device)?;
    let (mut recipe, tokenizer) = (recipe(args, &teacher)?, teacher.tokenizer.clone());
    let flags = &args.uptrain;
    flags.documents.apply(&mut recipe.train.documents);
    let chats = Chats { template: ChatTemplate::find(&teacher.files)?, marks_turns: false };
    let data = load_corpus_for(&flags.data, &recipe, &tokenizer, chats)?;
    for tokens in [&data.corpus.train, &data.corpus.valid] {
        check_tokens(tokens, &tokenizer, &recipe.model)?;
    }
    if group.leads() {
        note(&data.summary);
    }
    let name = args.out.file_name().unwrap_or(args.out.as_os_str()).to_string_lossy().into_owned();
    let about = About { name, data: flags.data.clone(), from: None, seed: ctx.seed() };
    let trainer = new_trainer(group, recipe, Some(teacher), data.corpus, &about, ctx)?;
    let run = Run::create(&args.out, trainer, tokenizer, about)?;
    run_to_end(run, Vec::new(), flags.stop_after, ctx)
}

/// The configuration of the converted model and of its training.
fn recipe(args: &Args, teacher: &Parts) -> Result<Recipe> {
    let mut model = match args.swap() {
        Some(swap) => swap.resolve(teacher)?.0,
        None => teacher.config.clone(),
    };
    // The training is in f32 for every stored data type.
    (model.dtype, model.origin) = ("float32".into(), None);
    if args.selects() {
        (model.gd.select.candidates, model.gd.select.estimator) = training_candidates(args.k());
    }
    let Some(teacher_path) = args.model.to_str() else {
        return Err(usage(format!("{}: --uptrain requires a path in UTF-8", args.model.display())));
    };
    let load = |more: &[Setting]| {
        let given = [
            Setting::new("model", serde_json::to_value(&model)?),
            Setting::new("train.uptrain.original", teacher_path),
        ];
        let settings = [&given[..], more, &args.uptrain.set].concat();
        load_recipe(&[UPTRAIN.0], &settings, args.uptrain.steps)
    };
    if !args.selects() {
        return load(&[]);
    }
    // The number of keys decreases from the end of the layer alignment on, which --set may have changed.
    let align = load(&[])?.train.uptrain.map_or(0.0, |uptrain| uptrain.align);
    let select = Setting::new("train.select", serde_json::to_value(uptrain_schedule(args.k(), align))?);
    load(&[select])
}
