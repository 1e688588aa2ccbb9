//! `gd train --from`: the inputs of a run that goes on from a model.

use std::fs;
use std::path::Path;

use anyhow::Result;
use gd_model::config::{FINETUNE, Recipe, Setting};
use gd_model::io::chat_template::ChatTemplate;
use gd_model::model::adapter;
use gd_model::model::pretrained::{self, Parts};
use gd_model::train::parallel::Group;
use serde_json::json;

use super::{Args, NewRun, check_stdin};
use crate::context::{Context, usage};
use crate::data_source::check_tokens;
use crate::training::{Chats, load_corpus_for, load_recipe};

/// The maximal context of a training whose configuration states none.
const MAX_CONTEXT: usize = 512;
/// The peak of the learning rate of an adapter in a training whose configuration states none. Its matrices are new, so that it
/// is higher than that of whole weights.
const LORA_LR: f64 = 2e-4;

/// Reads the model, the configuration and the data of a run, and checks them.
pub(super) fn read_inputs(group: &Group, args: &Args, model: &Path, ctx: &Context) -> Result<NewRun> {
    let source = pretrained::read(model, &ctx.device)?;
    let mut recipe = recipe(args, model, &source)?;
    recipe.train.save_every = args.save_every.or(recipe.train.save_every);
    args.documents.apply(&mut recipe.train.documents);
    group.check(recipe.train.batch)?;
    check_stdin(group, &args.data)?;
    let name = model.file_stem().map_or("model".into(), |name| name.to_string_lossy().into_owned());
    let out = args.out.clone().unwrap_or_else(|| Path::new("out").join(format!("{name}-tuned")));
    let chats = Chats { template: ChatTemplate::find(&source.files)?, marks_turns: true };
    let data = load_corpus_for(&args.data, &recipe, &source.tokenizer, chats)?;
    for tokens in [&data.corpus.train, &data.corpus.valid] {
        check_tokens(tokens, &source.tokenizer, &recipe.model)?;
    }
    Ok(NewRun { recipe, name, out, data, vocabulary: None, source: Some(source) })
}

/// The preset of such trainings with the configuration of the model, under the flags.
fn recipe(args: &Args, path: &Path, source: &Parts) -> Result<Recipe> {
    let mut model = source.config.clone();
    // The training is in f32 for every stored data type.
    model.dtype = "float32".into();
    let mut origin = model.origin.take();
    if let Some(origin) = &mut origin {
        let name = if origin.get("torch_dtype").is_some() { "torch_dtype" } else { "dtype" };
        origin[name] = json!(model.dtype);
    }
    let mut settings = vec![Setting::new("model", serde_json::to_value(&model)?)];
    if args.config.is_empty() {
        let context = model.max_position_embeddings.min(MAX_CONTEXT);
        settings.push(Setting::new("train.context", context));
    }
    if let Some(lora) = &args.lora {
        // A name of the Hub is not a path.
        let base = fs::canonicalize(path).unwrap_or_else(|_| path.into());
        let Some(base) = base.to_str() else {
            return Err(usage(format!("{}: --lora requires a path in UTF-8", path.display())));
        };
        if args.config.is_empty() {
            settings.push(Setting::new("train.lr.peak", LORA_LR));
        }
        settings.push(Setting::new("train.lora", lora.block(base)));
    }
    settings.extend(args.set.iter().cloned());
    let configs = [&[FINETUNE.0.to_owned()], args.config.as_slice()].concat();
    let mut recipe = load_recipe(&configs, &settings, args.steps)?;
    if recipe.train.uptrain.is_some() {
        return Err(usage("train.uptrain: use `gd convert --uptrain` to start a run that distills a model"));
    }
    if let Some(lora) = &recipe.train.lora {
        adapter::targets(lora, &recipe.model)?;
    }
    recipe.model.origin = origin;
    Ok(recipe)
}
