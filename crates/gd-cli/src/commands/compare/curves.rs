//! The loss curves of a comparison as SVG.

use gd_model::analysis::compare::{Run, by_mechanism};
use gd_model::error::Result;

use crate::plot::{self, Curve, Panel, Style, smooth};

/// The curves of one mechanism, means over its seeds: training loss, and validation loss with the
/// label.
fn curves(colour: usize, runs: &[&Run]) -> [Curve; 2] {
    let n = runs.len() as f64;
    let steps = runs.iter().map(|r| r.train_loss.len()).min().unwrap_or(0);
    let raw: Vec<f64> = (0..steps).map(|i| runs.iter().map(|r| r.train_loss[i]).sum::<f64>() / n).collect();
    let looks = runs.iter().map(|r| r.valid_loss.len()).min().unwrap_or(0);
    let valid = |i: usize| {
        let loss = runs.iter().map(|r| r.valid_loss[i].1).sum::<f64>() / n;
        (runs[0].valid_loss[i].0 as f64, loss)
    };
    let last = runs.iter().map(|r| r.result.loss).sum::<f64>() / n;
    let label = format!("{}: {last:.4}", runs[0].mechanism);
    let train = smooth(&raw).into_iter().enumerate().map(|(i, y)| ((i + 1) as f64, y)).collect();
    [
        Curve { label: None, colour, style: Style::Line, points: train },
        Curve { label: Some(label), colour, style: Style::Points, points: (0..looks).map(valid).collect() },
    ]
}

/// Draws every mechanism in its own colour: a line for the training loss, points on a line for the
/// validation loss.
///
/// # Errors
/// What the plotting library reports.
pub(super) fn svg(runs: &[Run]) -> Result<String> {
    let groups = by_mechanism(runs);
    plot::svg(&[Panel {
        title:
            "Loss by step: line = training (smoothed), points = validation, number = whole validation text"
                .into(),
        x: "step".into(),
        y: "nats per token".into(),
        curves: groups.iter().enumerate().flat_map(|(colour, runs)| curves(colour, runs)).collect(),
    }])
}

#[cfg(test)]
mod tests {
    use super::super::table::tests::run;
    use super::*;

    #[test]
    fn every_mechanism_has_a_label_and_a_colour_of_its_own() {
        let runs = [run("softmax", 0, 2.0), run("gd", 0, 2.25), run("gd", 1, 2.75)];
        let svg = svg(&runs).unwrap();
        assert!(svg.starts_with("<svg") && svg.trim_end().ends_with("</svg>"), "{svg}");
        for text in ["softmax: 2.0000", "gd: 2.5000", "nats per token", "#0072B2", "#009E73"] {
            assert!(svg.contains(text), "{text} is missing");
        }
        assert!(!svg.contains("#D55E00") && !svg.contains("NaN"));
    }

    #[test]
    fn a_run_of_one_step_is_drawn() {
        let mut only = run("gd", 0, 2.0);
        only.train_loss.truncate(1);
        only.valid_loss = vec![(1, 2.0)];
        assert!(svg(&[only]).unwrap().contains("gd: 2.0000"));
    }
}
