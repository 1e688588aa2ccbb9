//! Loading a recipe from a preset or a file, with settings that replace single values.

use std::path::Path;

use serde::de::DeserializeOwned;
use serde_json::{Map, Value};
use serde_path_to_error::Segment;

use super::checks::inside;
use super::value::{Tree, ValueError};
use super::{FINETUNE, PRESETS, Recipe, Setting, UPTRAIN};
use crate::error::{ConfigProblem, Error, Result};
use crate::io::files::read_text;

/// The minimal Jaro similarity of a name that is suggested in place of an unknown one.
const MIN_SIMILARITY: f64 = 0.7;

/// The key of a file with the name of the preset that it changes.
pub(super) const PRESET: &str = "preset";

impl Recipe {
    /// Loads a preset by its name, or a file: TOML if its name ends in `.toml`, else JSON.
    ///
    /// # Errors
    /// As [`Recipe::merged`].
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
    /// As [`Recipe::merged`].
    pub fn load_with(name: &str, settings: &[Setting]) -> Result<Self> {
        Self::merged(&[name], settings)
    }

    /// Loads presets and files and merges them: a value of a later one replaces that of an earlier one, key by key. A file
    /// may name the preset that it changes under the key `preset`. Then the values that `settings` name are replaced.
    ///
    /// # Errors
    /// - [`Error::UnknownName`] if there is neither a preset nor a file of a name.
    /// - [`Error::Config`] with every key and value that cannot be used.
    /// - An error that names the file, if it cannot be read.
    pub fn merged(names: &[impl AsRef<str>], settings: &[Setting]) -> Result<Self> {
        let mut merged = Value::Object(Map::new());
        for name in names {
            merge(&mut merged, tree(name.as_ref())?);
        }
        let mut problems = Vec::new();
        problems.extend(settings.iter().filter_map(|s| s.apply(&mut merged).err()).map(ConfigProblem::from));
        // Values for what is missing or wrong, so that the rest can be checked, too.
        let fallback = preset(PRESETS[0].1)?;
        let Parsed { value, problems: wrong, replaced } = parse_with::<Self>(merged, &fallback);
        let missing =
            wrong.iter().filter(|problem| matches!(problem, ConfigProblem::MissingKey { .. })).count();
        problems.extend(wrong);
        if let Some(recipe) = &value {
            // A check that involves a replaced value is no problem of the configuration.
            let concerns_replaced = |text: &str| replaced.iter().any(|key| text.contains(key.as_str()));
            problems.extend(recipe.problems().into_iter().filter(|p| !concerns_replaced(&p.to_string())));
        }
        let names: Vec<_> = names.iter().map(AsRef::as_ref).collect();
        if missing > 1 {
            problems.push(ConfigProblem::Unsupported(format!(
                "a configuration that is a part needs a preset: preset = \"tiny\" in it, or --config tiny before --config {}",
                names.join(" --config ")
            )));
        }
        match value {
            Some(recipe) if problems.is_empty() => Ok(recipe),
            _ => Err(Error::Config { source_name: names.join(" + "), problems }),
        }
    }

    /// The problems of the model, of the training, and between them.
    fn problems(&self) -> Vec<ConfigProblem> {
        let mut problems = inside("model", self.model.problems());
        problems.extend(self.train.problems());
        let (context, longest) = (self.train.context, self.model.max_position_embeddings);
        if context > longest {
            let allowed = format!("at most max_position_embeddings {longest}");
            problems.push(Error::out_of_range("train.context", context, allowed));
        }
        problems.into_iter().map(ConfigProblem::from).collect()
    }
}

/// Replaces the values of `tree` by those of `over`, key by key; a value that is not a table replaces a table.
fn merge(tree: &mut Value, over: Value) {
    match (tree, over) {
        (Value::Object(tree), Value::Object(over)) => {
            for (key, value) in over {
                merge(tree.entry(key).or_insert(Value::Null), value);
            }
        }
        (tree, over) => *tree = over,
    }
}

/// The tree of the JSON text of a preset.
fn preset(text: &str) -> Result<Value> {
    serde_json::from_str(text).map_err(|e| Error::Invalid(format!("a preset: {e}")))
}

