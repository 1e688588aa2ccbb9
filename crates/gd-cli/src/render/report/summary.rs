//! The summary table of a report.

use serde_json::{Map, Value};

use super::{is_event, step, text};
use crate::history::{Axis, History, number};

/// The rows (name, value) of the summary. Rates are medians over the steps.
pub(super) fn summary(run: &History) -> Vec<Vec<String>> {
    let (mut rows, last) = (Vec::new(), &run.steps[run.steps.len() - 1]);
    let mut row = |name: &str, value: Option<String>| {
        rows.extend(value.map(|value| vec![name.to_owned(), value]));
    };
    let event = |name: &str| run.events.iter().rev().find(|e| is_event(e, name));
    let count = |name: &str| Some(run.events.iter().filter(|e| is_event(e, name)).count()).filter(|n| *n > 0);
    let value = |e: Option<&Map<String, Value>>, key: &str| e.and_then(|e| number(e, key));
    let valid = run.series("valid_loss", Axis::Step);
    let lowest = valid.iter().copied().reduce(|a, b| if b.1 < a.1 { b } else { a });
    let (start, end) = (event("start"), event("end"));

    row("parameters", value(start, "parameters").map(|n| format!("{n}")));
    row(
        "steps",
        Some(match number(last, "total") {
            Some(total) => format!("{} of {total}", step(last)),
            None => step(last).to_string(),
        }),
    );
    row("training tokens", number(last, "tokens").map(|n| n.to_string()));
    row("training loss of the last step", number(last, "loss").map(|x| format!("{x:.4} nats per token")));
    row("lowest validation loss during training", lowest.map(|(at, x)| format!("{x:.4} after {at} steps")));
    row("loss of the whole validation text", value(end, "loss").map(|x| format!("{x:.4} nats per token")));
    row("bits per byte", value(end, "bits_per_byte").map(|x| format!("{x:.4}")));
    row("tokens per second", median(run, "tokens_per_second").map(|x| format!("{x:.0}")));
    row("model FLOPs utilization", median(run, "mfu").map(|x| format!("{:.1} %", 100.0 * x)));
    row(
        "floating-point operations",
        value(start, "flops_per_token").map(|x| format!("{:.2} M per token", x / 1e6)),
    );
    row("peak memory", number(last, "peak_mib").map(|x| format!("{x:.0} MiB")));
    row("time", duration(run));
    row("seed", value(start, "seed").map(|n| n.to_string()));
    row(
        "machine",
        start.map(|s| format!("{}, {} threads", text(s, "device"), value(Some(s), "threads").unwrap_or(0.0))),
    );
    row("version", start.map(|s| format!("gd {}", text(s, "version"))));
    row("starts", count("start").filter(|n| *n > 1).map(|n| n.to_string()));
    row("checkpoints", count("checkpoint").map(|n| n.to_string()));
    row("skipped updates", count("skip").map(|n| n.to_string()));
    rows
}

fn median(run: &History, name: &str) -> Option<f64> {
    let mut values: Vec<f64> = run.series(name, Axis::Step).into_iter().map(|p| p.1).collect();
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied()
}

/// Time from the first to the last line of the log, including the pauses between several starts.
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
