//! The figure of `gd beacon-report`: gamma before and after the barrier.

use gd_model::analysis::beacon_report::Report;

use crate::plot::{Curve, Panel, Style};

/// Gamma over the rows in rising order, before and after the barrier: all rows, and those of the minority.
pub(super) fn figure(report: &Report) -> Vec<Panel> {
    let all: Vec<usize> = (0..report.lifts.len()).collect();
    let panel = |title: &str, rows: &[usize]| {
        let curve = |side: usize, label: &str| {
            let mut values: Vec<f64> = rows.iter().map(|&row| report.gamma[side][row]).collect();
            values.sort_by(f64::total_cmp);
            let share = |i: usize| (i as f64 + 0.5) / values.len() as f64;
            Curve {
                label: Some(label.into()),
                colour: 2 * side,
                style: Style::Line,
                points: values.iter().enumerate().map(|(i, &y)| (share(i), y)).collect(),
            }
        };
        Panel {
            title: format!("{title}: {} rows", rows.len()),
            x: "share of the rows, by gamma".into(),
            y: "gamma: protected less best other score".into(),
            curves: vec![curve(0, "before the barrier"), curve(1, "after")],
        }
    };
    let mut panels = vec![panel("all", &all)];
    if !report.minority.is_empty() {
        panels.push(panel("minority", &report.minority));
    }
    panels
}
