//! From a preset's name or a file, and what overrides it, to a checked recipe.

use std::path::Path;

use serde::de::DeserializeOwned;
use serde_json::Value;
use serde_path_to_error::Segment;

use super::{PRESETS, Recipe, Setting, UPTRAIN};
use crate::data::read_text;
use crate::error::{Error, Result};

impl Recipe {
    /// A preset by name, or a file: TOML where its name ends so, else JSON.
    ///
    /// # Errors
    /// As [`Recipe::load_with`].
    pub fn load(name: &str) -> Result<Self> {
        Self::load_with(name, &[])
    }

    /// The same, with `settings` in place of what the preset or file has. They are merged first, so
    /// that what is checked is the whole that will run.
    ///
    /// # Errors
    /// Names the preset or file, and every key or value in it that does not fit.
    pub fn load_with(name: &str, settings: &[Setting]) -> Result<Self> {
        let mut tree = tree(name)?;
        settings.iter().try_for_each(|setting| setting.apply(&mut tree))?;
        let whole = |problems: Vec<String>| Error::Invalid(format!("{name}: {}", problems.join("; ")));
        let recipe: Self = parse(tree).map_err(whole)?;
        let problems = recipe.problems();
        if problems.is_empty() { Ok(recipe) } else { Err(whole(problems)) }
    }

    /// What does not fit in each of the parts, and between them.
    fn problems(&self) -> Vec<String> {
        let parts = [self.model.validate(), self.train.validate()];
        let mut problems: Vec<_> = parts.into_iter().filter_map(|r| r.err().map(|e| e.to_string())).collect();
        let (context, longest) = (self.train.context, self.model.max_position_embeddings);
        if context > longest {
            problems.push(format!("train.context {context} exceeds max_position_embeddings {longest}"));
        }
        problems
    }
}

/// The unchecked content of a preset or file.
fn tree(name: &str) -> Result<Value> {
    let named = |e: &dyn std::fmt::Display| Error::Invalid(format!("{name}: {e}"));
    if let Some((_, text)) = PRESETS.iter().chain([&UPTRAIN]).find(|(preset, _)| *preset == name) {
        return serde_json::from_str(text).map_err(|e| named(&e));
    }
    let path = Path::new(name);
    if !path.exists() {
        let names: Vec<_> = PRESETS.iter().map(|p| p.0).collect();
        let guess = nearest(name, &names).map_or(String::new(), |near| format!("; did you mean {near}?"));
        return Err(Error::Invalid(format!(
            "config {name:?} is neither a file nor a preset ({}){guess}",
            names.join(", ")
        )));
    }
    let text = read_text(path)?;
    match path.extension().is_some_and(|e| e == "toml") {
        true => toml::from_str(&text).map_err(|e| named(&e)),
        false => serde_json::from_str(&text).map_err(|e| named(&e)),
    }
}

/// Reads a value of type `T`, which refuses unknown keys. On failure every problem, with its path:
/// what is wrong is taken out and the rest read again, until it is whole or lacks a key.
///
/// # Errors
/// The list of problems.
pub fn parse<T: DeserializeOwned>(mut tree: Value) -> std::result::Result<T, Vec<String>> {
    let mut problems = Vec::new();
    loop {
        let error = match serde_path_to_error::deserialize::<_, T>(&tree) {
            Ok(found) if problems.is_empty() => return Ok(found),
            Ok(_) => return Err(problems),
            Err(error) => error,
        };
        let path: Vec<String> = error.path().iter().filter_map(step).collect();
        let message = error.inner().to_string();
        let missing = message.strip_prefix("missing field ");
        if missing.is_none() || problems.is_empty() {
            problems.push(describe(&path, &message));
        }
        if missing.is_some() || !remove(&mut tree, &path) {
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

/// Takes out the value at `path`; false where there is none.
fn remove(tree: &mut Value, path: &[String]) -> bool {
    let Some((last, parents)) = path.split_last() else { return false };
    let at = parents.iter().try_fold(tree, |at, key| match at {
        Value::Object(map) => map.get_mut(key),
        _ => None,
    });
    at.and_then(Value::as_object_mut).is_some_and(|map| map.remove(last).is_some())
}

/// Serde's message about the value at `path` in our words. Its quoted names are the name at fault and
/// those that the type knows, so that no list of keys is kept here.
fn describe(path: &[String], message: &str) -> String {
    let at = path.join(".");
    let quoted: Vec<&str> = message.split('`').skip(1).step_by(2).collect();
    match (message.split('`').next().unwrap_or_default(), &quoted[..]) {
        ("unknown field ", [name, known @ ..]) => {
            let parent = match path.split_last() {
                Some((last, parent)) if last == name => parent,
                _ => path,
            };
            let full =
                |name: &str| parent.iter().map(String::as_str).chain([name]).collect::<Vec<_>>().join(".");
            match nearest(name, known) {
                Some(near) => format!("unknown key {}; did you mean {}?", full(name), full(near)),
                None => format!("unknown key {} (known here: {})", full(name), known.join(", ")),
            }
        }
        ("missing field ", [name]) => {
            format!(
                "{} is missing",
                path.iter().map(String::as_str).chain([*name]).collect::<Vec<_>>().join(".")
            )
        }
        ("unknown variant ", [name, known @ ..]) => match nearest(name, known) {
            Some(near) => format!("{at} {name:?} is unknown; did you mean {near:?}?"),
            None => format!("{at} {name:?} is unknown (known: {})", known.join(", ")),
        },
        _ if at.is_empty() => message.to_owned(),
        _ => format!("{at}: {message}"),
    }
}

/// The name that was probably meant.
fn nearest<'a>(name: &str, known: &[&'a str]) -> Option<&'a str> {
    let likeness = |known: &&str| strsim::jaro(name, known);
    let best = known.iter().copied().max_by(|a, b| likeness(a).total_cmp(&likeness(b)))?;
    (likeness(&best) > 0.7).then_some(best)
}
