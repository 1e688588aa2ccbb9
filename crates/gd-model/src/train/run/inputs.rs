//! The inputs of a run that must not change between a checkpoint and the steps after it.

use std::path::Path;

use serde::de::DeserializeOwned;
use serde_json::Value;

use crate::config::{Precision, Recipe};
use crate::error::{Error, Result, RunInput};
use crate::train::Trainer;
use crate::train::schedule::ScheduledValues;

/// The number of digits of a hash in messages.
const HASH_DIGITS: usize = 16;

/// Checks that a run that was trained with the recipe `trained` for `done` steps can be resumed with `new`.
///
/// # Errors
/// [`Error::RunChanged`] or [`Error::RunLength`].
pub(super) fn check_recipe(folder: &Path, trained: &Recipe, new: &Recipe, done: u64) -> Result<()> {
    let mut same_length = new.clone();
    same_length.train.steps = trained.train.steps;
    let (stored, actual) = (recipe_hash(trained)?, recipe_hash(&same_length)?);
    require_same(folder, RunInput::Configuration, Some(&stored), Some(&actual))?;
    let (from, to) = (trained.train.steps, new.train.steps);
    let length = |differs| Error::RunLength { path: folder.into(), from, to, done, differs };
    if to < done {
        return Err(length(None));
    }
    let values = |recipe: &Recipe, step| ScheduledValues::at(&recipe.train, step);
    match (0..done).find(|&step| values(trained, step) != values(new, step)) {
        Some(step) if from != to => Err(length(Some(step + 1))),
        _ => Ok(()),
    }
}

/// Checks that the hash of an input is the stored one.
///
/// # Errors
/// [`Error::RunChanged`].
pub(super) fn require_same(
    folder: &Path,
    what: RunInput,
    stored: Option<&str>,
    actual: Option<&str>,
) -> Result<()> {
    if stored == actual {
        return Ok(());
    }
    let digits = |hash: Option<&str>| hash.unwrap_or("none").chars().take(HASH_DIGITS).collect();
    Err(Error::RunChanged { path: folder.into(), what, stored: digits(stored), actual: digits(actual) })
}

/// The hash of the weights of the teacher, if there is one.
pub(super) fn teacher_hash(trainer: &Trainer) -> Option<String> {
    trainer.teacher().map(|teacher| teacher.hash().to_hex().to_string())
}

/// The hash of the weights of the model whose adapter is trained, if the run trains one.
pub(super) fn base_hash(trainer: &Trainer) -> Option<String> {
    trainer.base_hash().map(|hash| hash.to_hex().to_string())
}

/// The hash of the settings in a recipe that the result of a run depends on.
pub(super) fn recipe_hash(recipe: &Recipe) -> Result<String> {
    let mut recipe = recipe.clone();
    (recipe.train.save_every, recipe.train.keep, recipe.train.sample_every) = (None, 0, None);
    recipe.train.sample_prompt.clear();
    recipe.train.precision = recipe.train.precision.filter(|p| *p != Precision::F32);
    // The teacher and the base of an adapter may have moved. Their weights have hashes of their own.
    if let Some(uptrain) = &mut recipe.train.uptrain {
        uptrain.teacher.clear();
    }
    if let Some(lora) = &mut recipe.train.lora {
        lora.base.clear();
    }
    Ok(blake3::hash(&pretty(&recipe)?).to_hex().to_string())
}

/// The text of [`RECIPE`](super::RECIPE).
pub(super) fn pretty(recipe: &Recipe) -> Result<Vec<u8>> {
    let json = serde_json::to_value(recipe)
        .map_err(|e| Error::Invalid(format!("the recipe does not fit JSON: {e}")))?;
    Ok(format!("{json:#}\n").into_bytes())
}

/// Deserializes the JSON file at `path`.
pub(super) fn parse<T: DeserializeOwned>(path: &Path, json: Value) -> Result<T> {
    serde_json::from_value(json).map_err(|e| Error::Foreign {
        path: path.into(),
        kind: "training state",
        reason: e.to_string(),
    })
}
