//! The charts of a report: the series of one quantity, the range that shows them, and what is marked on them.

use super::super::numbers::{grouped, short};
use super::super::plot::{Curve, CurveStyle, Panel, reduce_points, smooth};
use super::super::quantity::{Quantity, quantity};
use super::{is_event, step};
use crate::history::{Axis, History};

/// A chart clips only if it has this many values.
const MIN_CLIPPED_VALUES: usize = 10;
/// The share of the values at each end that does not determine the range.
const TAIL: f64 = 0.02;
/// How many times the range of the values without tails a value may lie outside of it before it is cut off.
const OUTLIER_RANGES: f64 = 1.5;
/// Quantities of every step that vary so much that a smoothed line shows their course.
const SMOOTHED: [&str; 3] = ["loss", "grad_norm", "tokens_per_second"];
/// A range of values that are not negative starts at 0 if its lowest one is below this share of the highest.
const FROM_ZERO: f64 = 0.4;

/// How a series is drawn.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Style {
    /// The background of a smoothed line.
    Faint,
    Line,
    /// A line with a circle at every point.
    Points,
}

#[derive(Debug, Clone, PartialEq)]
pub(super) struct Series {
    /// Name next to a value under the pointer.
    pub(super) label: String,
    /// Index of the color, which is that of the run.
    pub(super) color: usize,
    pub(super) style: Style,
    pub(super) points: Vec<(f64, f64)>,
}

/// What a mark on a curve stands for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Mark {
    Skipped,
    Checkpoint,
}

/// A chart of a quantity over the steps.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Chart {
    pub(super) quantity: Quantity,
    pub(super) series: Vec<Series>,
    /// The marks with their places.
    pub(super) marks: Vec<(Mark, f64, f64)>,
    /// The ranges of the axes.
    pub(super) x: [f64; 2],
    pub(super) y: [f64; 2],
    /// What the chart does not show by itself: values that are cut off, a constant, the last values.
    pub(super) notes: Vec<String>,
}

impl Chart {
    /// The chart of a number of the log. `None` if no run has it.
    pub(super) fn new(name: &str, runs: &[History]) -> Option<Self> {
        let quantity = quantity(name);
        let mut series = Vec::new();
        let mut marks = Vec::new();
        for (color, run) in runs.iter().enumerate() {
            let points = points(run, name, quantity.scale);
            if points.is_empty() {
                continue;
            }
            let label = |part: &str| match (runs.len() > 1, part) {
                (true, "") => run.name.clone(),
                (true, part) => format!("{} {part}", run.name),
                (false, part) => part.to_owned(),
            };
            let mut add = |label, style, points| series.push(Series { label, color, style, points });
            let sparse = 2 * points.len() < run.steps.len() || name.starts_with("valid_loss");
            marks.extend(marked(run, &points));
            if SMOOTHED.contains(&name) {
                let raw: Vec<f64> = points.iter().map(|p| p.1).collect();
                let smoothed = points.iter().zip(smooth(&raw)).map(|(p, y)| (p.0, y)).collect();
                add(label(""), Style::Faint, points);
                add(label("smoothed"), Style::Line, smoothed);
                let valid = self::points(run, "valid_loss", quantity.scale);
                if name == "loss" && !valid.is_empty() {
                    add(label("validation"), Style::Points, valid);
                }
            } else {
                add(label(""), if sparse { Style::Points } else { Style::Line }, points);
            }
        }
        if series.is_empty() {
            return None;
        }
        let x = series.iter().flat_map(|s| &s.points).map(|p| p.0).fold(1.0, f64::max);
        let (y, mut notes) = range(&series, &quantity);
        notes.extend(last_values(name, &series, &quantity));
        for series in &mut series {
            series.points = reduce_points(std::mem::take(&mut series.points));
        }
        Some(Self { quantity, series, marks, x: [0.0, x], y, notes })
    }