/// The content of a preset or file, not yet validated. A file with the key `preset` is merged with that preset.
fn tree(name: &str) -> Result<Value> {
    let failed = |problem| Error::Config { source_name: name.into(), problems: vec![problem] };
    let malformed = |e: &dyn std::fmt::Display| {
        failed(ConfigProblem::WrongType { key: String::new(), reason: e.to_string() })
    };
    if let Some((_, text)) = PRESETS.iter().chain([&UPTRAIN, &FINETUNE]).find(|(preset, _)| *preset == name) {
        return preset(text);
    }
    let path = Path::new(name);
    let names: Vec<_> = PRESETS.iter().map(|p| p.0).collect();
    if !path.exists() {
        return Err(Error::UnknownName {
            what: "preset or file",
            name: name.into(),
            suggestion: nearest(name, &names),
            allowed: names.into_iter().map(str::to_owned).collect(),
        });
    }
    let text = read_text(path)?;
    let mut tree: Value = match path.extension().is_some_and(|e| e.eq_ignore_ascii_case("toml")) {
        true => toml::from_str(&text).map_err(|e| malformed(&e))?,
        false => serde_json::from_str(&text).map_err(|e| malformed(&e))?,
    };
    let Some(base) = tree.as_object_mut().and_then(|keys| keys.remove(PRESET)) else { return Ok(tree) };
    let base_name = base.as_str().unwrap_or_default();
    let Some((_, text)) = PRESETS.iter().find(|(preset, _)| *preset == base_name) else {
        return Err(failed(ConfigProblem::UnknownValue {
            key: PRESET.into(),
            value: base.as_str().map_or(base.to_string(), str::to_owned),
            suggestion: nearest(base_name, &names),
            allowed: names.into_iter().map(str::to_owned).collect(),
        }));
    };
    let mut merged = preset(text)?;
    merge(&mut merged, tree);
    Ok(merged)
}

/// Deserializes a value of a type that refuses unknown keys, and collects all problems: what is wrong is removed from
/// the tree and the rest is read again, until the tree is valid or lacks a key.
///
/// # Errors
/// The list of problems, in the order in which they were found.
pub fn parse<T: DeserializeOwned>(tree: Value) -> std::result::Result<T, Vec<ConfigProblem>> {
    let Parsed { value, problems, .. } = parse_with(tree, &Value::Null);
    match value {
        Some(value) if problems.is_empty() => Ok(value),
        _ => Err(problems),
    }
}

/// The result of [`parse_with`].
struct Parsed<T> {
    /// The value, if the tree could be made valid.
    value: Option<T>,
    problems: Vec<ConfigProblem>,
    /// The keys whose values were replaced or removed.
    replaced: Vec<String>,
}

/// As [`parse`]. What is wrong or missing gets the value that `fallback` has at the same path, if it has one.
fn parse_with<T: DeserializeOwned>(mut tree: Value, fallback: &Value) -> Parsed<T> {
    let (mut problems, mut replaced) = (Vec::new(), Vec::new());
    loop {
        let error = match serde_path_to_error::deserialize::<_, T>(Tree(tree.clone())) {
            Ok(value) => return Parsed { value: Some(value), problems, replaced },
            Err(error) => error,
        };
        let mut path: Vec<String> = error.path().iter().filter_map(step).collect();
        let error = error.into_inner();
        let missing = match &error {
            ValueError::MissingField(name) => Some((*name).to_owned()),
            _ => None,
        };
        let is_unknown = matches!(error, ValueError::UnknownField { .. });
        // After a removal a key may be missing because its value was wrong.
        if missing.is_none() || problems.is_empty() || !fallback.is_null() {
            problems.push(describe(&path, error));
        }
        path.extend(missing.clone());
        let changed = match missing {
            Some(_) => value_at(fallback, &path).is_some_and(|value| insert(&mut tree, &path, value)),
            // An element of a list cannot be replaced alone.
            None => (1..=path.len()).rev().any(|n| replace(&mut tree, &path[..n], fallback)),
        };
        if !changed {
            return Parsed { value: None, problems, replaced };
        }
        if !is_unknown {
            replaced.push(path.join("."));
        }
    }
}

/// The value at `path`.
fn value_at<'a>(tree: &'a Value, path: &[String]) -> Option<&'a Value> {
    path.iter().try_fold(tree, |at, key| at.as_object()?.get(key))
}

/// The table that has the last key of `path`, and this key.
fn table_at<'a, 'b>(
    tree: &'a mut Value,
    path: &'b [String],
) -> Option<(&'a mut Map<String, Value>, &'b String)> {
    let (last, parents) = path.split_last()?;
    let table = parents.iter().try_fold(tree, |at, key| at.as_object_mut()?.get_mut(key))?;
    Some((table.as_object_mut()?, last))
}

/// Sets the value at `path`; returns whether there is a table for it, without this value before.
fn insert(tree: &mut Value, path: &[String], value: &Value) -> bool {
    let Some((table, key)) = table_at(tree, path) else { return false };
    table.insert(key.clone(), value.clone()).as_ref() != Some(value)
}

/// Replaces the value at `path` by that of `fallback`, or removes it if `fallback` has none or the same; returns whether
/// there was one.
fn replace(tree: &mut Value, path: &[String], fallback: &Value) -> bool {
    let Some((table, key)) = table_at(tree, path) else { return false };
    match value_at(fallback, path) {
        Some(value) if table.get(key).is_some_and(|old| old != value) => {
            table.insert(key.clone(), value.clone());
            true
        }
        _ => table.remove(key).is_some(),
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
