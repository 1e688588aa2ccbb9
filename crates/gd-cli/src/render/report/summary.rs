//! The figures at the top of a report.

use serde_json::{Map, Value};

use super::super::numbers::{duration, grouped, memory, scaled, short};
use super::{is_event, step, text};
use crate::history::{Axis, History, number};

/// A figure of a run.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Figure {
    pub(super) name: &'static str,
    pub(super) value: String,
    /// The unit, or what the value refers to; may be empty.
    pub(super) unit: String,
    /// Whether the report of a single run shows it large.
    pub(super) headline: bool,
}

/// The figures of a run, the most important ones first. Rates are medians over the steps.
pub(super) fn figures(run: &History) -> Vec<Figure> {
    let (mut figures, last) = (Vec::new(), &run.steps[run.steps.len() - 1]);
    let event = |name: &str| run.events.iter().rev().find(|e| is_event(e, name));
    let count = |name: &str| Some(run.events.iter().filter(|e| is_event(e, name)).count()).filter(|n| *n > 0);
    let value = |e: Option<&Map<String, Value>>, key: &str| e.and_then(|e| number(e, key));
    let valid = run.series("valid_loss", Axis::Step);
    let lowest = valid.iter().copied().reduce(|a, b| if b.1 < a.1 { b } else { a });
    let (start, end) = (event("start"), event("end"));
    let mut add = |headline: bool, name, value: Option<String>, unit: &str| {
        figures.extend(value.map(|value| Figure { name, value, unit: unit.to_owned(), headline }));
    };
    let loss = |x: f64| format!("{x:.4}");

    let whole = value(end, "loss");
    add(true, "validation loss", whole.map(loss), "nats per token, whole validation text");
    if let Some((at, x)) = lowest {
        let unit = format!("nats per token, after {} steps", grouped(at as u64));
        add(whole.is_none(), "lowest validation loss during training", Some(loss(x)), &unit);
    }
    let no_validation = whole.is_none() && lowest.is_none();
    add(no_validation, "training loss of the last step", number(last, "loss").map(loss), "nats per token");
    add(true, "bits per byte", value(end, "bits_per_byte").map(loss), "");
    add(true, "parameters", value(start, "parameters").map(scaled), "");
    add(true, "training tokens", number(last, "tokens").map(scaled), "");
    let steps = match number(last, "total") {
        Some(total) => format!("{} of {}", grouped(step(last)), grouped(total as u64)),
        None => grouped(step(last)),
    };
    add(true, "steps", Some(steps), "");
    add(true, "tokens per second", median(run, "tokens_per_second").map(|x| short(x.round())), "median");
    add(true, "time", seconds(run).map(duration), "");
    add(true, "peak memory", number(last, "peak_mib").map(memory), "");
    add(
        false,
        "model FLOPs utilization",
        median(run, "mfu").map(|x| format!("{:.1} %", 100.0 * x)),
        "median",
    );
    let flops = value(start, "flops_per_token").map(|x| format!("{} FLOP", scaled(x)));
    add(false, "operations per token", flops, "");
    let peak = value(start, "peak_flops").map(|x| format!("{} GFLOP/s", short(x / 1e9)));
    add(false, "rate of a matrix product", peak, "");
    add(false, "seed", value(start, "seed").map(|n| n.to_string()), "");
    let threads = value(start, "threads").unwrap_or(0.0);
    let machine = start.map(|s| match text(s, "device").as_str() {
        "cpu" => format!("CPU, {threads} threads"),
        device => device.to_owned(),
    });
    add(false, "machine", machine, "");
    let precision = start.map(|s| text(s, "precision")).filter(|name| !name.is_empty());
    add(false, "precision", precision, "");
    add(false, "version", start.map(|s| format!("gd {}", text(s, "version"))), "");
    add(false, "starts", count("start").filter(|n| *n > 1).map(|n| n.to_string()), "");
    add(false, "checkpoints", count("checkpoint").map(|n| n.to_string()), "");
    add(false, "skipped updates", count("skip").map(|n| n.to_string()), "");
    figures
}

fn median(run: &History, name: &str) -> Option<f64> {
    let mut values: Vec<f64> = run.series(name, Axis::Step).into_iter().map(|p| p.1).collect();
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied()
}

/// Time from the first to the last line of the log, including the pauses between several starts.
fn seconds(run: &History) -> Option<f64> {
    let times = || run.events.iter().chain(&run.steps).filter_map(|line| number(line, "time"));
    Some(times().fold(f64::MIN, f64::max) - times().fold(f64::MAX, f64::min)).filter(|s| *s >= 0.0)
}