    /// The chart as a panel of a plot.
    pub(super) fn panel(&self) -> Panel {
        let curve = |series: &Series| Curve {
            label: (!series.label.is_empty()).then(|| series.label.clone()),
            color: series.color,
            style: match series.style {
                Style::Faint => CurveStyle::Faint,
                Style::Line => CurveStyle::Line,
                Style::Points => CurveStyle::Points,
            },
            points: series.points.clone(),
        };
        Panel {
            title: self.quantity.title.clone(),
            x: "step".into(),
            y: self.quantity.axis().to_owned(),
            curves: self.series.iter().map(curve).collect(),
        }
    }
}

/// The finite points (step, value in the unit of the quantity).
fn points(run: &History, name: &str, scale: f64) -> Vec<(f64, f64)> {
    let points = run.series(name, Axis::Step).into_iter().map(|(x, y)| (x, y * scale));
    points.filter(|p| p.1.is_finite()).collect()
}

/// The skipped updates and checkpoints of a run, on its curve. Before its first point there is no place for them.
fn marked(run: &History, points: &[(f64, f64)]) -> Vec<(Mark, f64, f64)> {
    let kind = |line: &_| match (is_event(line, "skip"), is_event(line, "checkpoint")) {
        (true, _) => Some((Mark::Skipped, step(line) as f64)),
        (_, true) => Some((Mark::Checkpoint, step(line) as f64)),
        _ => None,
    };
    let on_curve = |(mark, x): (Mark, f64)| {
        let at = points.partition_point(|p| p.0 < x).min(points.len() - 1);
        (mark, x, points[at].1)
    };
    run.events.iter().filter_map(kind).filter(|(_, x)| *x >= points[0].0).map(on_curve).collect()
}

/// The range of the y axis, and what it leaves out.
fn range(series: &[Series], quantity: &Quantity) -> ([f64; 2], Vec<String>) {
    // A smoothed line spreads an outlier over many steps: the values themselves decide.
    let smoothed = series.iter().any(|s| s.style == Style::Faint);
    let all = || series.iter().filter(|s| !(smoothed && s.style == Style::Line)).flat_map(|s| &s.points);
    let mut values: Vec<f64> = all().map(|p| p.1).collect();
    values.sort_by(f64::total_cmp);
    let (least, greatest) = (values[0], values[values.len() - 1]);
    let unit = |x: f64| format!("{}{}", short(x), if quantity.unit == "%" { " %" } else { "" });
    if least == greatest {
        let range =
            if least == 0.0 { [0.0, 1.0] } else { [least - least.abs() / 2.0, least + least.abs() / 2.0] };
        return (range, vec![format!("{} throughout.", unit(least))]);
    }
    let quantile = |share: f64| values[((values.len() - 1) as f64 * share).round() as usize];
    let (inner_low, inner_high) = (quantile(TAIL), quantile(1.0 - TAIL));
    let reach = OUTLIER_RANGES * (inner_high - inner_low);
    let clips = values.len() >= MIN_CLIPPED_VALUES && reach > 0.0;
    let limits = if clips { [inner_low - reach, inner_high + reach] } else { [least, greatest] };
    let inside = || values.iter().copied().filter(|y| (limits[0]..=limits[1]).contains(y));
    let (low, high) = (inside().fold(f64::MAX, f64::min), inside().fold(f64::MIN, f64::max));
    let mut notes = Vec::new();
    for (above, word, extreme) in [(true, "above", greatest), (false, "below", least)] {
        let outside = |p: &&(f64, f64)| if above { p.1 > high } else { p.1 < low };
        let count = all().filter(outside).count();
        if let Some(at) = all().find(|p| p.1 == extreme).filter(|_| count > 0) {
            let (values, are) = if count == 1 { ("value", "is") } else { ("values", "are") };
            notes.push(format!(
                "{count} {values} {word} the chart {are} cut off; the farthest is {} at step {}.",
                unit(extreme),
                grouped(at.0 as u64)
            ));
        }
    }
    let low = if low >= 0.0 && low < FROM_ZERO * high { 0.0 } else { low };
    let padding = 0.06 * (high - low);
    ([if low == 0.0 { 0.0 } else { low - padding }, high + padding], notes)
}

