//! A run as its folder tells it: the log's steps and events, and the configuration.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use gd_model::error::{Error, Result};
use gd_model::train::log::{self, scalars};
use gd_model::train::run::RECIPE;
use serde_json::{Map, Value};

use crate::plot::{Curve, Panel, Style, smooth, thin};

/// What curves go by.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Axis {
    /// Optimizer steps.
    Step,
    /// Training tokens.
    Tokens,
    /// Minutes since the run began.
    Time,
}

/// A run, read from its folder.
#[derive(Debug)]
pub struct History {
    /// The name of its folder.
    pub name: String,
    /// The lines of its steps.
    pub steps: Vec<Map<String, Value>>,
    /// The lines of its events.
    pub events: Vec<Map<String, Value>>,
    /// `recipe.json`, if it is there.
    pub recipe: Option<Value>,
}

impl History {
    /// Reads the run in a folder, or whose log is at `path`.
    ///
    /// # Errors
    /// Names the file that is missing or not what it should be.
    pub fn load(path: &Path) -> Result<Self> {
        let folder: PathBuf = match path.is_file() {
            true => path.parent().map(Path::to_path_buf).unwrap_or_default(),
            false => path.into(),
        };
        let file = if path.is_file() { path.into() } else { folder.join(log::FILE) };
        let (events, steps): (Vec<_>, Vec<_>) =
            log::read(&file)?.into_iter().partition(|line| line.contains_key("event"));
        if steps.is_empty() {
            return Err(Error::Empty { path: file, reason: "the log has no step yet" });
        }
        // A folder may be given as `.`.
        let full = fs::canonicalize(&folder).unwrap_or_else(|_| folder.clone());
        let name = full.file_name().map_or("run".into(), |n| n.to_string_lossy().into_owned());
        let recipe = fs::read(folder.join(RECIPE)).ok().and_then(|bytes| serde_json::from_slice(&bytes).ok());
        Ok(Self { name, steps, events, recipe })
    }

    /// The names of the numbers in its steps.
    pub fn names(&self) -> BTreeSet<String> {
        self.steps.iter().flat_map(scalars).map(|(name, _)| name).collect()
    }

    /// The values of a number, with the steps that have it.
    pub fn series(&self, name: &str, axis: Axis) -> Vec<(f64, f64)> {
        let began = self.events.iter().chain(&self.steps).filter_map(|line| number(line, "time")).next();
        let x = |line: &Map<String, Value>| match axis {
            Axis::Step => number(line, "step"),
            Axis::Tokens => number(line, "tokens"),
            Axis::Time => Some((number(line, "time")? - began?) / 60.0),
        };
        let value = |line: &Map<String, Value>| scalars(line).into_iter().find(|s| s.0 == name).map(|s| s.1);
        self.steps.iter().filter_map(|line| Some((x(line)?, value(line)?))).collect()
    }
}

/// A number of a line.
pub fn number(line: &Map<String, Value>, key: &str) -> Option<f64> {
    line.get(key).and_then(Value::as_f64)
}

/// Which numbers share a panel, and how it is called.
const LOSSES: [&str; 2] = ["loss", "valid_loss"];

/// One panel a number of the log, one colour a run; the losses share a panel. A run that lacks a number is
/// left out of its panel.
pub fn panels(runs: &[History], axis: Axis, names: &[String]) -> Vec<Panel> {
    let mut panels: Vec<Panel> = Vec::new();
    let is_loss = |name: &str| LOSSES.contains(&name);
    for name in names {
        let y = if is_loss(name) { "nats per token" } else { name };
        let at = panels.iter().position(|p| p.y == y).unwrap_or_else(|| {
            let title =
                if is_loss(name) { "loss: line = training (smoothed), points = validation" } else { "" };
            let x = match axis {
                Axis::Step => "step",
                Axis::Tokens => "tokens",
                Axis::Time => "minutes",
            };
            panels.push(Panel { title: title.into(), x: x.into(), y: y.into(), curves: Vec::new() });
            panels.len() - 1
        });
        for (colour, run) in runs.iter().enumerate() {
            let mut points = run.series(name, axis);
            // What is looked at now and then, such as the validation loss.
            let sparse = 2 * points.len() < run.steps.len() || name == "valid_loss";
            let style = if sparse { Style::Points } else { Style::Line };
            if name == "loss" {
                let raw: Vec<f64> = points.iter().map(|p| p.1).collect();
                points.iter_mut().zip(smooth(&raw)).for_each(|(p, y)| p.1 = y);
            }
            let points = thin(points);
            let first = !panels[at].curves.iter().any(|c| c.colour == colour);
            let label = (runs.len() > 1 && first && !points.is_empty()).then(|| run.name.clone());
            panels[at].curves.push(Curve { label, colour, style, points });
        }
    }
    panels
}
