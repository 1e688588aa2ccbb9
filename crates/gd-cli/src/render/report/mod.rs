//! The report of a run: summary, curves, selection statistics, samples, problems and configuration.

mod markup;
mod summary;

use std::path::Path;

use anyhow::Result;
use gd_model::io::files::write_file;
use serde_json::{Map, Value};

use self::summary::summary;
use super::plot::{self, Panel};
use super::run_curves::panels;
use crate::history::{Axis, History};

/// Name of the report in the folder of a run.
pub const FILE: &str = "report.html";
/// The report shows this many of the last samples.
const MAX_SAMPLES: usize = 3;
/// The report lists this many of the last skipped updates and fallbacks.
const MAX_PROBLEMS: usize = 20;
/// The quantities of the log that have a curve, if the log has them.
const CURVES: [&str; 5] = ["loss", "valid_loss", "lr", "grad_norm", "tokens_per_second"];
/// Prefix of the names of the selection statistics in the log.
const HEADS_PREFIX: &str = "heads/";

/// A section of the report.
enum Section {
    Heading(&'static str),
    /// Rows below a header.
    Table(Vec<&'static str>, Vec<Vec<String>>),
    Paragraph(String),
    /// Preformatted text.
    Verbatim(String),
    Curves(Vec<Panel>),
}

/// Writes the report of a run. If the file name ends in `.md`, the report is Markdown with its curves in SVG files
/// next to it. Otherwise it is one self-contained HTML file.
///
/// # Errors
/// Names the file that cannot be written.
pub fn save(path: &Path, run: &History) -> Result<()> {
    let sections = sections(run);
    if path.extension().is_none_or(|e| e != "md") {
        return Ok(write_file(path, markup::html(&run.name, &sections)?.as_bytes())?);
    }
    let mut plots = 0;
    let text = markup::markdown(&run.name, &sections, |panels| {
        plots += 1;
        let file = path.with_extension(format!("{plots}.svg"));
        plot::save(&file, panels)?;
        Ok(file.file_name().unwrap_or_default().to_string_lossy().into_owned())
    })?;
    Ok(write_file(path, text.as_bytes())?)
}

fn sections(run: &History) -> Vec<Section> {
    let mut sections = vec![Section::Table(vec!["", ""], summary(run))];
    let logged = run.names();
    let curves: Vec<String> =
        CURVES.iter().filter(|name| logged.contains(**name)).map(ToString::to_string).collect();
    sections.push(Section::Heading("Curves"));
    sections.push(Section::Curves(panels(std::slice::from_ref(run), Axis::Step, &curves)));
    let statistics: Vec<String> =
        logged.iter().filter(|name| name.starts_with(HEADS_PREFIX) || *name == "churn").cloned().collect();
    if !statistics.is_empty() {
        sections.push(Section::Heading("Selection"));
        sections.push(Section::Table(
            vec!["statistic", "first", "minimum", "maximum", "last"],
            statistics_table(run, &statistics),
        ));
        sections.push(Section::Curves(panels(std::slice::from_ref(run), Axis::Step, &statistics)));
    }
    sections.extend(samples(run));
    sections.extend(problems(run));
    if let Some(recipe) = &run.recipe {
        sections.push(Section::Heading("Configuration"));
        sections.push(Section::Verbatim(format!("{recipe:#}")));
    }
    sections
}

fn statistics_table(run: &History, names: &[String]) -> Vec<Vec<String>> {
    let row = |name: &String| {
        let values: Vec<f64> = run.series(name, Axis::Step).into_iter().map(|p| p.1).collect();
        let (min, max) = values.iter().fold((f64::MAX, f64::MIN), |(l, g), x| (l.min(*x), g.max(*x)));
        let cells = [values.first().copied(), Some(min), Some(max), values.last().copied()];
        let cell = |x: Option<f64>| x.map_or(String::new(), |x| format!("{x:.4}"));
        [name.trim_start_matches(HEADS_PREFIX).to_owned()].into_iter().chain(cells.map(cell)).collect()
    };
    names.iter().map(row).collect()
}

/// The last samples, newest first.
fn samples(run: &History) -> Vec<Section> {
    let samples: Vec<_> = run.events.iter().filter(|e| is_event(e, "sample")).collect();
    let mut sections = Vec::new();
    if !samples.is_empty() {
        sections.push(Section::Heading("Samples"));
    }
    for sample in samples.iter().rev().take(MAX_SAMPLES) {
        let (prompt, text) = (text(sample, "prompt"), text(sample, "text"));
        sections.push(Section::Paragraph(format!("After {} steps, from {prompt:?}:", step(sample))));
        sections.push(Section::Verbatim(format!("{prompt}{text}")));
    }
    sections
}

/// Skipped updates, and checkpoints that could not be used.
fn problems(run: &History) -> Vec<Section> {
    let problems: Vec<_> =
        run.events.iter().filter(|e| is_event(e, "skip") || is_event(e, "fallback")).collect();
    let mut sections = Vec::new();
    if problems.is_empty() {
        return sections;
    }
    sections.push(Section::Heading("Skipped updates and fallbacks"));
    if problems.len() > MAX_PROBLEMS {
        sections.push(Section::Paragraph(format!("The last {MAX_PROBLEMS} of {}:", problems.len())));
    }
    let row = |e: &&Map<String, Value>| vec![step(e).to_string(), text(e, "event"), text(e, "reason")];
    let rows = problems[problems.len().saturating_sub(MAX_PROBLEMS)..].iter().map(row).collect();
    sections.push(Section::Table(vec!["step", "event", "reason"], rows));
    sections
}

/// Whether a line of the log is the event `name`.
fn is_event(line: &Map<String, Value>, name: &str) -> bool {
    line.get("event").and_then(Value::as_str) == Some(name)
}

/// The string of a line of the log, or an empty string if the line does not have it.
fn text(line: &Map<String, Value>, key: &str) -> String {
    line.get(key).and_then(Value::as_str).unwrap_or_default().to_owned()
}

fn step(line: &Map<String, Value>) -> u64 {
    line.get("step").and_then(Value::as_u64).unwrap_or(0)
}
