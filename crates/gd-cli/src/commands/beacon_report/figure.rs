//! The plot of `gd beacon-report`: gamma before and after the barrier.

use gd_model::analysis::beacon_report::Report;

use crate::render::plot::{Curve, CurveStyle, Panel};

/// Creates a panel for all rows and one for the rows of the minority, if there are any. A panel shows the sorted
/// values of gamma before and after the barrier.
pub(super) fn panels(report: &Report) -> Vec<Panel> {
    let all: Vec<usize> = (0..report.lifts.len()).collect();
    let mut panels = vec![panel(report, "all", &all)];
    if !report.minority.is_empty() {
        panels.push(panel(report, "minority", &report.minority));
    }
    panels
}

fn panel(report: &Report, title: &str, rows: &[usize]) -> Panel {
    let curve = |stage: usize, label: &str| {
        let mut values: Vec<f64> = rows.iter().map(|&row| report.gamma[stage][row]).collect();
        values.sort_by(f64::total_cmp);
        let share = |i: usize| (i as f64 + 0.5) / values.len() as f64;
        Curve {
            label: Some(label.into()),
            color: 2 * stage,
            style: CurveStyle::Line,
            points: values.iter().enumerate().map(|(i, &y)| (share(i), y)).collect(),
        }
    };
    Panel {
        title: format!("{title}: {} rows", rows.len()),
        x: "share of the rows, sorted by gamma".into(),
        y: "gamma: protected minus highest other score".into(),
        curves: vec![curve(0, "before the barrier"), curve(1, "after the barrier")],
    }
}
