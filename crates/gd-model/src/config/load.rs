//! Loading a recipe from a preset or a file, with settings that replace single values.

use std::path::Path;

use serde::de::DeserializeOwned;
use serde_json::Value;
use serde_path_to_error::Segment;

use super::value::{Tree, ValueError};
use super::{PRESETS, Recipe, Setting, UPTRAIN};
use crate::error::{ConfigProblem, Error, Result};
use crate::io::files::read_text;

/// The minimal Jaro similarity of a name that is suggested in place of an unknown one.
const MIN_SIMILARITY: f64 = 0.7;

impl Recipe {
    /// Loads a preset by its name, or a file: TOML if its name ends in `.toml`, else JSON.
    ///
    /// # Errors
    /// As [`Recipe::load_with`].
    pub fn load(name: &str) -> Result<Self> {
        Self::load_with(name, &[])
    }

    /// Loads a preset or file and replaces the values that `settings` name. The result is validated after the
    /// replacement, so that the settings may depend on each other.
    ///
    /// ```
    /// use gd_model::config::{Recipe, Setting};
    ///
    /// let settings = [Setting::new("train.steps", 100), "train.lr.peak=1e-3".parse::<Setting>()?];
    /// let recipe = Recipe::load_with("tiny", &settings)?;
    /// assert_eq!((recipe.train.steps, recipe.train.lr.peak), (100, 1e-3));
    ///
    /// let error = Recipe::load_with("tiny", &[Setting::new("train.step", 100)]).unwrap_err();
    /// assert!(error.to_string().contains("did you mean train.steps?"));
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    ///
    /// # Errors
    /// - [`Error::UnknownName`] if there is neither a preset nor a file of this name.
    /// - [`Error::Config`] with every key and value that cannot be used.
    /// - An error that names the file, if it cannot be read.
    pub fn load_with(name: &str, settings: &[Setting]) -> Result<Self> {
        let mut tree = tree(name)?;
        settings.iter().try_for_each(|setting| setting.apply(&mut tree))?;
        let failed = |problems| Error::Config { source_name: name.into(), problems };
        let recipe: Self = parse(tree).map_err(failed)?;
        let problems = recipe.problems();
        if problems.is_empty() { Ok(recipe) } else { Err(failed(problems)) }
    }

    /// The problems of the model, of the training, and between them.
    fn problems(&self) -> Vec<ConfigProblem> {
        let parts = [self.model.validate(), self.train.validate()];
        let mut problems: Vec<_> =
            parts.into_iter().filter_map(|part| part.err().map(ConfigProblem::from)).collect();
        let (context, longest) = (self.train.context, self.model.max_position_embeddings);
        if context > longest {
            let allowed = format!("at most max_position_embeddings {longest}");
            problems.push(Error::out_of_range("train.context", context, allowed).into());
        }
        problems
    }
}

/// The content of a preset or file, not yet validated.
fn tree(name: &str) -> Result<Value> {
    let named = |e: &dyn std::fmt::Display| Error::Config {
        source_name: name.into(),
        problems: vec![ConfigProblem::WrongType { key: String::new(), reason: e.to_string() }],
    };
    if let Some((_, text)) = PRESETS.iter().chain([&UPTRAIN]).find(|(preset, _)| *preset == name) {
        return serde_json::from_str(text).map_err(|e| named(&e));
    }
    let path = Path::new(name);
    if !path.exists() {
        let names: Vec<_> = PRESETS.iter().map(|p| p.0).collect();
        return Err(Error::UnknownName {
            what: "preset or file",
            name: name.into(),
            suggestion: nearest(name, &names),
            allowed: names.into_iter().map(str::to_owned).collect(),
        });
    }
    let text = read_text(path)?;
    match path.extension().is_some_and(|e| e == "toml") {
        true => toml::from_str(&text).map_err(|e| named(&e)),
        false => serde_json::from_str(&text).map_err(|e| named(&e)),
    }
}

/// Deserializes a value of a type that refuses unknown keys, and collects all problems: what is wrong is removed from
/// the tree and the rest is read again, until the tree is valid or lacks a key.
///
/// # Errors
/// The list of problems, in the order in which they were found.
pub fn parse<T: DeserializeOwned>(mut tree: Value) -> std::result::Result<T, Vec<ConfigProblem>> {
    let mut problems = Vec::new();
    loop {
        let error = match serde_path_to_error::deserialize::<_, T>(Tree(tree.clone())) {
            Ok(value) if problems.is_empty() => return Ok(value),
            Ok(_) => return Err(problems),
            Err(error) => error,
        };
        let path: Vec<String> = error.path().iter().filter_map(step).collect();
        let error = error.into_inner();
        let missing = matches!(error, ValueError::MissingField(_));
        // After a removal a key may be missing because its value was wrong.
        if !missing || problems.is_empty() {
            problems.push(describe(&path, error));
        }
        if missing || !remove(&mut tree, &path) {
            return Err(problems);
        }
    }
}

fn step(segment: &Segment) -> Option<String> {
    match segment {
        Segment::Seq { index } => Some(index.to_string()),
        Segment::Map { key } => Some(key.clone()),
        Segment::Enum { variant } => Some(variant.clone()),
        Segment::Unknown => None,
    }
}

/// Removes the value at `path`; returns whether there was one.
fn remove(tree: &mut Value, path: &[String]) -> bool {
    let Some((last, parents)) = path.split_last() else { return false };
    let at = parents.iter().try_fold(tree, |at, key| match at {
        Value::Object(map) => map.get_mut(key),
        _ => None,
    });
    at.and_then(Value::as_object_mut).is_some_and(|map| map.remove(last).is_some())
}

/// The problem that `error` is at `path`.
fn describe(path: &[String], error: ValueError) -> ConfigProblem {
    let owned = |names: &[&str]| names.iter().map(|name| (*name).to_owned()).collect();
    let below = |parent: &[String], name: &str| [parent, &[name.to_owned()]].concat().join(".");
    match error {
        ValueError::UnknownField { name, allowed } => {
            let parent = match path.split_last() {
                Some((last, parent)) if *last == name => parent,
                _ => path,
            };
            ConfigProblem::UnknownKey {
                key: below(parent, &name),
                suggestion: nearest(&name, allowed).map(|near| below(parent, &near)),
                allowed: owned(allowed),
            }
        }
        ValueError::MissingField(name) => ConfigProblem::MissingKey { key: below(path, name) },
        ValueError::UnknownVariant { name, allowed } => ConfigProblem::UnknownValue {
            key: path.join("."),
            suggestion: nearest(&name, allowed),
            value: name,
            allowed: owned(allowed),
        },
        ValueError::Other(reason) => ConfigProblem::WrongType { key: path.join("."), reason },
    }
}

/// The allowed name that is most similar to `name`, if it is similar enough to be meant.
pub(crate) fn nearest(name: &str, allowed: &[&str]) -> Option<String> {
    let similarity = |other: &&str| strsim::jaro(name, other);
    let closest = allowed.iter().copied().max_by(|a, b| similarity(a).total_cmp(&similarity(b)))?;
    (similarity(&closest) > MIN_SIMILARITY).then(|| closest.to_owned())
}