/// The last value of every series with the extremes of a single one, unless it is constant.
fn last_values(name: &str, series: &[Series], quantity: &Quantity) -> Option<String> {
    let percent = if quantity.unit == "%" { " %" } else { "" };
    let shown: Vec<&Series> =
        series.iter().filter(|s| !SMOOTHED.contains(&name) || s.style == Style::Line).collect();
    let last = |s: &&Series| {
        let value = s.points.last().map_or(f64::NAN, |p| p.1);
        let label = if shown.len() > 1 { format!("{} ", s.label) } else { String::new() };
        format!("{label}{}{percent}", short(value))
    };
    let text = format!("At the end {}", shown.iter().map(last).collect::<Vec<_>>().join(", "));
    let [only] = shown[..] else { return Some(format!("{text}.")) };
    let (low, high) = only.points.iter().fold((f64::MAX, f64::MIN), |(l, h), p| (l.min(p.1), h.max(p.1)));
    (low < high).then(|| format!("{text}; from {} to {}{percent} in all.", short(low), short(high)))
}

#[cfg(test)]
mod tests {
    use serde_json::{Map, json};

    use super::*;

    /// A run with these values of a number, at the steps from 1 on.
    fn run(name: &str, values: &[f64], events: &[serde_json::Value]) -> History {
        let object = |value: serde_json::Value| value.as_object().cloned().unwrap_or_else(Map::new);
        let step = |(at, y): (usize, &f64)| object(json!({ "step": at + 1, name: y }));
        History {
            name: "run".into(),
            steps: values.iter().enumerate().map(step).collect(),
            events: events.iter().cloned().map(object).collect(),
            recipe: None,
        }
    }

    #[test]
    fn outliers_are_cut_off_and_counted() {
        let mut values: Vec<f64> = (0..200).map(|i| 2.0 + f64::from(i % 10) / 10.0).collect();
        values[50] = 900.0;
        let chart = Chart::new("grad_norm", &[run("grad_norm", &values, &[])]).unwrap();
        assert!(chart.y[1] < 4.0, "{:?}", chart.y);
        assert!(chart.notes[0].starts_with("1 value above the chart is cut off"), "{:?}", chart.notes);
        assert!(chart.notes[0].contains("900 at step 51"), "{:?}", chart.notes);
        values[50] = 3.5;
        let chart = Chart::new("grad_norm", &[run("grad_norm", &values, &[])]).unwrap();
        assert!(chart.y[1] > 3.5 && chart.notes.len() == 1, "{chart:?}");
    }

    #[test]
    fn a_flat_zero_lies_on_the_axis_and_is_said() {
        let chart = Chart::new("churn", &[run("churn", &[0.0; 30], &[])]).unwrap();
        assert_eq!((chart.y, chart.notes), ([0.0, 1.0], vec!["0 % throughout.".to_owned()]));
        let chart = Chart::new("hardness", &[run("hardness", &[1.0; 30], &[])]).unwrap();
        assert_eq!(chart.y, [0.5, 1.5]);
        assert!(Chart::new("lr", &[run("churn", &[0.0], &[])]).is_none());
    }

    #[test]
    fn events_are_marked_on_the_curve() {
        let events = [json!({ "event": "skip", "step": 2 }), json!({ "event": "checkpoint", "step": 9 })];
        let chart = Chart::new("lr", &[run("lr", &[1.0, 2.0, 3.0], &events)]).unwrap();
        assert_eq!(chart.marks, [(Mark::Skipped, 2.0, 2.0), (Mark::Checkpoint, 9.0, 3.0)]);
        let before = [json!({ "event": "checkpoint", "step": 0 })];
        assert_eq!(Chart::new("lr", &[run("lr", &[1.0, 2.0], &before)]).unwrap().marks, []);
    }
}
