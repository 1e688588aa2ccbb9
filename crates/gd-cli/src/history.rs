//! The log and the configuration in the folder of a run.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::Result;
use gd_model::Error;
use gd_model::train::log::{self, scalars};
use gd_model::train::run::RECIPE;
use serde_json::{Map, Value};

/// The quantity of the x axis of a curve.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Axis {
    /// Optimizer steps
    Step,
    /// Training tokens
    Tokens,
    /// Minutes since the start of the run
    Time,
}

/// The log and the configuration of a run.
#[derive(Debug)]
pub struct History {
    /// Name of the folder, or its path where several runs have the same name.
    pub name: String,
    /// Lines of the log that describe a step. There is at least one.
    pub steps: Vec<Map<String, Value>>,
    /// Lines of the log that describe an event.
    pub events: Vec<Map<String, Value>>,
    /// Content of `recipe.json`, if it exists.
    pub recipe: Option<Value>,
}

impl History {
    /// Reads a run from its folder, or from the path of its log.
    ///
    /// # Errors
    /// Names the file that is missing or malformed, or a log without steps.
    pub fn load(path: &Path) -> Result<Self> {
        let folder: PathBuf = match path.is_file() {
            true => path.parent().map(Path::to_path_buf).unwrap_or_default(),
            false => path.into(),
        };
        let file = if path.is_file() { path.into() } else { folder.join(log::FILE) };
        let (events, steps): (Vec<_>, Vec<_>) =
            log::read(&file)?.into_iter().partition(|line| line.contains_key("event"));
        if steps.is_empty() {
            return Err(Error::Empty { path: file, reason: "the log has no step yet" }.into());
        }
        // The canonical path has a last component even if the folder is given as `.`.
        let canonical = fs::canonicalize(&folder).unwrap_or_else(|_| folder.clone());
        let name = canonical.file_name().map_or("run".into(), |n| n.to_string_lossy().into_owned());
        let recipe = fs::read(folder.join(RECIPE)).ok().and_then(|bytes| serde_json::from_slice(&bytes).ok());
        Ok(Self { name, steps, events, recipe })
    }

    /// Reads several runs, and tells those with the same name apart by their paths.
    ///
    /// # Errors
    /// As [`History::load`].
    pub fn load_all(paths: &[PathBuf]) -> Result<Vec<Self>> {
        let mut runs = paths.iter().map(|path| Self::load(path)).collect::<Result<Vec<_>>>()?;
        let names: Vec<String> = runs.iter().map(|run| run.name.clone()).collect();
        for (run, path) in runs.iter_mut().zip(paths) {
            if names.iter().filter(|name| **name == run.name).count() > 1 {
                run.name = path.display().to_string();
            }
        }
        Ok(runs)
    }

    /// The names of the numbers that the steps contain.
    pub fn names(&self) -> BTreeSet<String> {
        self.steps.iter().flat_map(scalars).map(|(name, _)| name).collect()
    }

    /// The points (x, value) of a number, from the steps that contain it.
    pub fn series(&self, name: &str, axis: Axis) -> Vec<(f64, f64)> {
        let start = self.events.iter().chain(&self.steps).filter_map(|line| number(line, "time")).next();
        let x = |line: &Map<String, Value>| match axis {
            Axis::Step => number(line, "step"),
            Axis::Tokens => number(line, "tokens"),
            Axis::Time => Some((number(line, "time")? - start?) / 60.0),
        };
        let value = |line: &Map<String, Value>| scalars(line).into_iter().find(|s| s.0 == name).map(|s| s.1);
        self.steps.iter().filter_map(|line| Some((x(line)?, value(line)?))).collect()
    }
}

/// A number of a line of the log.
pub fn number(line: &Map<String, Value>, key: &str) -> Option<f64> {
    line.get(key).and_then(Value::as_f64)
}
