//! The recipe and the text of a run, from the flags that name them.

use std::path::PathBuf;

use anyhow::Result;
use gd_model::config::{Recipe, Setting, TokenizerChoice};
use gd_model::data::{Corpus, Texts};
use gd_model::io::tokenizer::Tokenizer;

use crate::data_source::prepared_data;

/// The text that a run without `--data` trains on. It is part of the program, so that `gd train` runs anywhere.
const SAMPLE_TEXT: &str = include_str!("../../text/sample.txt");

/// Loads a preset or a configuration file with the values of `--set` and `--steps`. If `steps` is given, the warm-up
/// is at most half of it.
///
/// # Errors
/// Names the file, key or value that is not valid.
pub fn load_recipe(config: &str, settings: &[Setting], steps: Option<u64>) -> Result<Recipe> {
    let recipe = Recipe::load_with(config, settings)?;
    let Some(steps) = steps else { return Ok(recipe) };
    let warmup = recipe.train.lr.warmup.min(steps / 2);
    let more = [Setting::new("train.lr.warmup", warmup), Setting::new("train.steps", steps)];
    Ok(Recipe::load_with(config, &[settings, &more].concat())?)
}

/// Opens prepared data, or reads and tokenizes texts with the recipe's tokenizer. Sets the vocabulary size of the
/// recipe's model.
///
/// # Errors
/// Names the file that cannot be read, or data that is too short.
pub fn load_corpus(files: &[PathBuf], recipe: &mut Recipe) -> Result<(Corpus, Tokenizer)> {
    if let Some(prepared) = prepared_data(files)? {
        recipe.model.vocab_size = prepared.tokenizer.vocab_size();
        return Ok((prepared.corpus, prepared.tokenizer));
    }
    let texts = load_texts(files, recipe)?;
    let tokenizer = match recipe.train.tokenizer {
        TokenizerChoice::Bytes => Tokenizer::bytes()?,
        TokenizerChoice::Bpe { vocab } => Tokenizer::train_bpe(texts.train.iter(), vocab)?,
    };
    recipe.model.vocab_size = tokenizer.vocab_size();
    Ok((Corpus::encode(&texts, &tokenizer)?, tokenizer))
}

/// Reads the files, or the sample text if there are none, and splits them into training and validation text.
///
/// # Errors
/// Names the file that cannot be read.
pub fn load_texts(files: &[PathBuf], recipe: &Recipe) -> Result<Texts> {
    let train = &recipe.train;
    Ok(match files {
        [] => Texts::split(&[SAMPLE_TEXT.to_owned()], train.valid_fraction)?,
        files => Texts::load(files, &train.documents, train.valid_fraction)?,
    })
}
