//! The report of runs: figures, curves, selection statistics, samples, problems and configuration.

mod chart;
mod markup;
mod summary;
mod svg;

use std::path::Path;

use anyhow::Result;
use gd_model::io::files::write_file;
use serde_json::{Map, Value};

use self::chart::Chart;
use self::summary::{Figure, figures};
use super::numbers::grouped;
use super::plot;
use crate::history::History;

/// Name of the report in the folder of a run.
pub const FILE: &str = "report.html";
/// The report of one run shows this many of the last samples; that of several shows one of each.
const MAX_SAMPLES: usize = 3;
/// The report lists this many of the last skipped updates and fallbacks of a run.
const MAX_PROBLEMS: usize = 20;
/// The quantities of the log that have a curve, if the log has them.
const CURVES: [&str; 7] =
    ["loss", "valid_loss", "valid_loss_ema", "grad_norm", "lr", "tokens_per_second", "resident_mib"];
/// Prefix of the names of the selection statistics in the log.
const HEADS_PREFIX: &str = "heads/";
/// The number of colors of runs in the style sheet.
const COLORS: usize = 6;

/// A section of the report.
enum Section {
    Heading(&'static str),
    /// The figures of a single run.
    Figures(Vec<Figure>),
    /// Rows below a header, which may be empty.
    Table(Vec<String>, Vec<Vec<String>>),
    Paragraph(String),
    /// Text that the model generated after a prompt.
    Sample {
        prompt: String,
        text: String,
    },
    /// Preformatted text that is folded until it is asked for, and its title.
    Details(String, String),
    /// Charts of these runs.
    Charts {
        charts: Vec<Chart>,
        runs: Vec<String>,
    },
}

/// Writes the report of one run, or of several side by side. If the file name ends in `.md`, the report is Markdown with its
/// curves in SVG files next to it. Otherwise it is one self-contained HTML file.
///
/// # Errors
/// Names the file that cannot be written.
pub fn save(path: &Path, runs: &[History]) -> Result<()> {
    let names: Vec<&str> = runs.iter().map(|run| run.name.as_str()).collect();
    let (title, sections) = (names.join(" and "), sections(runs));
    if path.extension().is_none_or(|e| e != "md") {
        return Ok(write_file(path, markup::html(&title, &sections)?.as_bytes())?);
    }
    let mut plots = 0;
    let text = markup::markdown(&title, &sections, |panels| {
        plots += 1;
        let file = path.with_extension(format!("{plots}.svg"));
        plot::save(&file, panels)?;
        Ok(file.file_name().unwrap_or_default().to_string_lossy().into_owned())
    })?;
    Ok(write_file(path, text.as_bytes())?)
}

fn sections(runs: &[History]) -> Vec<Section> {
    let mut sections = vec![match runs {
        [run] => Section::Figures(figures(run)),
        _ => side_by_side(runs),
    }];
    let mut charts = |title, names: &[&str]| {
        let charts: Vec<Chart> = names.iter().filter_map(|name| Chart::new(name, runs)).collect();
        if !charts.is_empty() {
            sections.push(Section::Heading(title));
            sections
                .push(Section::Charts { charts, runs: runs.iter().map(|run| run.name.clone()).collect() });
        }
    };
    charts("Curves", &CURVES);
    let logged: std::collections::BTreeSet<String> = runs.iter().flat_map(History::names).collect();
    let of_selection = |name: &&String| name.starts_with(HEADS_PREFIX) || **name == "churn";
    let statistics: Vec<&str> = logged.iter().filter(of_selection).map(String::as_str).collect();
    charts("Selection", &statistics);
    sections.extend(samples(runs));
    sections.extend(problems(runs));
    if runs.iter().any(|run| run.recipe.is_some()) {
        sections.push(Section::Heading("Configuration"));
    }
    for run in runs {
        let recipe = run.recipe.iter();
        sections.extend(recipe.map(|recipe| Section::Details(run.name.clone(), format!("{recipe:#}"))));
    }
    sections
}

/// A table with a row for each figure that one of the runs has, and a column for each run.
fn side_by_side(runs: &[History]) -> Section {
    let all: Vec<Vec<Figure>> = runs.iter().map(figures).collect();
    let mut names: Vec<&'static str> = Vec::new();
    for figure in all.iter().flatten() {
        if !names.contains(&figure.name) {
            names.push(figure.name);
        }
    }
    let cell = |name: &str, figures: &Vec<Figure>| {
        figures.iter().find(|f| f.name == name).map_or(String::new(), markup::cell)
    };
    let row = |name: &&str| {
        [(*name).to_owned()].into_iter().chain(all.iter().map(|figures| cell(name, figures))).collect()
    };
    let header = [String::new()].into_iter().chain(runs.iter().map(|run| run.name.clone())).collect();
    Section::Table(header, names.iter().map(row).collect())
}

/// The last samples of the runs, newest first.
fn samples(runs: &[History]) -> Vec<Section> {
    let mut sections = Vec::new();
    for run in runs {
        let samples = run.events.iter().rev().filter(|e| is_event(e, "sample"));
        for sample in samples.take(if runs.len() == 1 { MAX_SAMPLES } else { 1 }) {
            let (prompt, text) = (text(sample, "prompt"), text(sample, "text"));
            let steps = grouped(step(sample));
            let of = if runs.len() == 1 { String::new() } else { format!("{}: ", run.name) };
            let source =
                if prompt.is_empty() { "without a prompt".into() } else { format!("from {prompt:?}") };
            sections.push(Section::Paragraph(format!("{of}After {steps} steps, {source}:")));
            sections.push(Section::Sample { prompt, text });
        }
    }
    if !sections.is_empty() {
        sections.insert(0, Section::Heading("Samples"));
    }
    sections
}

/// Skipped updates, and checkpoints that could not be used.
fn problems(runs: &[History]) -> Vec<Section> {
    let (mut rows, mut left_out) = (Vec::new(), 0);
    for run in runs {
        let problems: Vec<_> =
            run.events.iter().filter(|e| is_event(e, "skip") || is_event(e, "fallback")).collect();
        left_out += problems.len().saturating_sub(MAX_PROBLEMS);
        rows.extend(
            problems
                .iter()
                .rev()
                .take(MAX_PROBLEMS)
                .rev()
                .map(|e| vec![run.name.clone(), grouped(step(e)), text(e, "event"), text(e, "reason")]),
        );
    }
    if rows.is_empty() {
        return Vec::new();
    }
    let mut sections = vec![Section::Heading("Skipped updates and fallbacks")];
    if left_out > 0 {
        sections.push(Section::Paragraph(format!("{} earlier ones are left out.", grouped(left_out as u64))));
    }
    sections.push(Section::Table(["run", "step", "event", "reason"].map(str::to_owned).into(), rows));
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
