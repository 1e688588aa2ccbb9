//! One document about a run: what it was, how it went, what happened.

use std::path::Path;

use gd_model::error::Result;
use gd_model::io::checkpoint::write_file;
use serde_json::{Map, Value};

use crate::history::{Axis, History, number, panels};
use crate::plot::{self, Panel};

/// The report in the folder of a run.
pub const FILE: &str = "report.html";
/// Samples that are shown, from the end of the run back.
const SAMPLES: usize = 3;
/// Skips and fallbacks that are listed.
const EVENTS: usize = 20;
/// What has a panel besides the losses, where the log has it.
const CURVES: [&str; 5] = ["loss", "valid_loss", "lr", "grad_norm", "tokens_per_second"];
/// How the names of most statistics of the heads begin.
const HEADS: &str = "heads/";

/// A part of the document.
enum Part {
    Heading(&'static str),
    /// Rows under a header.
    Table(Vec<&'static str>, Vec<Vec<String>>),
    /// A paragraph.
    Text(String),
    /// Text as it is.
    Verbatim(String),
    Curves(Vec<Panel>),
}

/// Writes the report of a run: Markdown where the name ends so, with the curves in an SVG file beside it;
/// else HTML, in one piece.
///
/// # Errors
/// Names the file that cannot be written.
pub fn save(path: &Path, run: &History) -> Result<()> {
    let parts = parts(run);
    if path.extension().is_none_or(|e| e != "md") {
        return write_file(path, html(&run.name, &parts)?.as_bytes());
    }
    let mut text = format!("# {}\n", run.name);
    let mut pictures = 0;
    for part in &parts {
        text.push('\n');
        match part {
            Part::Heading(title) => text += &format!("## {title}\n"),
            Part::Table(header, rows) => text += &markdown_table(header, rows),
            Part::Text(line) => text += &format!("{line}\n"),
            Part::Verbatim(block) => text += &format!("~~~~\n{}\n~~~~\n", block.trim_end()),
            Part::Curves(panels) => {
                pictures += 1;
                let picture = path.with_extension(format!("{pictures}.svg"));
                plot::save(&picture, panels)?;
                let name = picture.file_name().unwrap_or_default().to_string_lossy();
                text += &format!("![curves]({name})\n");
            }
        }
    }
    write_file(path, text.as_bytes())
}

fn parts(run: &History) -> Vec<Part> {
    let mut parts = vec![Part::Table(vec!["", ""], summary(run))];
    let known = run.names();
    let has = |names: &[&str]| -> Vec<String> {
        names.iter().filter(|name| known.contains(**name)).map(ToString::to_string).collect()
    };
    parts.push(Part::Heading("Curves"));
    parts.push(Part::Curves(panels(std::slice::from_ref(run), Axis::Step, &has(&CURVES))));
    let heads: Vec<String> =
        known.iter().filter(|name| name.starts_with(HEADS) || *name == "churn").cloned().collect();
    if !heads.is_empty() {
        parts.push(Part::Heading("Selection"));
        parts.push(Part::Table(
            vec!["statistic", "first", "least", "greatest", "last"],
            heads_table(run, &heads),
        ));
        parts.push(Part::Curves(panels(std::slice::from_ref(run), Axis::Step, &heads)));
    }
    let samples: Vec<_> = run.events.iter().filter(|e| is(e, "sample")).collect();
    if !samples.is_empty() {
        parts.push(Part::Heading("Samples"));
    }
    for sample in samples.iter().rev().take(SAMPLES) {
        parts.push(Part::Text(format!("After {} steps, from {:?}:", step(sample), text(sample, "prompt"))));
        parts.push(Part::Verbatim(format!("{}{}", text(sample, "prompt"), text(sample, "text"))));
    }
    let trouble: Vec<_> = run.events.iter().filter(|e| is(e, "skip") || is(e, "fallback")).collect();
    if !trouble.is_empty() {
        parts.push(Part::Heading("Skipped updates and fallbacks"));
        if trouble.len() > EVENTS {
            parts.push(Part::Text(format!("The last {EVENTS} of {}:", trouble.len())));
        }
        let row = |e: &&Map<String, Value>| vec![step(e).to_string(), text(e, "event"), text(e, "reason")];
        let rows = trouble[trouble.len().saturating_sub(EVENTS)..].iter().map(row).collect();
        parts.push(Part::Table(vec!["step", "event", "reason"], rows));
    }
    if let Some(recipe) = &run.recipe {
        parts.push(Part::Heading("Configuration"));
        parts.push(Part::Verbatim(format!("{recipe:#}")));
    }
    parts
}

/// What a reader wants to know first. Rates are medians over the steps.
fn summary(run: &History) -> Vec<Vec<String>> {
    let (mut rows, last) = (Vec::new(), &run.steps[run.steps.len() - 1]);
    let mut row = |name: &str, value: Option<String>| {
        rows.extend(value.map(|value| vec![name.to_owned(), value]));
    };
    let event = |name: &str| run.events.iter().rev().find(|e| is(e, name));
    let median = |name: &str| {
        let mut values: Vec<f64> = run.series(name, Axis::Step).into_iter().map(|p| p.1).collect();
        values.sort_by(f64::total_cmp);
        values.get(values.len() / 2).copied()
    };
    let count = |name: &str| Some(run.events.iter().filter(|e| is(e, name)).count()).filter(|n| *n > 0);
    let valid = run.series("valid_loss", Axis::Step);
    let best = valid.iter().copied().reduce(|a, b| if b.1 < a.1 { b } else { a });
    let (start, end) = (event("start"), event("end"));
    let of = |e: Option<&Map<String, Value>>, key: &str| e.and_then(|e| number(e, key));
    row("parameters", of(start, "parameters").map(|n| format!("{n}")));
    row(
        "steps",
        Some(match number(last, "total") {
            Some(total) => format!("{} of {total}", step(last)),
            None => step(last).to_string(),
        }),
    );
    row("training tokens", number(last, "tokens").map(|n| n.to_string()));
    row("training loss of the last step", number(last, "loss").map(|x| format!("{x:.4} nats per token")));
    row("best validation loss on the way", best.map(|(at, x)| format!("{x:.4} after {at} steps")));
    row("loss of the whole validation text", of(end, "loss").map(|x| format!("{x:.4} nats per token")));
    row("bits per byte", of(end, "bits_per_byte").map(|x| format!("{x:.4}")));
    row("tokens per second", median("tokens_per_second").map(|x| format!("{x:.0}")));
    row("model FLOPs utilisation", median("mfu").map(|x| format!("{:.1} %", 100.0 * x)));
    row(
        "floating-point operations",
        of(start, "flops_per_token").map(|x| format!("{:.2} M per token", x / 1e6)),
    );
    row("peak memory", number(last, "peak_mib").map(|x| format!("{x:.0} MiB")));
    row("time", duration(run));
    row("seed", of(start, "seed").map(|n| n.to_string()));
    row(
        "machine",
        start.map(|s| format!("{}, {} threads", text(s, "device"), of(Some(s), "threads").unwrap_or(0.0))),
    );
    row("version", start.map(|s| format!("gd {}", text(s, "version"))));
    row("starts", count("start").filter(|n| *n > 1).map(|n| n.to_string()));
    row("checkpoints", count("checkpoint").map(|n| n.to_string()));
    row("skipped updates", count("skip").map(|n| n.to_string()));
    rows
}

/// From the first line to the last, pauses between starts included.
fn duration(run: &History) -> Option<String> {
    let times = || run.events.iter().chain(&run.steps).filter_map(|line| number(line, "time"));
    let seconds = times().fold(f64::MIN, f64::max) - times().fold(f64::MAX, f64::min);
    let minutes = seconds / 60.0;
    (seconds >= 0.0).then(|| match minutes {
        120.0.. => format!("{:.1} hours", minutes / 60.0),
        2.0.. => format!("{minutes:.1} minutes"),
        _ => format!("{seconds:.1} seconds"),
    })
}

fn heads_table(run: &History, names: &[String]) -> Vec<Vec<String>> {
    let row = |name: &String| {
        let values: Vec<f64> = run.series(name, Axis::Step).into_iter().map(|p| p.1).collect();
        let (least, greatest) = values.iter().fold((f64::MAX, f64::MIN), |(l, g), x| (l.min(*x), g.max(*x)));
        let cells = [values.first().copied(), Some(least), Some(greatest), values.last().copied()];
        let cell = |x: Option<f64>| x.map_or(String::new(), |x| format!("{x:.4}"));
        [name.trim_start_matches(HEADS).to_owned()].into_iter().chain(cells.map(cell)).collect()
    };
    names.iter().map(row).collect()
}

fn is(event: &Map<String, Value>, name: &str) -> bool {
    event.get("event").and_then(Value::as_str) == Some(name)
}

fn text(line: &Map<String, Value>, key: &str) -> String {
    line.get(key).and_then(Value::as_str).unwrap_or_default().to_owned()
}

fn step(line: &Map<String, Value>) -> u64 {
    line.get("step").and_then(Value::as_u64).unwrap_or(0)
}

fn markdown_table(header: &[&str], rows: &[Vec<String>]) -> String {
    let line = |cells: Vec<String>| format!("| {} |\n", cells.join(" | "));
    let clean = |cell: &String| cell.replace('|', "\\|").replace('\n', " ");
    let mut text = line(header.iter().map(ToString::to_string).collect());
    text += &line(vec!["---".into(); header.len()]);
    rows.iter().for_each(|row| text += &line(row.iter().map(clean).collect()));
    text
}

fn html(name: &str, parts: &[Part]) -> Result<String> {
    let mut body = String::new();
    for part in parts {
        match part {
            Part::Heading(title) => body += &format!("<h2>{}</h2>\n", escape(title)),
            Part::Table(header, rows) => {
                let cells = |tag: &str, cells: &mut dyn Iterator<Item = String>| {
                    let cells: String = cells.map(|c| format!("<{tag}>{}</{tag}>", escape(&c))).collect();
                    format!("<tr>{cells}</tr>\n")
                };
                body += "<table>\n";
                if header.iter().any(|h| !h.is_empty()) {
                    body += &cells("th", &mut header.iter().map(ToString::to_string));
                }
                rows.iter().for_each(|row| body += &cells("td", &mut row.iter().cloned()));
                body += "</table>\n";
            }
            Part::Text(line) => body += &format!("<p>{}</p>\n", escape(line)),
            Part::Verbatim(block) => body += &format!("<pre>{}</pre>\n", escape(block)),
            Part::Curves(panels) => body += &format!("{}\n", plot::svg(panels)?),
        }
    }
    let name = escape(name);
    Ok(format!(
        "<!doctype html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n<title>{name}</title>\n\
         <style>\nbody {{ font-family: sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }}\n\
         table {{ border-collapse: collapse; }}\nth, td {{ border: 1px solid #ccc; padding: 0.25rem 0.75rem; \
         text-align: left; }}\npre {{ background: #f5f5f5; padding: 0.75rem; white-space: pre-wrap; }}\n\
         svg {{ max-width: 100%; height: auto; }}\n</style>\n</head>\n<body>\n<h1>{name}</h1>\n{body}</body>\n</html>\n"
    ))
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;")
}
